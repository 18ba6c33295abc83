"""Evaluation: image sets, runs, features kept, metrics, report."""
