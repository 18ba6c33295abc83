"""Where ``pytest benchmarks --rows`` keeps its rows."""

import re
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def path(op: str) -> Path:
    """The rows of one op."""
    return RESULTS / f"{op}.jsonl"


def by_numbers(case: str) -> list[str]:
    """Key that sorts cases by the numbers in them: 200 classes before 1000."""
    return [part.zfill(8) if part.isdigit() else part for part in re.split(r"(\d+)", case)]
