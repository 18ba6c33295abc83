"""Where the time of one image goes: ``python benchmarks/kernels.py [MODEL [CLASSES [PRECISION]]]``.

Prints what torch's profiler sees of a few images after the first ones: on a GPU its kernels, which are those of the
replayed graph, else the CPU's ops.
"""

import sys

from timing import DEVICE
from torch.profiler import ProfilerActivity, profile

from tpt_fast.bench.case import STARTS, Case, RandomModel
from tpt_fast.bench.rates import full_float32

IMAGES = 3


def main(name: str = "ViT-B-16", classes: str = "1000", precision: str = "fp16") -> None:
    full_float32()
    run = Case(RandomModel.of(name, DEVICE), int(classes), precision).ours(STARTS[0])
    for _ in range(2):  # the second call of a shape captures its graph
        run()
    on_gpu = DEVICE.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        for _ in range(IMAGES):
            run()
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    print(f"{IMAGES} images, {name}, {classes} classes, {precision}, {DEVICE.type}")
    print(seen.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=100))


if __name__ == "__main__":
    main(*sys.argv[1:])
