"""Measuring: rows of results, the machine's rates, whole images of a model, and the picture of where the time goes.

``tpt-fast bench`` and ``benchmarks/`` share it. Nothing is imported here: who measures nothing waits for nothing.
"""
