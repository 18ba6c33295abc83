"""What the CUDA compiler makes of ``csrc/*.cu``: registers, stack, spills and shared memory of every kernel.

``python tests/cuda_sources.py`` prints the table for the architectures it is given (default: all that the toolkit
knows); with ``--write`` it puts them into ``csrc/resources.tsv``, the budget that no kernel may exceed
(``tests/test_cuda_sources.py``). Columns of other architectures stay as they are.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "csrc" / "resources.tsv"
FLAGS = ["-std=c++17", "-O3", "-DTPT_FAST_CUDA", "-Werror", "all-warnings", "-Xptxas", "-v"]


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor has room for (CUDA programming guide, technical specifications by compute capability)."""

    warps: int
    blocks: int
    shared: int  #: bytes
    reserved: int = 1024  #: bytes of those that every block takes for the system


LIMITS = {
    75: Limits(32, 16, 64 << 10, 0),
    80: Limits(64, 32, 164 << 10),
    86: Limits(48, 16, 100 << 10),
    89: Limits(48, 24, 100 << 10),
    90: Limits(64, 32, 228 << 10),
    100: Limits(64, 32, 228 << 10),
    120: Limits(48, 24, 100 << 10),
}
REGISTERS = 65536  # of a multiprocessor, on all of the above


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture."""

    threads: int  #: of a block, the launch bound
    registers: int  #: of a thread
    stack: int  #: bytes a thread
    spills: int  #: bytes a thread, stored and loaded
    shared: int  #: static bytes a block

    def occupancy(self, arch: int) -> float:
        """Share of the multiprocessor's warps that can be resident, by registers and static shared memory.

        Registers are given to a warp in units of 256, and to warps four at a time; shared memory to a block in units
        of 128 bytes, plus what the system takes of it. Dynamic shared memory is not known here.
        """
        limits, warps = LIMITS[arch], -(-self.threads // 32)
        of_a_warp = -(-self.registers * 32 // 256) * 256
        by_registers = REGISTERS // of_a_warp // 4 * 4 // warps
        by_shared = limits.shared // max(1, -(-self.shared // 128) * 128 + limits.reserved)
        return min(limits.warps // warps, limits.blocks, by_registers, by_shared) * warps / limits.warps

    def cell(self, arch: int) -> str:
        """One cell of the table."""
        return f"{self.registers}/{self.stack}/{self.spills}/{self.occupancy(arch):.0%}"


def architectures(nvcc: str) -> list[int]:
    """Those of :data:`LIMITS` that this compiler knows."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return [arch for arch in LIMITS if f"sm_{arch}" in known.split()]


def sources() -> list[Path]:
    """The CUDA sources."""
    return sorted((ROOT / "csrc").glob("*.cu"))


def compile_one(nvcc: str, source: Path, arch: int) -> dict[str, Resources]:
    """Resources of the kernels of ``source``, by readable name.

    Raises:
        RuntimeError: an error or a warning; the message is the compiler's output.
    """
    with tempfile.TemporaryDirectory() as folder:
        code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = [nvcc, *FLAGS, code, "-cubin", "--keep", "--keep-dir", folder, "-o", f"{folder}/out.cubin"]
        result = subprocess.run([*command, str(source)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode or re.search(r"\bwarning\b", result.stdout):
            raise RuntimeError(f"{source.name} for sm_{arch}:\n{result.stdout}")
        (ptx,) = Path(folder).glob("*.ptx")
        bounds = dict(re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", ptx.read_text()))
    found = {}
    for name, body in re.findall(r"Compiling entry function '(\w+)'(.+?)(?=Compiling entry|\Z)", result.stdout, re.S):
        numbers = [int(re.search(rf"(\d+) bytes {what}", body)[1]) for what in ("stack", "spill stores", "spill loads")]
        shared = re.search(r"(\d+) bytes smem", body)
        registers = int(re.search(r"Used (\d+) registers", body)[1])
        found[name] = Resources(
            int(bounds[name]), registers, numbers[0], sum(numbers[1:]), int(shared[1]) if shared else 0
        )
    readable = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True).stdout
    return {_short(name): resources for name, resources in zip(readable.splitlines(), found.values(), strict=True)}


def _short(signature: str) -> str:
    """``views_kernel<unsigned char>`` of ``void tpt_fast::(anonymous namespace)::views_kernel<...>(...)``."""
    name = re.sub(r"\(anonymous namespace\)::|tpt_fast::|^void ", "", signature)
    return name[: name.rindex("(")]


def compile_all(nvcc: str, archs: Iterable[int], jobs: int = 2) -> dict[int, dict[str, Resources]]:
    """Resources of every kernel by architecture; ``jobs`` compilers at once."""
    archs = list(archs)
    pairs = [(source, arch) for source in sources() for arch in archs]
    pairs.sort(key=lambda pair: -pair[0].stat().st_size)  # the longest first
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda pair: compile_one(nvcc, *pair), pairs))
    merged: dict[int, dict[str, Resources]] = {arch: {} for arch in archs}
    for (_, arch), found in zip(pairs, results, strict=True):
        merged[arch] |= found
    return merged


def table(nvcc: str, compiled: dict[int, dict[str, Resources]]) -> str:
    """The text of ``csrc/resources.tsv``, with what stands there of other architectures by the same compiler."""
    recorded, rows = read_table()
    rows = rows if recorded == version(nvcc) else {}
    archs = sorted({*compiled, *(int(name[3:]) for row in rows.values() for name in row if name.startswith("sm_"))})
    lines = [
        f"# {version(nvcc)}; registers / stack bytes / spilled bytes / occupancy; by tests/cuda_sources.py --write",
        "\t".join(["kernel", "threads", "shared", *(f"sm_{arch}" for arch in archs)]),
    ]
    for name, first in sorted(next(iter(compiled.values())).items()):
        old = rows.get(name, {})
        cells = [compiled[arch][name].cell(arch) if arch in compiled else old.get(f"sm_{arch}", "") for arch in archs]
        lines.append("\t".join([name, str(first.threads), str(first.shared), *cells]))
    return "\n".join(lines) + "\n"


def read_table(path: Path = TABLE) -> tuple[str, dict[str, dict[str, str]]]:
    """The compiler's version, and rows by kernel, each by column."""
    comment, header, *rows = path.read_text().splitlines()
    columns = header.split("\t")
    parsed = (dict(zip(columns, row.split("\t"), strict=True)) for row in rows)
    return comment.removeprefix("# ").partition(";")[0], {row["kernel"]: row for row in parsed}


def version(nvcc: str) -> str:
    """For instance ``nvcc V13.0.88``."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + re.search(r"V[\d.]+", text)[0]


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from tpt_fast.extension import toolkit

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", type=int, help="for instance 80 90")
    parser.add_argument("--write", action="store_true", help=f"replace {TABLE.relative_to(ROOT)}")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    cuda = toolkit.cuda()
    if cuda is None:
        sys.exit("no CUDA toolkit found")
    compiled = compile_all(cuda.nvcc, options.architectures or architectures(cuda.nvcc), options.jobs)
    text = table(cuda.nvcc, compiled)
    if options.write:
        TABLE.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
