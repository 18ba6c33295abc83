"""The rows of ViT-B/16's text tower for 200 of ImageNet's names: packed, and padded to the longest prompt."""

import open_clip
import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

from tpt_fast.prompts import build_prompts
from tpt_fast.text.layout import pack

TOWER, WIDTH, HEADS = "ViT-B-16", 512, 8
NAMES = IMAGENET_CLASSNAMES[::5]  # the lists of one kind, such as fish or dogs, have longer names than the rest

_PROMPTS = build_prompts(NAMES, "a photo of a", None, open_clip.get_tokenizer(TOWER), 77)
LAYOUT = pack(_PROMPTS, False, 1 << 20, torch.device("cpu"))[0]
ROWS, CLASSES, LONGEST = LAYOUT.rows, len(NAMES), int(_PROMPTS.lengths.max())

# Where each packed row stands among the padded ones; the prefix is taken from the first class.
_LENGTHS = LAYOUT.offsets.diff()
PADDED_ROW = torch.cat(
    [
        torch.arange(LAYOUT.prefix),
        torch.arange(CLASSES).repeat_interleave(_LENGTHS) * LONGEST + LAYOUT.position[LAYOUT.prefix :],
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
