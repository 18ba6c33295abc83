"""Checkpoints of CoOp's trainer, of other methods, damaged and hostile ones."""

import io
import os
import pickle
import warnings
import zipfile
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from tpt_fast.prompting.checkpoint import Inert, read
from tpt_fast.prompting.coop import load_ctx


def save(path, content, **options):
    torch.save(content, path, **options)
    return path


class Warmup(LRScheduler):
    """As the trainer's own wrapper: a class that no reader of weights knows, which holds another scheduler."""

    def __init__(self, optimizer, successor):
        self.successor, self.warmup_epoch, self.cons_lr = successor, 1, 1e-5
        super().__init__(optimizer, -1)

    def get_lr(self):
        return [self.cons_lr] * len(self.base_lrs)


def as_trained(path, ctx, val_result=None, **more):
    """What CoOp's trainer writes, with its optimizer and scheduler after a step."""
    learner = nn.ParameterDict({"ctx": nn.Parameter(ctx.clone())})
    optimizer = SGD(learner.parameters(), lr=0.002, momentum=0.9, weight_decay=5e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        following = CosineAnnealingLR(optimizer, 50.0)
        warm = Warmup(optimizer, following)
        learner["ctx"].grad = torch.ones_like(learner["ctx"])
        optimizer.step()
        following.step()
    state = {"ctx": ctx, "token_prefix": ctx.new_zeros(3, 1, ctx.shape[-1]), "token_suffix": ctx.new_zeros(3, 60, 8)}
    content = {"state_dict": state | more, "epoch": 50, "optimizer": optimizer.state_dict()}
    return save(path, content | {"scheduler": warm.state_dict(), "val_result": val_result})


@pytest.mark.parametrize("val_result", [None, 71.5, np.float64(71.5), np.float32(71.5)], ids=repr)
@pytest.mark.parametrize("shape", [(16, 8), (3, 4, 8)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_as_coops_trainer_leaves_it(tmp_path, val_result, shape, dtype):
    ctx = torch.randn(shape, dtype=dtype)
    path = as_trained(tmp_path / "model.pth.tar-50", ctx, val_result)
    assert torch.equal(load_ctx(path, 8), ctx.float())
    assert torch.equal(load_ctx(str(path), 8), ctx.float())


@pytest.mark.parametrize("name", ["ctx", "module.ctx", "prompt_learner.ctx", "module.prompt_learner.ctx"])
@pytest.mark.parametrize("zipped", [True, False])
def test_prefixes_and_the_old_format(tmp_path, name, zipped):
    ctx = torch.randn(4, 8)
    for content in ({"state_dict": {name: ctx}}, {name: nn.Parameter(ctx)}):
        path = save(tmp_path / "ctx.pt", content, _use_new_zipfile_serialization=zipped)
        assert torch.equal(load_ctx(path, 8), ctx)
    assert torch.equal(load_ctx(save(tmp_path / "bare.pt", ctx, _use_new_zipfile_serialization=zipped), 8), ctx)


def test_tensors_and_widths(tmp_path):
    ctx = torch.randn(16, 8)
    assert load_ctx(ctx.half(), 8).dtype == torch.float32
    assert load_ctx(ctx.double(), 8).dtype == torch.float64
    with pytest.raises(ValueError, match=r"expected width 512 .* got \[16, 8\]"):
        load_ctx(as_trained(tmp_path / "model.pth.tar-50", ctx), 512)


@pytest.mark.parametrize(
    ("more", "whose"),
    [
        ({"meta_net.linear1.weight": torch.zeros(2, 8)}, "CoCoOp"),
        ({"compound_prompts_text.0": torch.zeros(2, 8), "proj.weight": torch.zeros(2, 8)}, "MaPLe"),
        ({"image_encoder.transformer.resblocks.1.VPT_shallow": torch.zeros(4, 8)}, "PromptSRC"),
        ({"ctx_att1": torch.zeros(4, 8)}, "ATPrompt"),
        ({"anything.weight": torch.zeros(4, 8)}, "holds more than CoOp's context, ['anything.weight']"),
    ],
)
def test_other_methods_are_refused_by_what_they_hold(tmp_path, more, whose):
    path = as_trained(tmp_path / "model.pth.tar-10", torch.randn(4, 8), **more)
    with pytest.raises(ValueError, match="expected CoOp's") as caught:
        load_ctx(path, 8)
    assert whose in str(caught.value)


class Runs:
    """Would make a folder if it were unpickled freely."""

    def __init__(self, folder, how):
        self.folder, self.how = folder, how

    def __reduce__(self):
        return self.how, (str(self.folder),)


@pytest.mark.parametrize(
    "how", [os.mkdir, os.makedirs, eval, exec, os.system, torch.hub.load], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_checkpoint_is_run(tmp_path, how, zipped):
    ctx, made = torch.randn(4, 8), tmp_path / "made"
    target = made if "mk" in how.__name__ or how is os.makedirs else f"__import__('os').mkdir({str(made)!r})"
    content = {"state_dict": {"ctx": ctx}, "scheduler": Runs(target, how)}
    path = save(tmp_path / "hostile.pt", content, _use_new_zipfile_serialization=zipped)
    assert torch.equal(load_ctx(path, 8), ctx)
    assert isinstance(read(path)["scheduler"], Inert)
    assert not made.exists()


def pickle_by_pickle(path):
    """The pickles of a file in the old format: magic number, version, machine, content, keys of its storages."""
    data = path.read_bytes()
    file = io.BytesIO(data)
    ends = [0]
    while file.tell() < len(data):
        pickle.load(file)
        ends.append(file.tell())
    return [data[start:end] for start, end in pairwise(ends)]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_changes_nothing_of_torch(tmp_path, zipped):
    """A pickle may set the state of what it names: of torch's function too, for the whole process."""
    function = torch._utils._rebuild_tensor_v2
    before = function.__defaults__, dict(function.__dict__)
    # The function, its attributes, what would be set on it like slots, a tuple of the two, BUILD.
    attributes, slots = b"}X\3\0\0\0oddI7\ns", b"}X\x0c\0\0\0__defaults__I7\n\x85s"
    state = b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n" + attributes + slots + b"\x86b."
    path, plain = tmp_path / "hostile.pt", save(tmp_path / "plain.pt", 0, _use_new_zipfile_serialization=zipped)
    if zipped:
        with zipfile.ZipFile(plain) as files, zipfile.ZipFile(path, "w") as out:
            for each in files.infolist():
                content = files.read(each)
                out.writestr(each.filename, state if each.filename.endswith("data.pkl") else content)
    else:
        *head, _, keys = pickle_by_pickle(plain)
        path.write_bytes(b"".join([*head, state, keys]))
    try:
        with pytest.raises(ValueError, match=r"ctx: the checkpoint .*hostile\.pt'"):
            load_ctx(path, 8)
        assert (function.__defaults__, function.__dict__) == before
    finally:
        function.__defaults__ = before[0]
        function.__dict__.pop("odd", None)


def test_a_context_that_would_be_run_is_none(tmp_path):
    path = save(tmp_path / "hostile.pt", {"state_dict": {"ctx": Runs(tmp_path / "made", os.mkdir)}})
    with pytest.raises(ValueError, match=r"has no tensor state_dict\['ctx'\]"):
        load_ctx(path, 8)
    assert not (tmp_path / "made").exists()


def test_a_tensor_of_nothing_is_not_spread_out(tmp_path):
    """1.6 kB that would take 12 GB."""
    path = save(tmp_path / "wide.pt", {"state_dict": {"ctx": torch.zeros(1).as_strided((400_000_000, 8), (0, 0))}})
    assert path.stat().st_size < 4000
    with pytest.raises(ValueError, match=r"expected as many numbers as are stored, got \[400000000, 8\] of 4 bytes"):
        load_ctx(path, 8)


def test_a_packed_archive_is_not_unpacked(tmp_path):
    plain, packed = save(tmp_path / "plain.pt", {"ctx": torch.zeros(1000, 8)}), tmp_path / "packed.pt"
    with zipfile.ZipFile(plain) as files, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for each in files.infolist():
            out.writestr(each.filename, files.read(each))
    with pytest.raises(ValueError, match="would unpack to more than its"):
        load_ctx(packed, 8)


@pytest.mark.parametrize("cut", [0, 1, 30, 400, 1000])
def test_damaged_files_say_so(tmp_path, cut):
    path = as_trained(tmp_path / "model.pth.tar", torch.randn(4, 8))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"^ctx: the checkpoint .*model.pth.tar' cannot be read"):
        load_ctx(path, 8)


def test_other_files_are_refused_by_name(tmp_path):
    class NotATensor:
        pass

    files = {
        "text": b"not a checkpoint",
        "photo": b"\xff\xd8\xff\xe0" + bytes(200),
        "pickle": pickle.dumps([1, 2, 3]),
        "words": b"I0\n.",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"ctx: the checkpoint .*{name}'"):
            load_ctx(tmp_path / name, 8)
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(ValueError, match=r"is an archive, but none of torch.save's"):
        load_ctx(tmp_path / "archive.zip", 8)
    with pytest.raises(ValueError, match=r"has no tensor state_dict\['ctx'\], but the keys \['weight'\]"):
        load_ctx(save(tmp_path / "other.pt", {"state_dict": {"weight": torch.zeros(2)}}), 8)
    with pytest.raises(ValueError, match="cannot be read"):
        load_ctx(tmp_path / "absent.pt", 8)
    with pytest.raises(ValueError, match="cannot be read"):
        load_ctx(tmp_path, 8)


def test_tensors_that_are_no_context():
    with pytest.raises(ValueError, match=r"ctx: expected finite values"):
        load_ctx(torch.full((4, 8), torch.nan), 8)
    with pytest.raises(ValueError, match=r"ctx: expected floating point"):
        load_ctx(torch.zeros(8), 8)
    with pytest.raises(ValueError, match=r"ctx: expected floating point .* with values, got torch.sparse_coo"):
        load_ctx(torch.zeros(4, 8).to_sparse(), 8)
    with pytest.raises(ValueError, match=r"ctx: expected floating point .* with values, got .* on meta"):
        load_ctx(torch.zeros(4, 8, device="meta"), 8)
    with pytest.raises(TypeError, match=r"ctx: expected a tensor or the path"):
        load_ctx(3, 8)
