"""Models of other libraries than open_clip on the command line and in docs/models.md."""

import re
import sys
import types
from pathlib import Path

import models
import openai_layout
import pytest
import torch
import transformers
from command_line import CAT, FEW, one_demo_model, plain_terminal, rows, run, said  # noqa: F401

from tpt_fast import TuneConfig, Tuner

NAMES = ["cat", "golden retriever"]


@pytest.fixture(scope="module")
def processor():
    return transformers.CLIPProcessor(models.images(), models.transformers_tokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor):
    folder = tmp_path_factory.mktemp("models") / "small"
    models.of_transformers().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_folder_of_transformers(folder, processor):
    (row,) = rows(run("tune", CAT, "--model", f"hf:{folder}", "--classes", ",".join(NAMES), *FEW, "--json"))
    want = Tuner(models.of_transformers(), NAMES, TuneConfig(n_views=6, rho=0.4), tokenizer=processor)(CAT)
    assert row["label"] == want.label
    assert row["top"][0]["prob"] == pytest.approx(float(want.probs.max()), abs=1e-4)
    (report,) = rows(run("doctor", "--json", "--model", f"hf:{folder}"))
    assert report["found"][f"hf:{folder}"] == {"text": "packed", "image": "vit"}


def test_a_file_that_holds_no_weights(tmp_path):
    given = ("tune", CAT, "--classes", "a,b", "--model", "ViT-B-32", "--pretrained")
    assert f"{CAT} holds no weights of ViT-B-32: it is no checkpoint" in said(run(*given, CAT, code=2))
    file = tmp_path / "other.pt"
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, file)
    assert f"{file} holds no weights of ViT-B-32: Error(s) in loading" in said(run(*given, file, code=2))


def test_a_device_that_is_none():
    assert "expected cpu, cuda or cuda:N of a GPU that is there, got 'potato'" in said(
        run("tune", CAT, "--device", "potato", code=2)
    )


def test_what_is_wrong_with_one(folder, tmp_path):
    given = ("tune", CAT, "--classes", "a,b", "--model")
    assert "comes with its weights" in said(run(*given, f"hf:{folder}", "--pretrained", "openai", code=2))
    assert "cannot be loaded" in said(run(*given, f"hf:{tmp_path}/nothing", code=3))
    models.of_transformers({"vocab_size": 1000}).save_pretrained(tmp_path)
    assert "expected the tokenizer or processor" in said(run(*given, f"hf:{tmp_path}", code=2))


def test_documented(folder, monkeypatch):
    package = types.ModuleType("clip")
    package.load = lambda name, device: (openai_layout.make(), None)
    monkeypatch.setitem(sys.modules, "clip", package)
    page = Path(__file__).resolve().parent.parent / "docs" / "models.md"
    if not page.is_file():
        pytest.skip("there is no documentation here")
    codes = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)
    assert codes
    for code in codes:
        exec(code, {"FOLDER": folder, "PHOTO": CAT})
