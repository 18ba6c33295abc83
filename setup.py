"""Packages the Python files and the C++ and CUDA sources; never imports torch.

``TPT_FAST_AOT=1 pip install --no-build-isolation .`` also compiles the extension into the wheel, with the same code
that otherwise compiles it at first use. It is compiled for this machine's CPU unless ``TPT_FAST_MARCH`` says for which
(``x86-64-v3``: AVX2); on a CPU that lacks what it needs it is not loaded.
"""

import os
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
AHEAD_OF_TIME = os.environ.get("TPT_FAST_AOT") == "1"
if os.environ.get("TPT_FAST_AOT", "") not in {"", "0", "1"}:
    sys.exit(f"TPT_FAST_AOT: expected 0 or 1, got {os.environ['TPT_FAST_AOT']!r}")


class BuildPy(build_py):
    """Adds the compiled extension to the package where that is asked for."""

    def run(self):
        super().run()
        if AHEAD_OF_TIME and not self.editable_mode:
            sys.path.insert(0, str(ROOT))
            import torch

            from tpt_fast.extension import build, cache, toolkit

            halves = ["cpu"]
            if build.cuda_choice() is not False and torch.version.cuda is not None and toolkit.cuda() is not None:
                halves.append("cuda")
            for half in halves:
                scratch = Path(self.get_finalized_command("build").build_temp, half)
                scratch.mkdir(parents=True, exist_ok=True)
                library = build.build(build.plan(half), scratch)
                target = Path(self.build_lib, "tpt_fast", "_kernels", half)
                target.mkdir(parents=True, exist_ok=True)
                for file in (library, library.with_name(cache.RECORD)):
                    self.copy_file(str(file), str(target / file.name))


class BinaryDistribution(Distribution):
    """A wheel for this platform only."""

    def has_ext_modules(self):
        return AHEAD_OF_TIME


setup(
    packages=[*find_packages(include=["tpt_fast", "tpt_fast.*"]), "tpt_fast._sources.csrc", "tpt_fast._sources.python"],
    package_dir={"tpt_fast._sources.csrc": "csrc", "tpt_fast._sources.python": "python"},
    package_data={
        "tpt_fast": ["py.typed", "demo/*", "demo/photos/*", "evaluation/*.html"],
        "tpt_fast._sources.csrc": ["*.h", "*.cuh", "*.cpp", "*.cu"],
        "tpt_fast._sources.python": ["*.h", "*.cpp"],
    },
    cmdclass={"build_py": BuildPy},
    distclass=BinaryDistribution,
)
