"""The fifteen sets: every layout in use is found and maps right. Traps are in test_sets_traps.py."""

import os
import pickle
import sys
from pathlib import Path
from types import ModuleType

import image_sets
import pytest
from image_sets import FINE, KIN, as_small, make_fine, make_kin, names_of, own_files, rows_of, write

from tpt_fast.evaluation import checks
from tpt_fast.evaluation.folders import synsets
from tpt_fast.evaluation.known import SETS, canonical
from tpt_fast.evaluation.sets import open_set
from tpt_fast.views.decode import load_image

FOLDERS = [(id, folder) for id in FINE for folder in SETS[id].folders]


def mapping(images) -> list[tuple[str, str]]:
    return [(images.id(i), images.classnames[images.label(i)]) for i in range(len(images))]


@pytest.mark.parametrize("id", KIN)
def test_imagenet_and_its_kin(id, tmp_path, monkeypatch):
    from open_clip import IMAGENET_CLASSNAMES

    thousand, known = synsets("imagenet_synsets.txt"), SETS[id]
    wnids = synsets(known.synsets)
    as_small(monkeypatch, id)
    make_kin(id, tmp_path / "made")
    place = tmp_path / "made"
    for folder in (*known.folders, known.folders[0].upper()):
        root = tmp_path / folder.replace("/", "-")
        (root / folder).parent.mkdir(parents=True)
        os.rename(place, root / folder)
        place = root / folder
        images = open_set(id, root)
        assert images.name == id
        assert [note[:7] for note in images.notes] == ["classes"] * (known.classes == 1000)  # two names stand twice
        assert len(images) == len(images.classnames) == known.classes
        for i in range(len(images)):
            inside = images.id(i).split("/")[0]
            wnid = thousand[int(inside)] if id == "imagenet_v2" else inside
            assert images.classnames[images.label(i)] == IMAGENET_CLASSNAMES[thousand.index(wnid)]
            assert wnids[images.label(i)] == wnid
        assert Path(images.image(5)) == place / images.id(5)
    assert load_image(images.image(0)).shape == (8, 8, 3)
    lower = open_set(id, place)
    assert lower.notes[0].startswith(f"root is a level off: {id} is in {place}, expected ")
    assert (lower.digest, lower.source) == (images.digest, images.source)


@pytest.mark.parametrize(("id", "folder"), FOLDERS, ids=[f"{id}-{folder}" for id, folder in FOLDERS])
def test_the_ten_in_every_layout(id, folder, tmp_path, monkeypatch):
    rows = rows_of(id)
    as_small(monkeypatch, id, rows)
    make_fine(id, tmp_path, folder)
    images = open_set(id, tmp_path)
    assert images.name == id
    assert images.notes == ()
    assert sorted(mapping(images)) == sorted((path, name) for path, _, name in rows)
    assert list(images.classnames) == names_of(rows)
    assert images.templates[0] == "a photo of a {}."
    assert images.templates[-1] == SETS[id].template
    shades = [int(load_image(images.image(i)).float().mean()) for i in range(len(images))]
    assert shades == list(range(len(images)))  # each its own file


def test_layouts_have_one_digest(tmp_path, monkeypatch):
    rows = rows_of("dtd")
    as_small(monkeypatch, "dtd", rows)
    digests = set()
    for folder in SETS["dtd"].folders:
        make_fine("dtd", tmp_path / folder, folder)
        images = open_set("DTD", tmp_path / folder)
        digests.add(images.digest)
        assert pickle.loads(pickle.dumps(images)).digest == images.digest
    assert len(digests) == 1
    write(Path(images.image(1)), image_sets.JPEG + b"more")  # another picture of the same name, as corruptions are
    assert open_set("DTD", tmp_path / folder).digest not in digests


@pytest.mark.parametrize("where", ["data_splits", "data/data_splits", "."])
def test_split_files_elsewhere(where, tmp_path, monkeypatch):
    """TPT has them in a folder of its own, Doebler's repository in small letters."""
    rows = rows_of("flowers102")
    as_small(monkeypatch, "flowers102", rows)
    top = make_fine("flowers102", tmp_path, "Flower102/jpg")
    (tmp_path / where).mkdir(parents=True, exist_ok=True)
    os.rename(top / "split_zhou_OxfordFlowers.json", tmp_path / where / "split_zhou_flowers102.json")
    assert open_set("Flower102", tmp_path).name == "flowers102"
    os.rename(tmp_path / where / "split_zhou_flowers102.json", tmp_path.parent / f"{tmp_path.name}.json")
    assert open_set("Flower102", tmp_path, splits=tmp_path.parent / f"{tmp_path.name}.json").name == "flowers102"


def test_every_spelling():
    for spelling, id in {
        "I": "imagenet", "ImageNet": "imagenet", "A": "imagenet_a", "imagenet-a": "imagenet_a", "V": "imagenet_v2",
        "ImageNetV2": "imagenet_v2", "R": "imagenet_r", "K": "imagenet_sketch", "ImageNet-Sketch": "imagenet_sketch",
        "Flower102": "flowers102", "oxford_flowers": "flowers102", "OxfordFlowers": "flowers102", "DTD": "dtd",
        "DescribableTextures": "dtd", "Pets": "pets", "oxford_pets": "pets", "Cars": "cars", "stanford_cars": "cars",
        "UCF101": "ucf101", "Caltech101": "caltech101", "caltech-101": "caltech101", "Food101": "food101",
        "food-101": "food101", "SUN397": "sun397", "Aircraft": "aircraft", "fgvc_aircraft": "aircraft",
        "fgvc": "aircraft", "eurosat": "eurosat", "EuroSAT": "eurosat", "food101-official": "food101-official",
    }.items():  # fmt: skip
        assert canonical(spelling) == id
    assert canonical("./cars") is None


@pytest.mark.parametrize("published", [False, True])
def test_food101_is_right_unless_it_is_to_be_as_published(published, tmp_path, monkeypatch):
    as_small(monkeypatch, "food101", rows_of("food101"))
    make_fine("food101", tmp_path, "food-101/images")
    images = open_set("food101", tmp_path, as_published=published)
    shown = {Path(id).parent.name: name for id, name in mapping(images)}
    exchanged = {"cheese_plate": "cheesecake", "cheesecake": "cheese_plate"} if published else {}
    assert shown == {folder: exchanged.get(folder, folder) for folder in shown}
    assert [note for note in images.notes if "exchanged" in note] == (
        ["classes 16 and 17, cheese_plate and cheesecake, are exchanged as in TPT's code"] if published else []
    )


# --- without CoOp's file


@pytest.mark.parametrize("id", ["pets", "ucf101", "sun397"])
def test_the_authors_files_are_the_same_test_set(id, tmp_path, monkeypatch):
    rows = rows_of(id)
    as_small(monkeypatch, id, rows)
    top = make_fine(id, tmp_path, SETS[id].folders[0])
    with_file = open_set(id, tmp_path)
    (top / SETS[id].split[0]).unlink()
    for name, content in own_files(id, rows).items():
        write(top / name, content)
    images = open_set(id, tmp_path)
    assert (images.name, mapping(images)) == (id, mapping(with_file))
    assert images.notes[0].startswith("of the data set's own ")


def matlab(monkeypatch, contents) -> None:
    """scipy's reader of files that are not there."""
    module = ModuleType("scipy.io")
    module.loadmat = lambda path, squeeze_me: contents[Path(path).name]
    monkeypatch.setitem(sys.modules, "scipy", ModuleType("scipy"))
    monkeypatch.setitem(sys.modules, "scipy.io", module)


def test_cars_of_their_matlab_files(tmp_path, monkeypatch):
    rows = rows_of("cars")
    as_small(monkeypatch, "cars", rows)
    top = make_fine("cars", tmp_path, "stanford_cars")
    (top / "split_zhou_StanfordCars.json").unlink()
    write(top / "devkit" / "cars_meta.mat", b"")
    write(top / "cars_test_annos_withlabels.mat", b"")
    annotations = [{"fname": path.partition("/")[2], "class": label + 1} for path, label, _ in rows]
    names = ["Tesla Model S Sedan 2012", "AM General Hummer SUV 2000"]
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"cars: its authors' labels are MATLAB files, which need scipy"):
        open_set("cars", tmp_path)
    contents = {"cars_meta.mat": {"class_names": names}, "cars_test_annos_withlabels.mat": {"annotations": annotations}}
    matlab(monkeypatch, contents)
    assert mapping(open_set("cars", tmp_path)) == [(path, name) for path, _, name in rows]


@pytest.mark.parametrize("asked", ["food101", "food101-official"])
def test_food101_official_is_another_set(asked, tmp_path, monkeypatch):
    rows = rows_of("food101")
    as_small(monkeypatch, "food101", rows, other_images=2)
    top = make_fine("food101", tmp_path, "food-101/images")
    if asked == "food101":
        (top / "split_zhou_Food101.json").unlink()
    listed = sorted(names_of(rows), key=lambda name: name.replace("_", "~"))  # the archive's order of the two
    assert listed.index("cheesecake") < listed.index("cheese_plate")
    write(top / "meta" / "classes.txt", "\n".join(listed))
    write(top / "meta" / "test.txt", "cheesecake/117\ncheese_plate/116\n")
    images = open_set(asked, tmp_path)
    assert images.name == "food101-official"
    assert mapping(images) == [("cheesecake/117.jpg", "cheesecake"), ("cheese_plate/116.jpg", "cheese_plate")]
    assert checks.OTHER_TEST_SET in images.notes[0]


def test_flowers_and_textures_official(tmp_path, monkeypatch):
    from torchvision.datasets import Flowers102

    as_small(monkeypatch, "flowers102", other_images=2)  # with the class names of all 102, checked by their digest
    for file in ("imagelabels.mat", "setid.mat"):
        write(tmp_path / "flowers-102" / file, b"")
    for i in (1, 3):
        write(tmp_path / "flowers-102" / "jpg" / f"image_{i:05}.jpg")
    matlab(monkeypatch, {"imagelabels.mat": {"labels": [60, 1, 77]}, "setid.mat": {"tstid": [3, 1]}})
    images = open_set("flowers102", tmp_path)
    assert images.name == "flowers102-official"
    assert mapping(images) == [("image_00003.jpg", Flowers102.classes[76]), ("image_00001.jpg", "pink-yellow dahlia")]

    as_small(monkeypatch, "dtd", rows_of("dtd"), other_images=2)
    for path in ("banded/banded_1.jpg", "blotchy/blotchy_4.jpg"):
        write(tmp_path / "dtd" / "dtd" / "images" / path)
    write(tmp_path / "dtd" / "dtd" / "labels" / "test1.txt", "blotchy/blotchy_4.jpg\nbanded/banded_1.jpg\n")
    images = open_set("dtd", tmp_path)
    assert images.name == "dtd-official"
    assert mapping(images) == [("blotchy/blotchy_4.jpg", "blotchy"), ("banded/banded_1.jpg", "banded")]


# --- ImageNet as it unpacks


@pytest.mark.parametrize("file", ["LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt", "meta.bin"])
def test_flat_imagenet(file, tmp_path, monkeypatch):
    wnids = ["n01440764", "n15075141", "n01440764"]
    as_small(monkeypatch, "imagenet", images=3)
    names = [f"ILSVRC2012_val_{i:08}" for i in (1, 2, 3)]
    for name in names:
        write(tmp_path / "imagenet" / "images" / "val" / f"{name}.JPEG")
    with pytest.raises(
        FileNotFoundError, match=r"the images lie flat in .*, as the archive unpacks, without their classes"
    ):
        open_set("imagenet", tmp_path)
    place = tmp_path / "imagenet" / file
    if file.endswith(".csv"):
        rows = (f"{name},{wnid} 1 2 3 4 {wnid} 5 6 7 8\n" for name, wnid in [*zip(names, wnids)][::-1])
        write(place, "ImageId,PredictionString\n" + "".join(rows))
    elif file.endswith(".txt"):
        write(place, "\n".join(wnids) + "\n")
    else:
        import torch

        torch.save(({wnid: ("a", "b") for wnid in wnids}, wnids), place)
    images = open_set("imagenet", tmp_path)
    assert [name for _, name in mapping(images)] == ["tench", "toilet paper", "tench"]
    assert str(place) in images.notes[0]


def test_v2_with_wordnet_folders(tmp_path, monkeypatch):
    as_small(monkeypatch, "imagenet_v2")
    make_kin("imagenet", tmp_path / "imagenetv2-matched-frequency-format-val")
    images = open_set("V", tmp_path)
    assert [images.label(i) for i in range(1000)] == list(range(1000))
    assert images.id(999).startswith("n15075141/")
