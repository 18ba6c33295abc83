"""What ends a run at 0 %, each refused before the first image, or said (DATASETS, traps 1 to 7 and 10)."""

import json
import os
import re
import shutil

import pytest
from image_sets import as_small, make_fine, make_kin, rows_of, split_file, write

from tpt_fast.evaluation.sets import open_set


@pytest.fixture
def dtd(tmp_path, monkeypatch):
    """A root with four images of two classes, and CoOp's file."""
    as_small(monkeypatch, "dtd", rows_of("dtd"))
    make_fine("dtd", tmp_path, "dtd/images")
    return tmp_path


@pytest.fixture
def adversarial(tmp_path, monkeypatch):
    """A root with an image of each class of ImageNet-A."""
    as_small(monkeypatch, "imagenet_a")
    make_kin("imagenet_a", tmp_path / "imagenet-a")
    return tmp_path


def refused(kind, message, *arguments, **options):
    with pytest.raises(kind, match=message):
        open_set(*arguments, **options)


# --- 1. counts


def test_an_image_too_many(adversarial):
    write(adversarial / "imagenet-a" / "n01498041" / "second.jpg")
    refused(
        ValueError, "^imagenet_a: expected 200 images, found 201 in .*imagenet-a; with subset=True", "A", adversarial
    )


def test_classes_are_compared_by_name(adversarial):
    """Two are missing and two others there: the count holds."""
    folder = adversarial / "imagenet-a"
    os.rename(folder / "n01498041", folder / "n01440764")
    os.rename(folder / "n12267677", folder / "flowers")
    message = (
        r"^imagenet_a: expected 200 classes, found 200 in .*imagenet-a; "
        "missing: n01498041, n12267677; surplus: flowers, n01440764$"
    )
    refused(ValueError, message, "A", adversarial)


def test_five_classes_are_listed(adversarial):
    for wnid in sorted(os.listdir(adversarial / "imagenet-a"))[1:8]:
        shutil.rmtree(adversarial / "imagenet-a" / wnid)
    message = "expected 200 classes, found 193 in .*; missing: n0\\d{7}(, n0\\d{7}){4} and 2 more$"
    refused(ValueError, message, "A", adversarial)


def test_a_class_without_images(adversarial):
    (adversarial / "imagenet-a" / "n01498041" / "n01498041_0.JPEG").unlink()
    refused(ValueError, "no images in 1 class folders of .*: n01498041$", "A", adversarial)


def test_a_split_of_another_size(dtd, monkeypatch):
    as_small(monkeypatch, "dtd", rows_of("dtd"), images=5)
    refused(ValueError, "^dtd: expected 5 images, found 4 in .*split_zhou_DescribableTextures.json", "dtd", dtd)


def test_a_subset_is_another_set(adversarial, dtd):
    for wnid in sorted(os.listdir(adversarial / "imagenet-a"))[4:]:  # README.txt and three
        shutil.rmtree(adversarial / "imagenet-a" / wnid)
    images = open_set("A", adversarial, subset=True)
    assert (images.name, len(images), len(images.classnames)) == ("imagenet_a-subset", 3, 200)
    assert "a subset: 3 of 200 images; no published figure is of it" in images.notes
    (dtd / "dtd" / "images" / "banded" / "banded_7.jpg").unlink()
    images = open_set("dtd", dtd, subset=True)
    assert (images.name, len(images)) == ("dtd-subset", 3)
    (adversarial / "imagenet-a" / "flowers").mkdir()
    refused(ValueError, "surplus: flowers$", "A", adversarial, subset=True)


# --- 2. the numbers of ImageNet-V2


def test_a_number_beyond_the_classes(tmp_path, monkeypatch):
    as_small(monkeypatch, "imagenet_v2")
    folder = tmp_path / "imagenetv2-matched-frequency-format-val"
    make_kin("imagenet_v2", folder)
    images = open_set("V", tmp_path)  # by number, and not by the rank of "10" among strings
    assert {images.id(i).split("/")[0]: images.label(i) for i in range(1000)} == {str(i): i for i in range(1000)}
    os.rename(folder / "0", folder / "1000")
    refused(ValueError, "expected 1,000 classes, found 1,000 in .*; missing: 0; surplus: 1000$", "V", tmp_path)


# --- 3. a root one level off


def test_a_root_too_high(adversarial):
    os.rename(adversarial / "imagenet-a", adversarial / "sets-imagenet-a")
    (adversarial / "archives").mkdir()
    images = open_set("A", adversarial)
    assert images.notes[0].startswith("root is a level off: imagenet_a is in ")
    assert images.id(0) == "n01498041/n01498041_0.JPEG"


def test_a_root_too_high_of_a_layout(tmp_path, monkeypatch):
    as_small(monkeypatch, "dtd", rows_of("dtd"))
    top = make_fine("dtd", tmp_path / "datasets", "dtd/images")
    images = open_set("dtd", tmp_path, splits=top)
    assert images.notes[0].startswith(f"root is a level off: dtd is in {top}/images")


@pytest.mark.parametrize("root", ["dtd", "dtd/images"])
def test_a_root_too_low(root, dtd):
    images = open_set("dtd", dtd / root)
    assert images.notes[0] == f"root is a level off: dtd is in {dtd}/dtd/images, expected DTD/images below {dtd}/{root}"
    assert images.id(0) == "banded/banded_7.jpg"


def test_a_root_that_is_the_set(adversarial):
    assert open_set("A", adversarial / "imagenet-a").notes[0].startswith("root is a level off")


def test_a_folder_of_one_class_is_no_flat_imagenet(tmp_path, monkeypatch):
    """The root is the set, but for most of its classes."""
    as_small(monkeypatch, "imagenet")
    make_kin("imagenet", tmp_path / "val")
    for wnid in sorted(os.listdir(tmp_path / "val"))[401:]:
        shutil.rmtree(tmp_path / "val" / wnid)
    refused(FileNotFoundError, "^imagenet: expected 1,000 folders of WordNet ids ", "I", tmp_path / "val")


def test_two_places(adversarial):
    shutil.copytree(adversarial / "imagenet-a", adversarial / "other")
    os.rename(adversarial / "imagenet-a", adversarial / "one")
    message = "^imagenet_a: 200 folders of WordNet ids .* may be in any of .*one, .*other; expected one of imagenet-a, "
    refused(ValueError, message, "A", adversarial)


def test_another_set_is_not_taken_for_it(tmp_path, monkeypatch):
    """R has 86 of A's classes, and ImageNet all of them."""
    as_small(monkeypatch, "imagenet_a")
    make_kin("imagenet_r", tmp_path / "some" / "r")
    make_kin("imagenet", tmp_path / "some" / "val")
    refused(FileNotFoundError, "^imagenet_a: expected 200 folders of WordNet ids", "A", tmp_path / "some")


def test_nothing_there(tmp_path):
    places = "ImageNet/val, imagenet/images/val, imagenet2012/val, ILSVRC/Data/CLS-LOC/val"
    refused(FileNotFoundError, f"^imagenet: expected 1,000 folders .* in one of {places} below", "I", tmp_path)
    refused(FileNotFoundError, "^root: expected a folder, got .*, which is nothing", "I", tmp_path / "absent")
    refused(ValueError, "^root: expected the folder that has imagenet, got None", "I")
    refused(
        ValueError, "^name: expected the path of a folder, .* or one of imagenet, imagenet_a, ", "imagenett", tmp_path
    )


def test_images_that_are_not_there_beside_a_split(dtd):
    shutil.rmtree(dtd / "dtd" / "images")
    message = "^dtd: expected the images .banded/banded_7.jpg, blotchy/blotchy_7.jpg and 2 more. in one of DTD/images, "
    refused(FileNotFoundError, message, "dtd", dtd)


# --- 4. folders whose rank is taken for the class


@pytest.fixture
def animals(tmp_path):
    for name in ("cat", "dog", "fire_salamander"):
        write(tmp_path / "animals" / name / "1.jpg")
    return tmp_path / "animals"


def test_a_missing_class_would_shift_the_others(animals):
    names = ["fire salamander", "cat", "bird", "dog"]
    message = "^animals: expected 4 classes, found 3 in .*; missing: bird$"
    refused(ValueError, message, animals, classnames=names)
    write(animals / "bird" / "x.png")
    images = open_set(animals, classnames=names)
    assert images.classnames == tuple(names)
    assert {images.id(i): images.label(i) for i in range(4)} == {
        "cat/1.jpg": 1, "dog/1.jpg": 3, "fire_salamander/1.jpg": 0, "bird/x.png": 2,
    }  # fmt: skip


def test_numbers_are_no_names(tmp_path):
    for i in range(11):
        write(tmp_path / "numbers" / str(i) / "1.jpg")
    refused(ValueError, r"^numbers: the folders of .* are numbers \(0, 1, 10 and 8 more\)", tmp_path / "numbers")
    images = open_set(tmp_path / "numbers", classnames=[f"name {i}" for i in range(11)])
    assert {images.id(i): images.label(i) for i in range(11)} == {f"{i}/1.jpg": i for i in range(11)}
    message = "^numbers: expected 12 classes, found 11 in .*; missing: 11$"
    refused(ValueError, message, tmp_path / "numbers", classnames=[f"name {i}" for i in range(12)])


def test_an_empty_class(animals):
    (animals / "bird").mkdir()
    refused(ValueError, "^animals: no images in 1 class folders of .*: bird$", f"imagefolder:{animals}")


def test_parts_are_no_classes(animals):
    root = animals.parent
    for part in ("train", "val"):
        shutil.copytree(animals, root / "set" / part)
    refused(ValueError, "^set: train, val in .* are parts of a set and no classes", root / "set")
    shutil.rmtree(root / "set" / "train")
    images = open_set(root / "set")
    assert images.notes == (f"root is a level off: the class folders are in {root}/set/val",)
    assert (images.name, images.classnames) == ("set-val", ("cat", "dog", "fire_salamander"))


def test_no_class_folders(animals):
    refused(
        ValueError, "^cat: expected a folder for each class .*, found 0 folders, images directly in it", animals / "cat"
    )


def test_wordnet_ids_are_looked_up(tmp_path):
    for wnid in ("n01443537", "n02084071", "n01440764"):  # n02084071, dog, is none of ImageNet's thousand
        write(tmp_path / "fog" / "3" / wnid / "1.jpg")
    images = open_set(tmp_path / "fog" / "3")
    assert (images.name, images.classnames) == ("fog-3", ("tench", "goldfish", "dog"))


# --- 5. split files


def test_a_file_that_is_not_coops(dtd):
    """CoOp makes one itself where it finds none: a random split, of the same counts."""
    file = dtd / "dtd" / "split_zhou_DescribableTextures.json"
    rows = rows_of("dtd")
    file.write_bytes(json.dumps({"train": [], "test": rows[::-1]}, indent=1).encode())  # the same rows, written anew
    assert open_set("dtd", dtd).name == "dtd"
    rows[0] = ("banded/banded_8.jpg", *rows[0][1:])
    write(dtd / "dtd" / "images" / rows[0][0])
    file.write_bytes(split_file(rows))
    images = open_set("dtd", dtd)
    assert images.name == "dtd-other-split"
    assert images.notes[0].startswith(f"{file} is not CoOp's file: what it tests on may be other images")


def test_the_file_that_is_coops_is_taken_of_two(dtd):
    rows = [("banded/banded_8.jpg", *rows_of("dtd")[0][1:]), *rows_of("dtd")[1:]]
    write(dtd / "split_zhou_dtd.json", split_file(rows))
    assert open_set("dtd", dtd).name == "dtd"


def test_files_that_are_missing(dtd, monkeypatch):
    rows = rows_of("dtd") + [(f"banded/banded_{i}.jpg", 0, "banded") for i in range(20, 24)]
    as_small(monkeypatch, "dtd", rows)
    write(dtd / "dtd" / "split_zhou_DescribableTextures.json", split_file(rows))
    names = "banded/banded_20.jpg, banded/banded_21.jpg, banded/banded_22.jpg and 1 more"
    message = f"^dtd: 4 of 8 images are not in .*dtd/images: {names}$"
    refused(FileNotFoundError, message, "dtd", dtd)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "is no split file: expected .*train"),
        ("{}", "is no split file: .*KeyError: 'test'"),
        ('{"test": [["a.jpg", 0]]}', "is no split file: "),
        ("nothing", "is no split file: .*JSONDecodeError"),
        (split_file([["a", 0, "x"], ["b", 0, "y"]]), "calls class 0 'x' and, of b, 'y'"),
        (split_file([["a", 1, "x"], ["b", 2, "y"]]), "expected labels 0 to 1 in .*, got 1, 2"),
        (split_file([["a", 0, "x"], ["b", 1, "y"]]), r"the class names of .* are not those of CoOp's file \(x, y\)"),
        (split_file([["a", 0, "x"]]), "^dtd: expected 2 classes, found 1 in "),
    ],
)
def test_what_is_no_split_file(content, message, dtd):
    write(dtd / "dtd" / "split_zhou_DescribableTextures.json", content)
    refused(ValueError, message, "dtd", dtd)


def test_no_split_file(dtd, tmp_path, monkeypatch):
    (dtd / "dtd" / "split_zhou_DescribableTextures.json").unlink()
    message = (
        "^dtd: expected split_zhou_DescribableTextures.json .a copy is in github.com/linzhiqiu/cross_modal_adaptation "
        r".splits/.. below .* or in splits; or the data set's own test1.txt \(not found: test1.txt\)$"
    )
    refused(FileNotFoundError, message, "dtd", dtd)
    refused(FileNotFoundError, "^dtd: expected split_zhou_.*json in ", "dtd", dtd, splits=dtd)
    as_small(monkeypatch, "eurosat", rows_of("eurosat"))
    make_fine("eurosat", tmp_path, "eurosat/2750")
    (tmp_path / "eurosat" / "split_zhou_EuroSAT.json").unlink()
    refused(FileNotFoundError, "authors have published no list of test images$", "eurosat", tmp_path)


# --- 6. the authors' own test sets: other ones in test_sets.py, and one that should be the same


def test_an_official_file_that_is_not_of_the_same_images(tmp_path, monkeypatch):
    rows = rows_of("pets")
    as_small(monkeypatch, "pets", rows)
    top = make_fine("pets", tmp_path, "oxford_pets/images")
    (top / "split_zhou_OxfordPets.json").unlink()
    lines = [f"{path[:-4]} {label + 1} 1 1" for path, label, _ in rows]
    lines[0] = "Abyssinian_4 1 1 1"
    write(top / "annotations" / "test.txt", "\n".join(lines))
    message = "^pets: the images or labels of .*test.txt are not those of CoOp's file$"
    refused(ValueError, message, "pets", tmp_path)


# --- 10. names that stand twice


def test_double_names(tmp_path):
    write(tmp_path / "rows.csv", "path,label\na.jpg,0\nb.jpg,1\n")
    write(tmp_path / "classnames.txt", "missile\nmissile\ncat\n")
    for name in ("a.jpg", "b.jpg"):
        write(tmp_path / name)
    (note,) = open_set(tmp_path / "rows.csv").notes
    assert re.match("classes of one name, whose logits are equal, .*: 'missile' .0, 1.$", note)
