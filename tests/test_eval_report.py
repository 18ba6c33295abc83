"""The report in HTML: what it says, that names cannot break out of it, and that it needs nothing else."""

import base64
import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch
from eval_sets import Photos
from PIL import Image

from tpt_fast import TuneConfig
from tpt_fast.evaluation import rows
from tpt_fast.evaluation.folder import note_down, set_folder
from tpt_fast.evaluation.gallery import _data_url, changed
from tpt_fast.evaluation.page import reliability, write_page
from tpt_fast.evaluation.report import report
from tpt_fast.evaluation.several import methods_of
from tpt_fast.models.preprocessing import Preprocessing

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}"
N = 8


@pytest.fixture
def out(tmp_path):
    """Rows as a run would leave them: of eight images tpt corrects 0, spoils 1, and changes 2 from wrong to wrong."""
    images = Photos(N, broken=(7,), name=EVIL, classnames=tuple(f"{EVIL} {i}" for i in range(9)))
    images.id = lambda i: f"{EVIL}-{i}.jpg"
    config, folder = TuneConfig(method="tpt", n_views=4, rho=0.5), set_folder(tmp_path, images.name)
    prepared = Preprocessing(64, (0.5,) * 3, (0.3,) * 3)._asdict()
    note_down(folder, images, config, methods_of(config), {"weights": "0", "preprocessing": prepared})
    predictions = {"zero_shot": [1, 1, 0, 3, 4, 5, 6], "tpt": [0, 2, 3, 3, 4, 5, 6]}
    writer = rows.RowWriter(folder / "rows", {"device": "cpu"})
    for method, said in predictions.items():
        for i, prediction in enumerate([*said, -1]):
            failed = prediction < 0
            writer.add(
                {
                    "image": i,
                    "id": images.id(i),
                    "seed": 0,
                    "method": method,
                    "label": i,
                    "prediction": prediction,
                    "confidence": float("nan") if failed else 0.5 + i / 20,
                    "label_prob": 0.1,
                    "rank": -1 if failed else 0 if prediction == i else 3,
                    "entropy_before": 1.5,
                    "entropy_after": 1.25,
                    "status": "failed" if failed else "tuned",
                    "error": EVIL if failed else None,
                    "seconds": 0.25,
                    "kept": False,
                    "entropies": [0.1, 2.0, 0.4, 1.0] if method == "tpt" and i < 3 else None,
                    "selected": [0, 2] if method == "tpt" and i < 3 else None,
                }
            )
    writer.write(peak_bytes=123_000_000)
    return tmp_path, images


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page_of(out, images):
    found = report(out)
    write_page(found, out / "report.html", lambda _: images)
    text = (out / "report.html").read_text("utf-8")
    return found, text, Page(text)


def test_the_page_is_whole_and_names_are_text(out):
    (found,), text, page = page_of(*out)
    assert "<script" not in text
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "link", "object", "form"})
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        assert attrs.get("src", "data:image/jpeg;").startswith("data:image/jpeg;")
    assert not re.search(r"https?:", text)
    assert page.text.count(f"{EVIL}-0.jpg") == 1
    assert "49" not in re.findall(r"\{\{ 7 \* 7 \}\}|(?<!\d)49(?!\d)", page.text)  # names are no templates either
    assert "prefers-color-scheme: dark" in text
    assert found.errors == {f"{EVIL}-7.jpg": EVIL}
    assert EVIL in page.text


def test_the_tables_numbers(out):
    (found,), _, page = page_of(*out)
    zero_shot, tpt = found.methods
    assert (zero_shot.label, tpt.label) == ("zero_shot", "tpt")
    assert tpt.images == 7
    assert tpt.failed == 1
    assert tpt.mean["top1"] == pytest.approx(5 / 7)
    assert tpt.against_zero_shot.gained == tpt.against_zero_shot.lost == 1
    assert found.peak_bytes == 123_000_000
    assert tpt.seconds == pytest.approx(0.25)
    assert "71.43" in page.text
    assert "no paper has this set" in page.text


def test_the_gallery(out):
    (found,), _, page = page_of(*out)
    cards = list(changed(found, "tpt", out[1]))
    assert [(card.kind, card.id[-5]) for card in cards] == [("corrected", "0"), ("spoilt", "1"), ("still wrong", "2")]
    assert all(card.plain.startswith("data:image/jpeg;base64,") for card in cards)
    assert [entropy for _, entropy in cards[0].views] == pytest.approx([0.1, 0.4])
    assert cards[0].order == [0, 2, 3, 1]
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 3 * (1 + 2)
    assert "1.500 → 1.250" in page.text


def test_pictures_of_rectangular_models_are_not_stretched(out):
    encoded = _data_url(torch.rand(3, 144, 96), 72).partition(",")[2]
    assert Image.open(BytesIO(base64.b64decode(encoded))).size == (48, 72)
    _, text, _ = page_of(*out)  # which gives all of them the same room
    assert re.search(r"\.card img \{[^}]*object-fit: contain", text)


def test_without_images_it_says_why(out):
    _, _, page = page_of(out[0], f"gone {EVIL}")
    assert f"No pictures: gone {EVIL}" in page.text
    assert not [tag for tag, _ in page.tags if tag == "img"]


def test_the_reliability_diagram():
    nan = float("nan")
    found = reliability({"images": [0, 2, 4, 0], "accuracy": [nan, 0.5, 1.0, nan], "confidence": [nan, 0.3, 0.7, nan]})
    assert found["width"] == 50
    flat = [number for bar in found["bars"] for number in bar]
    assert flat == pytest.approx([50, 100, 100, 140, 0.625, 2, 100, 0, 200, 60, 1.0, 4])


def test_rows_of_two_writers_count_once(out):
    folder = set_folder(out[0], EVIL) / "rows"
    before = rows.read(folder, "tpt", 0)
    part = rows.parts(folder)[0]
    (folder / "part-ffff.parquet").write_bytes(part.read_bytes())
    after = rows.read(folder, "tpt", 0)
    for a, b in zip(before, after):
        assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    assert rows.write_merged(folder, out[0] / "all.parquet") == 2 * N
    assert [len(table) for table in rows.merged(folder)] == [N, N]
