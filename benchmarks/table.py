"""Put the measured rows into docs/measured.md: ``python benchmarks/table.py``."""

from __future__ import annotations

from pathlib import Path

from kept import RESULTS, by_numbers

from tpt_fast._files import atomic_write
from tpt_fast.bench.rows import duration, read

PAGE = Path(__file__).resolve().parent.parent / "docs" / "measured.md"
BEGIN, END = "<!-- rows:begin -->", "<!-- rows:end -->"


def table() -> str:
    """Each case's time and how many times longer its peers took, grouped by machine."""
    found = [row for path in sorted(RESULTS.glob("*.jsonl")) for row in read(path)]
    found = [row for row in found if "median" in row]  # counts and peaks have rows too
    lines = []
    machines = sorted({(r["gpu"] or r["cpu"], r["threads"], r["torch"]) for r in found})
    for machine in machines:
        here = [r for r in found if (r["gpu"] or r["cpu"], r["threads"], r["torch"]) == machine]
        lines += [f"{machine[0]}, {machine[1]} threads, torch {machine[2]}; medians:", ""]
        lines += ["| what | case | tpt_fast | peers, and how many times longer they take |", "|---|---|---|---|"]
        for op, case in sorted({(r["op"], r["case"]) for r in here}, key=lambda each: (each[0], by_numbers(each[1]))):
            rows = {r["backend"]: r for r in here if (r["op"], r["case"]) == (op, case)}
            if ours := rows.pop("tpt_fast", None):
                peers = sorted(rows.items(), key=lambda item: item[1]["median"])
                ratios = ", ".join(f"{name} **{row['median'] / ours['median']:.1f}x**" for name, row in peers)
                lines.append(f"| {op} | {case} | {duration(ours['median'])} | {ratios} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Replace what stands between the two marks."""
    text = PAGE.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    with atomic_write(PAGE) as aside:
        aside.write_text(f"{before}{BEGIN}\n{table()}{END}{after}")


if __name__ == "__main__":
    main()
