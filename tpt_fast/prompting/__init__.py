"""Prompts that were learned elsewhere."""
