"""The fifteen image sets as published folders lay them out, small: of each class one image or two."""

import io
import json
from dataclasses import replace
from pathlib import Path

from PIL import Image

from tpt_fast.evaluation import checks, known
from tpt_fast.evaluation.folders import synsets
from tpt_fast.evaluation.known import SETS

KIN = ("imagenet", "imagenet_a", "imagenet_v2", "imagenet_r", "imagenet_sketch")
FINE = tuple(id for id in SETS if id not in KIN)


def jpeg(shade: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("L", (8, 8), shade % 256).save(out, "JPEG")
    return out.getvalue()


JPEG = jpeg()


def write(path: Path, content: bytes | str = JPEG) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def make_kin(id: str, folder: Path) -> None:
    """A folder for each class with one image, and what lies beside the folders in the archive."""
    for label, wnid in enumerate(synsets(SETS[id].synsets)):
        file = f"ILSVRC2012_val_{label + 1:08}" if id == "imagenet" else f"{wnid}_{label}"
        write(folder / (str(label) if id == "imagenet_v2" else wnid) / f"{file}.JPEG")
    write(folder / "README.txt", "of the archive")


# --- the ten: three rows a class, of which the paths are as in the real files


def rows_of(id: str) -> list[tuple[str, int, str]]:
    """Test rows of a split file: path, label, name. Labels are mixed, and not in the order of the folders."""
    if id == "pets":
        names = [["Abyssinian", "abyssinian"], ["Bombay", "bombay"], ["american_bulldog", "american_bulldog"]]
        return [(f"{folder}_{i}.jpg", label, name) for i in (3, 1) for label, (folder, name) in enumerate(names)]
    if id == "flowers102":
        return [(f"image_{i:05}.jpg", i % 3, ["pink primrose", "globe-flower", "ball moss"][i % 3]) for i in (4, 2, 6)]
    if id == "cars":
        names = ["2012 Tesla Model S Sedan", "2000 AM General Hummer SUV"]
        return [(f"cars_test/{i:05}.jpg", i % 2, names[i % 2]) for i in range(1, 5)]
    if id == "ucf101":  # the order of classInd.txt, which is not that of the alphabet
        names = ["Hammering", "Hammer_Throw", "Apply_Eye_Makeup"]
        return [
            (f"{name}/v_{name.replace('_', '')}_g0{g}_c01.jpg", label, name)
            for g in (2, 1)
            for label, name in enumerate(names)
        ]
    if id == "sun397":
        folders = ["a/abbey", "a/apse/indoor", "b/basketball_court/outdoor"]
        names = ["abbey", "indoor apse", "outdoor basketball_court"]
        return [(f"{f}/sun_{f[2]}{i}.jpg", n, names[n]) for i in (2, 1) for n, f in enumerate(folders)]
    if id == "aircraft":
        return [("0000002.jpg", 1, "A300B4"), ("0000001.jpg", 0, "707-320"), ("0000003.jpg", 2, "MD 11")]
    if id == "food101":
        names = [f"a_dish_{i:02}" for i in range(16)] + ["cheese_plate", "cheesecake", "waffles"]
        return [(f"{name}/{100 + label}.jpg", label, name) for label, name in enumerate(names)]
    folders = {
        "dtd": {"banded": "banded", "blotchy": "blotchy"},
        "caltech101": {"Faces": "face", "Leopards": "leopard", "accordion": "accordion"},
        "eurosat": {"AnnualCrop": "Annual Crop Land", "SeaLake": "Sea or Lake"},
    }[id]
    return [(f"{f}/{f}_{i}.jpg", n, name) for i in (7, 2) for n, (f, name) in enumerate(folders.items())]


def names_of(rows) -> list[str]:
    found = {label: name for _, label, name in rows}
    return [found[i] for i in range(len(found))]


def split_file(rows) -> bytes:
    return json.dumps({"train": [], "val": [], "test": rows}).encode()


def own_files(id: str, rows) -> dict[str, str]:
    """The files of the data set's authors, of the same images."""
    names = names_of(rows)
    if id == "pets":
        return {"annotations/test.txt": "".join(f"{p[:-4]} {label + 1} 1 1\n" for p, label, _ in rows)}
    if id == "ucf101":
        classes = [name.replace("_", "") for name in names]
        videos = (f"{classes[n]}/{p.partition('/')[2][:-4]}.avi\n" for p, n, _ in rows)
        index = "".join(f"{i} {name}\n" for i, name in enumerate(classes, 1))
        return {"ucfTrainTestlist/classInd.txt": index, "ucfTrainTestlist/testlist01.txt": "".join(videos)}
    if id == "sun397":
        folders = {label: p.rpartition("/")[0] for p, label, _ in rows}
        index = "".join(f"/{folders[i]}\n" for i in range(len(folders)))
        return {"ClassName.txt": index, "Testing_01.txt": "".join(f"/{p}\n" for p, _, _ in rows)}
    assert id == "aircraft"
    tests = "".join(f"{p[:-4]} {name}\n" for p, _, name in rows)
    return {"variants.txt": "".join(f"{name}\n" for name in names), "images_variant_test.txt": tests}


def as_small(monkeypatch, id: str, rows=None, **changes) -> None:
    """The facts of a set are those of a small one: the table is data."""
    if rows is None:
        changes = {"images": SETS[id].classes, **changes}
    else:
        names = names_of(rows)
        facts = {"images": len(rows), "classes": len(names), "names": checks.digest(names)}
        if SETS[id].split:
            facts["blob"] = checks.blob_id(split_file(rows))
        if SETS[id].test:
            facts["test"] = checks.test_digest([(path, label) for path, label, _ in rows])
        changes = {**facts, **changes}
    monkeypatch.setitem(known.SETS, id, replace(SETS[id], **changes))


def make_fine(id: str, root: Path, folder: str, rows=None) -> Path:
    """Images of a split in a layout, and CoOp's file in the data set's folder; returns that folder."""
    rows = rows_of(id) if rows is None else rows
    for n, (path, _, _) in enumerate(rows):
        inside = path
        if id == "cars" and folder == "stanford_cars/images":
            inside = path.removeprefix("cars_")  # as ZERO has them
        write(root / folder / inside, jpeg(n))
    top = root / folder.split("/")[0]
    if SETS[id].split:
        write(top / SETS[id].split[0], split_file(rows))
    else:
        for name, content in own_files(id, rows).items():
            write((root / folder).parent / name, content)
    return top
