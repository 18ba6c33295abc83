"""``Tuner.memory()`` against what the allocator says, and what is taken for free."""

import models
import open_clip
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tpt_fast import TuneConfig, Tuner, _machine
from tpt_fast.memory import graph_tensors, measure
from tpt_fast.models import products
from tpt_fast.text import TextEncoder, packed
from tpt_fast.text import memory as text_memory

NAMES = [f"thing number {i}" for i in range(50)]


@pytest.fixture(scope="module")
def model():
    return models.clip(text={"vocab_size": 1000})


def tokenizer(texts):
    """Words of one token each, in a small vocabulary."""
    ids = torch.zeros(len(texts), 77, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        words = [1 + sum(map(ord, word)) % 900 for word in text.removesuffix(".").split()]
        row[: len(words) + 3] = torch.tensor([998, *words, 950, 999])
    return ids


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("engine", "bound"), [("packed", 0.01), ("module", 0.1)])
def test_equals_what_the_allocator_gave(model, engine, precision, bound):
    config = TuneConfig(engine=engine, precision=precision)
    Tuner(model, NAMES, config, tokenizer=tokenizer)  # whatever is loaded once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        tuner = Tuner(model, NAMES, config, tokenizer=tokenizer)
    allocated = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
    memory = tuner.memory()
    assert memory.own == pytest.approx(allocated, rel=bound)
    assert memory["kept activations"].own > memory["prompts"].own > 0


def test_own_and_shared(model, monkeypatch):
    monkeypatch.setattr(products, "own_is_faster", lambda dtype: False)
    full, half = (Tuner(model, NAMES, TuneConfig(precision=p), tokenizer=tokenizer).memory() for p in ("fp32", "bf16"))
    visual = sum(p.numel() for p in model.visual.parameters())
    blocks = sum(p.numel() for p in model.transformer.parameters())
    assert full["image tower"].shared >= 0.9 * 4 * visual
    assert full["image tower"].own < 0.1 * 4 * visual
    assert half["image tower"].own == pytest.approx(2 * visual, rel=0.1)
    assert half["image tower"].shared < 0.1 * 4 * visual
    assert full["text tower"].shared > 4 * blocks
    assert full["kept activations"].shared == 0
    assert half["kept activations"].own < 0.6 * full["kept activations"].own


def test_weights_laid_out_for_our_own_product_count(model, monkeypatch):
    monkeypatch.setattr(products, "own_is_faster", lambda dtype: False)
    before = Tuner(model, NAMES, TuneConfig(precision="bf16"), tokenizer=tokenizer).memory()
    monkeypatch.setattr(products, "own_is_faster", lambda dtype: True)
    memory = Tuner(model, NAMES, tokenizer=tokenizer).memory()
    for part, copies, tower in (("image tower", 1, model.visual), ("text tower", 2, model.transformer)):
        size = 4 * sum(p.numel() for p in tower.parameters() if p.ndim > 1)
        assert memory[part].own > 0.9 * copies * size
        assert memory[part].shared > before[part].shared
        assert "our own product" in memory[part].why
        assert "our own product" not in before[part].why


@pytest.mark.parametrize(("every", "laid_out"), [(5, True), (1, False)])
def test_a_thousand_classes_leave_no_room_for_weights_laid_out(monkeypatch, every, laid_out):
    """On the CPU the text tower of ViT-B/16 stays under 1.5 GB, of which working memory takes up to 0.3."""
    monkeypatch.setattr(products, "own_is_faster", lambda dtype: True)
    config = open_clip.get_model_config("ViT-B-16")
    vision = config["vision_cfg"] | {"layers": 1, "width": 64}
    model = open_clip.model.CLIP(config["embed_dim"], vision, config["text_cfg"])
    text = TextEncoder(model, open_clip.zero_shot_metadata.IMAGENET_CLASSNAMES[::every])
    assert text.laid_out == laid_out
    held = measure(model, {"tower": ("", text.weights())}).own
    assert text.describe()["kept_bytes"] + held < 1.2e9


@pytest.mark.parametrize(("room", "times"), [(0, [5, 5]), (1 << 30, [0, 0])])
def test_with_many_classes_each_chunk_gives_back_what_it_freed(model, monkeypatch, room, times):
    """What it keeps would else cut the heap into holes that stay, with 1000 classes hundreds of MB of them."""
    given_back = []
    monkeypatch.setattr(packed, "give_back", lambda: given_back.append(1))
    monkeypatch.setattr(packed, "KEPT_BESIDE_LAYOUT", room)
    monkeypatch.setitem(text_memory.ROWS_AT_ONCE, "cpu", 50)
    text = TextEncoder(model, NAMES, tokenizer=tokenizer)
    assert text.describe()["chunks"] == 5
    features, tape = text.initial()
    forward = len(given_back)
    text.backward(tape, torch.ones_like(features))
    assert [forward, len(given_back) - forward] == times


def test_a_storage_counts_once(model):
    a = torch.zeros(100)
    memory = measure(model, {"one": ("", [a, a[:5]]), "two": ("", [a, torch.zeros(7)])})
    assert [(held.own, held.shared) for held in memory.values()] == [(400, 0), (28, 0)]
    memory = measure(model, {"theirs": ("", [model.positional_embedding[:3]])})
    assert (memory.own, memory.shared) == (0, 4 * model.positional_embedding.numel())


def test_a_graph_counts_what_it_saved():
    result = torch.ones(1000, requires_grad=True).exp().sin()
    assert (
        len({t.untyped_storage().data_ptr() for t in graph_tensors([result])}) == 3
    )  # exp(x), and x, which nobody else knows


def test_table(model):
    text = str(Tuner(model, NAMES, tokenizer=tokenizer).memory())
    assert "kept activations" in text
    assert len({len(line.split(" MB")[0]) for line in text.splitlines()[1:]}) == 1  # columns
    assert text.splitlines()[-1].startswith("total")


def test_files_that_a_container_has_read_count_as_free(tmp_path, monkeypatch):
    monkeypatch.setattr(_machine, "_CGROUP", tmp_path)
    cpu, whole = torch.device("cpu"), _machine.free_bytes(torch.device("cpu"))
    (tmp_path / "memory.max").write_text("max\n")
    assert _machine.free_bytes(cpu) == pytest.approx(whole, rel=0.2)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("990000\n")
    (tmp_path / "memory.stat").write_text("anon 90000\ninactive_file 800000\nactive_file 100000\n")
    assert _machine.free_bytes(cpu) == 810_000
