"""Sets that are tables, tars or small images; and that a million rows fit."""

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from image_sets import JPEG, jpeg, write

from tpt_fast import demo
from tpt_fast.evaluation import small
from tpt_fast.evaluation.sets import open_set
from tpt_fast.evaluation.strings import Strings
from tpt_fast.views.decode import load_image


def labels_of(images):
    return {images.id(i): images.classnames[images.label(i)] for i in range(len(images))}


# --- tables


@pytest.fixture
def table(tmp_path):
    """Writes a table of three images, of which the labels are given, in one of both forms."""
    for i, name in enumerate(("a.jpg", "b.jpg", "deep/c.jpg")):
        write(tmp_path / "photos" / name, jpeg(50 * i))

    def make(labels, form="csv", paths=("a.jpg", "b.jpg", "deep/c.jpg"), name="rows"):
        file = tmp_path / "photos" / f"{name}.{form}"
        if form == "csv":
            return write(file, "other,path,label\n" + "".join(f"x,{p},{label}\n" for p, label in zip(paths, labels)))
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"label": labels, "other": ["x"] * len(labels), "path": paths}), file)
        return file

    return make


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_labels_are_names(form, table):
    images = open_set(table(["dog", "cat", "dog"], form))
    assert images.classnames == ("cat", "dog")
    assert labels_of(images) == {"a.jpg": "dog", "b.jpg": "cat", "deep/c.jpg": "dog"}
    assert (images.name, images.templates) == ("rows", ("a photo of a {}.",))
    assert [int(load_image(images.image(i)).float().mean()) for i in range(3)] == [0, 50, 100]
    images = open_set(table(["dog", "cat", "dog"], form), classnames=["wolf", "dog", "cat"])
    assert images.labels.tolist() == [1, 2, 1]


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_labels_are_places(form, table):
    file = table([2, 0, 1], form)
    with pytest.raises(
        ValueError, match=r"rows.* has places of classes \(0, 1, 2\) and no names: give classnames, or "
    ):
        open_set(file)
    assert labels_of(open_set(file, classnames=list("xyz"))) == {"a.jpg": "z", "b.jpg": "x", "deep/c.jpg": "y"}
    write(file.with_name("classnames.txt"), "u\nv\nw\n")
    assert labels_of(open_set(file)) == {"a.jpg": "w", "b.jpg": "u", "deep/c.jpg": "v"}


def test_names_that_datasets_keep(table):
    """Hugging Face's library, in the metadata of the file."""
    import pyarrow.parquet as pq

    file = table([1, 0, 1], "parquet")
    feature = {"names": ["negative", "positive"], "_type": "ClassLabel"}
    described = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
    pq.write_table(pq.read_table(file).replace_schema_metadata(described), file)
    assert labels_of(open_set(file)) == {"a.jpg": "positive", "b.jpg": "negative", "deep/c.jpg": "positive"}


@pytest.mark.parametrize(
    ("labels", "classnames", "message"),
    [
        (
            ["cat", "1", "dog"],
            None,
            "^label: expected places of classes or their names, not both, in .*; got '1' and 'cat'",
        ),
        (["1", "2", "2"], ["1", "2", "3"], "^label: '1' in .* may be the place of a class or one of the names"),
        (["1", "2", "2"], ["a", "b"], "^label: expected 0 to 1, got 1 to 2 in .*; do they begin at 1?"),
        (["0", "-1", "1"], ["a", "b"], "^label: expected 0 to 1, got -1 to 1 in "),
        (["cat", "cow", "dog"], ["cat", "dog"], "^label: 1 in .* are none of the class names: cow"),
        (
            ["cat", "cat", "dog"],
            ["cat", "dog", "cat"],
            "^label: two classes have the name 'cat': write places of classes",
        ),
        (["cat", "", "dog"], None, "row 2 has no label"),
        (["cat"] * 3, ["cat", " "], "^classnames: expected names, none of them empty"),
        (["cat"] * 3, "cat", "^classnames: expected names"),
    ],
)
def test_labels_that_are_refused(labels, classnames, message, table):
    with pytest.raises(ValueError, match=message):
        open_set(table(labels), classnames=classnames)


def test_rows_that_are_refused(table, tmp_path):
    with pytest.raises(ValueError, match=r"^rows: rows 0 and 2 are both 'a.jpg'"):
        open_set(table("xyz", paths=("a.jpg", "b.jpg", "a.jpg")))
    with pytest.raises(
        FileNotFoundError, match=r"^rows: 4 of 5 images are not in .*photos: 1.jpg, 2.jpg, 3.jpg and 1 more"
    ):
        open_set(table("xyxyx", paths=("a.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg")))
    with pytest.raises(ValueError, match=r"has no rows"):
        open_set(table("", paths=()))
    for header, message in {
        "file,label": "expected one column 'path', got file, label",
        "path": "expected one column 'label', got path",
        "": "expected one column 'path', got none",
        "image,label": "expected one column 'path', got image, label: images within a Parquet file cannot be read",
        "path,path,label": "expected one column 'path', got path, path, label",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_set(write(tmp_path / "other.csv", header + "\n"))
    with pytest.raises(ValueError, match=r"row 2 has 1 columns, expected 2"):
        open_set(write(tmp_path / "photos" / "other.csv", "path,label\na.jpg,1\nb.jpg\n"))


def test_paths_begin_at_the_root(table, tmp_path):
    inside, elsewhere = tmp_path / "photos" / "a.jpg", write(tmp_path / "outside.jpg")
    images = open_set(table("xy", paths=(inside, "b.jpg")), tmp_path / "photos")
    assert ([*images.ids], images.notes) == (["a.jpg", "b.jpg"], ())
    images = open_set(table("xy", paths=(elsewhere, "b.jpg")))
    assert [*images.ids] == [str(elsewhere), "b.jpg"]
    assert images.notes[0].endswith("ids of such rows are of this machine")
    assert [*open_set(table("x", paths=("photos/b.jpg",)), tmp_path).ids] == ["photos/b.jpg"]


def test_without_pyarrow(table, monkeypatch):
    file = table("xyz", "parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"reading Parquet needs pyarrow: pip install 'tpt_fast\[parquet\]'"):
        open_set(file)


# --- tars


def make_tar(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path):
    """As CLIP_benchmark writes them; the tenth tar comes after the ninth."""
    folder = tmp_path / "wds_small"
    for n in (0, 9, 10):
        members = [
            (f"s{n}{i}.{end}", part) for i in range(2) for end, part in (("cls", b"%d" % i), ("jpg", jpeg(n + i)))
        ]
        make_tar(folder / "test" / f"{n}.tar", members)
    write(folder / "test" / "nshards.txt", "3")
    write(folder / "classnames.txt", "cat\ndog\n")
    write(folder / "zeroshot_classification_templates.txt", "a photo of a {c}")
    return folder


@pytest.mark.parametrize("where", [".", "test"])
def test_tars(where, shards):
    images = open_set(shards / where)
    assert [*images.ids] == [f"{n}.tar/s{n}{i}.jpg" for n in (0, 9, 10) for i in range(2)]
    assert (images.classnames, images.labels.tolist()) == (("cat", "dog"), [0, 1] * 3)
    assert [images.image(i) for i in range(6)] == [jpeg(n + i) for n in (0, 9, 10) for i in range(2)]
    assert images.name == ("wds_small" if where == "." else "wds_small-test")
    assert len(open_set(shards / "test" / "9.tar")) == 2


def test_tars_beside_folders(tmp_path):
    """Archives that have been unpacked where they are."""
    for name in ("cat", "dog"):
        write(tmp_path / "set" / name / "1.jpg")
    write(tmp_path / "set" / "cat.tar", b"")
    with pytest.raises(
        ValueError, match=r"has tars \(cat.tar\) and folders \(cat, dog\): name a tar, or .* imagefolder:"
    ):
        open_set(tmp_path / "set")
    assert open_set(f"imagefolder:{tmp_path / 'set'}").classnames == ("cat", "dog")


def test_tars_that_are_refused(shards):
    (shards / "test" / "9.tar").unlink()
    with pytest.raises(ValueError, match=r"expected 3 tars, as nshards.txt says, found 2"):
        open_set(shards)
    for members, message in (
        ([("a.jpg", JPEG)], r"1 images have no label \(KEY.cls\): a.jpg"),
        ([("a.cls", b"0")], "1 labels have no image: a.cls"),
        ([("a.jpg", JPEG), ("a.png", JPEG)], "a.jpg and a.png are images of one key"),
        ([("a.jpg", JPEG), ("a.cls", b"2")], "^label: expected 0 to 1, got 2 to 2"),
        ([("a.txt", b"")], "no images in "),
    ):
        with pytest.raises(ValueError, match=message):
            open_set(make_tar(shards / "test" / "9.tar", members))
    with pytest.raises(ValueError, match=r"is no tar that can be read in place .*; unpack what is compressed"):
        open_set(make_tar(shards / "test" / "9.tar", [("a.jpg", JPEG)], "w:gz"))


# --- small images


def test_cifar(tmp_path, monkeypatch):
    from torchvision import datasets

    class Cifar:
        def __init__(self, root, train):
            assert not train
            self.data, self.targets = np.zeros((10_000, 2, 2, 3), np.uint8), [i % 10 for i in range(10_000)]
            self.data[7] = 9
            self.classes = [f"class {i}" for i in range(10)]

    with pytest.raises(FileNotFoundError, match=r"^cifar10: torchvision finds none in "):
        open_set("cifar10", tmp_path)
    monkeypatch.setattr(datasets, "CIFAR10", Cifar)
    images = open_set("CIFAR-10", tmp_path)
    assert (images.id(7), images.label(7), len(images)) == ("test/00007", 7, 10_000)
    assert load_image(images.image(7)).unique().tolist() == [9]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """tiny-imagenet-200 with one validation image of each class."""
    others = [f"n{i:08}" for i in range(100)]
    wnids = sorted([*demo.WNIDS, *others])
    folder = tmp_path / "tiny-imagenet-200"
    write(folder / "wnids.txt", "\n".join(reversed(wnids)))
    write(folder / "words.txt", "".join(f"{wnid}\tname of {wnid}, synonym\n" for wnid in wnids))
    lines = [f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n" for i, wnid in enumerate(wnids)]
    write(folder / "val" / "val_annotations.txt", "".join(lines))
    for i in range(200):
        write(folder / "val" / "images" / f"val_{i}.JPEG")
    monkeypatch.setattr(small, "_TINY_VALIDATION", 200)
    return folder, wnids


@pytest.mark.parametrize("level", [".", ".."])
def test_tiny_imagenet(level, tiny):
    folder, wnids = tiny
    images = open_set("tiny-imagenet", folder / level)
    assert [images.classnames[images.label(i)] for i in range(200)] == [f"name of {wnid}" for wnid in wnids]
    images = open_set("tiny-imagenet-demo", folder / level)
    assert images.classnames == demo.CLASSNAMES
    assert labels_of(images) == {
        f"val/images/val_{wnids.index(wnid)}.JPEG": name for wnid, name in zip(demo.WNIDS, demo.CLASSNAMES)
    }
    (folder / "val" / "images" / "val_199.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 200 images are not in .*: val_199.JPEG"):
        open_set("tiny-imagenet", folder)


def test_tiny_imagenet_packed(tmp_path, tiny, monkeypatch):
    _, wnids = tiny
    files = [jpeg(i) for i in range(200)]
    labels = np.random.default_rng(0).permutation(200)
    np.savez(
        tmp_path / "tiny_imagenet_val.npz",
        webp=np.frombuffer(b"".join(files), np.uint8),
        offsets=np.cumsum([0, *map(len, files)]),
        labels=labels,
        wnids=np.array(wnids),
        classnames=np.array([f"name {i}" for i in range(200)]),
    )
    (tmp_path / "tiny-imagenet-200" / "wnids.txt").unlink()
    with pytest.raises(ValueError, match=r"expected 5,000 images, found 200"):
        open_set("tiny-imagenet", tmp_path)
    monkeypatch.setattr(small, "_TINY_PACKED", 200)
    images = open_set("tiny-imagenet", tmp_path)
    assert (images.name, images.labels.tolist()) == ("tiny-imagenet-packed", labels.tolist())
    assert images.image(3) == files[3]
    images = open_set("tiny-imagenet-demo", tmp_path)
    assert len(images) == 100
    for i in (0, 50, 99):
        at = int(images.id(i).partition(".")[0])
        assert images.classnames[images.label(i)] == demo.CLASSNAMES[demo.WNIDS.index(wnids[labels[at]])]
        assert images.image(i) == files[at]


# --- size


def test_strings():
    strings = Strings(["", "a", "ü/\udcff", "b"])  # the third is a file name that is no UTF-8
    assert [*strings] == ["", "a", "ü/\udcff", "b"]
    assert (len(strings), strings[-1], strings.first_repeat()) == (4, "b", None)
    strings.append("a")
    assert strings.first_repeat() == (1, 4)
    with pytest.raises(IndexError):
        strings[5]


@pytest.mark.slow
def test_a_million_rows(tmp_path):
    """In a fresh process, for the peak of one that has had more before says nothing."""
    code = f"""
import os
from tpt_fast.evaluation.sets import open_set
peak = lambda: next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
here = {str(tmp_path)!r},
os.stat = lambda path, *rest, stat=os.stat, **more: stat(*here if str(path).endswith(".jpg") else (path, *rest), **more)
with open({str(tmp_path / "rows.csv")!r}, "w") as file:
    file.write("path,label\\n")
    for i in range(1_000_000):
        file.write(f"some/folders/{{i % 1000:04}}/image_{{i:08}}.jpg,class {{i % 1000}}\\n")
images = open_set({str(tmp_path / "rows.csv")!r})
images.digest
assert len(images) == 1_000_000 and images.id(999_999).endswith("00999999.jpg")
print(before, peak())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, peak = map(float, done.stdout.split())
    assert peak - before < 250, (before, peak)
