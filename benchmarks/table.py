"""Put the measured rows into docs/measured.md, and ten of them into README.md: ``python benchmarks/table.py``."""

from __future__ import annotations

from pathlib import Path

from kept import RESULTS, by_numbers

from tpt_fast._files import atomic_write
from tpt_fast.bench.rows import Row, duration, read

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- rows:begin -->", "<!-- rows:end -->"
#: What README.md shows: its name there, op, case, and peers.
SHOWN = (
    ("63 views of 500x375 at 224", "views", "63 of 500x375 at 224", ("torchvision v2", "PIL as published")),
    ("objective and gradient, 64 views x 1000 classes", "objective", "64x1000", ("torch.compile", "eager")),
    (
        "attention over prefix and suffixes, 200 classes",
        "prefix_attention",
        "829 packed or 200x14 padded rows, 8 heads",
        ("SDPA, padded",),
    ),
    ("AdamW step", "adamw_step", "1 of 4x512", ("torch.optim.AdamW",)),
    ("text tower, ViT-B/16, 200 classes, each image", "text", "ViT-B-16, 200 classes, each image", ("published",)),
    ("image tower, ViT-B/16, 64 views", "vision", "ViT-B-16 x 64", ("open_clip",)),
    ("image tower, RN50, 64 views", "vision", "RN50 x 64", ("open_clip",)),
    ("whole image, ViT-B/16, 200 classes", "tune", "ViT-B-16, 200 classes, a photograph", ("published",)),
    ("whole image, ViT-B/32, 200 classes", "tune", "ViT-B-32, 200 classes, a photograph", ("published",)),
    ("whole image, ViT-B/16, 1000 classes", "tune", "ViT-B-16, 1000 classes, a photograph", ()),
)


def measured() -> list[Row]:
    found = [row for path in sorted(RESULTS.glob("*.jsonl")) for row in read(path)]
    return [row for row in found if "median" in row]  # counts and peaks have rows too


def longer(peer: Row, ours: Row) -> str:
    return f"{peer['backend']} **{peer['median'] / ours['median']:.1f}x**"


def ten_rows(found: list[Row]) -> str:
    """Cases down, CPUs across."""
    cpus = sorted({row["cpu"] for row in found if not row["gpu"]}, reverse=True)
    lines = [["what", *cpus], ["---"] * (1 + len(cpus))]
    for name, op, case, peers in SHOWN:
        line = [name]
        for cpu in cpus:
            rows = {r["backend"]: r for r in found if (r["op"], r["case"], r["cpu"], r["gpu"]) == (op, case, cpu, None)}
            if ours := rows.get("tpt_fast"):
                line.append(", ".join([duration(ours["median"]), *(longer(rows[p], ours) for p in peers if p in rows)]))
            else:
                line.append("")
        lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table(found: list[Row]) -> str:
    """Each case's time and how many times longer its peers took, grouped by machine."""
    lines = []
    machines = sorted({(r["gpu"] or r["cpu"], r["threads"], r["torch"]) for r in found})
    for machine in machines:
        here = [r for r in found if (r["gpu"] or r["cpu"], r["threads"], r["torch"]) == machine]
        lines += [f"{machine[0]}, {machine[1]} threads, torch {machine[2]}; medians:", ""]
        lines += ["| what | case | tpt_fast | peers, and how many times longer they take |", "|---|---|---|---|"]
        for op, case in sorted({(r["op"], r["case"]) for r in here}, key=lambda each: (each[0], by_numbers(each[1]))):
            rows = {r["backend"]: r for r in here if (r["op"], r["case"]) == (op, case)}
            if ours := rows.pop("tpt_fast", None):
                peers = sorted(rows.values(), key=lambda row: row["median"])
                ratios = ", ".join(longer(peer, ours) for peer in peers)
                lines.append(f"| {op} | {case} | {duration(ours['median'])} | {ratios} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Replace what stands between the two marks of both pages."""
    found = measured()
    for page, rows in ((ROOT / "docs" / "measured.md", table(found)), (ROOT / "README.md", ten_rows(found))):
        text = page.read_text()
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        with atomic_write(page) as aside:
            aside.write_text(f"{before}{BEGIN}\n{rows}{END}{after}")


if __name__ == "__main__":
    main()
