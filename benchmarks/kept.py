"""Where ``pytest benchmarks --rows`` keeps its rows."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def path(op: str) -> Path:
    """The rows of one op."""
    return RESULTS / f"{op}.jsonl"
