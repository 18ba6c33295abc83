"""What the tests of the build share: compilers that are shell scripts, and processes that know nothing yet."""

from pathlib import Path

from tpt_fast.extension import load


def forget(monkeypatch) -> None:
    """What a new process knows: nothing."""
    monkeypatch.setattr(load, "_decided", {})
    monkeypatch.setattr(load, "_background", [])


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path
