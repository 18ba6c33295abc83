"""ViT-B/16's text rows for ImageNet's names, packed and padded to the longest prompt; on the CPU for 200 of them.

What the benchmarks of the towers' ops share: sizes, types, bounds and names of their cases too.
"""

import open_clip
import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from timing import DEVICE

from tpt_fast.text.layout import pack
from tpt_fast.text.prompts import build_prompts

TOWER, WIDTH, HEADS = "ViT-B-16", 512, 8
# Neighbours are of one kind, such as fish or dogs, whose names are longer than most: so every fifth.
NAMES = IMAGENET_CLASSNAMES if DEVICE.type == "cuda" else IMAGENET_CLASSNAMES[::5]

_PROMPTS = build_prompts(NAMES, "a photo of a", None, open_clip.get_tokenizer(TOWER), 77)
LAYOUT = pack(_PROMPTS, False, 1 << 20, DEVICE)[0]
ROWS, CLASSES, LONGEST = LAYOUT.rows, len(NAMES), int(_PROMPTS.lengths.max())

#: Types of the rows, and how far a result may be from float64's, of values of about one.
BOUNDS = {torch.float32: 1e-4, torch.float16 if DEVICE.type == "cuda" else torch.bfloat16: 3e-2}


def case(rows, dtype):
    """What a row of results calls ``rows``, of either kind, in ``dtype``."""
    return f"{ROWS} packed or {CLASSES}x{LONGEST} padded {rows}" + (
        "" if dtype == torch.float32 else f", {str(dtype).removeprefix('torch.')}"
    )


# Where each packed row stands among the padded ones; the prefix is taken from the first class.
_LENGTHS = LAYOUT.offsets.diff()
PADDED_ROW = torch.cat(
    [
        torch.arange(LAYOUT.prefix, device=DEVICE),
        torch.arange(CLASSES, device=DEVICE).repeat_interleave(_LENGTHS) * LONGEST + LAYOUT.position[LAYOUT.prefix :],
    ]
)


def padded(rows):
    """Packed rows [R, W] as [C, longest prompt, W], with zeros behind the prompts."""
    out = rows.new_zeros(CLASSES, LONGEST, rows.shape[1])
    out.flatten(0, 1)[PADDED_ROW] = rows
    out[:, : LAYOUT.prefix] = rows[: LAYOUT.prefix]
    return out


def packed(out):
    """The packed rows [R, W] among padded ones."""
    return out.flatten(0, 1)[PADDED_ROW]
