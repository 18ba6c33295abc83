"""CUDA graphs: whether a loop can be captured, its capture, and its results in one copy."""
