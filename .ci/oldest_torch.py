"""Compile the bindings, CPU and CUDA, against the headers of a PyTorch wheel, which is neither installed nor linked."""

import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from zipfile import ZipFile

from tpt_fast.extension import build, toolkit


def main(wheel: str) -> int:
    halves = ["cpu", "cuda"] if toolkit.cuda() is not None else ["cpu"]
    commands = []
    with tempfile.TemporaryDirectory() as folder:
        with ZipFile(wheel) as files:
            files.extractall(folder, [name for name in files.namelist() if name.startswith("torch/include/")])
        for plan in map(build.plan, halves):
            includes = [f"-I{folder}/torch/include", *(f"-I{other}" for other in plan.includes[1:])]
            command = [*plan.compiler.command, *plan.cxx_flags, "-Werror", "-fsyntax-only", *includes]
            commands += [[*command, source] for source in plan.sources if "/python/" in source]
        with ThreadPoolExecutor(build._jobs()) as pool:
            codes = list(pool.map(lambda command: subprocess.run(command).returncode, commands))
    print(f"{len(commands)} bindings ({' and '.join(halves)}), {sum(map(bool, codes))} failed")
    return int(any(codes) or not commands)


sys.exit(main(sys.argv[1]))
