"""Compile the bindings, CPU and CUDA, against the headers of a PyTorch wheel, which is neither installed nor linked."""

import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from zipfile import ZipFile

from tpt_fast.extension import build, toolkit


def main(wheel: str) -> int:
    plan = build.plan(with_cuda=toolkit.cuda() is not None)
    with tempfile.TemporaryDirectory() as folder:
        with ZipFile(wheel) as files:
            files.extractall(folder, [name for name in files.namelist() if name.startswith("torch/include/")])
        includes = [f"-I{folder}/torch/include", *(f"-I{other}" for other in plan.includes[1:])]
        command = [plan.compiler.path, *plan.cxx_flags, "-Werror", "-fsyntax-only", *includes]
        bindings = [source for source in plan.sources if "/python/" in source]
        with ThreadPoolExecutor(build._jobs()) as pool:
            codes = list(pool.map(lambda source: subprocess.run([*command, source]).returncode, bindings))
    print(f"{len(bindings)} bindings {'with' if plan.nvcc else 'without'} CUDA, {sum(map(bool, codes))} failed")
    return int(any(codes) or not bindings)


sys.exit(main(sys.argv[1]))
