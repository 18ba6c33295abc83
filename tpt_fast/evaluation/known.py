"""The fifteen sets that TPT and its followers are measured on, as facts: counts, folders, spellings, digests."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """A set. Folders are relative to the root and are looked for in this order, without regard to case."""

    id: str
    images: int  #: test images of TPT's and CoOp's protocol
    classes: int
    folders: tuple[str, ...]  #: what split files' paths are relative to, or the folder that has the class folders
    aliases: tuple[str, ...] = ()
    template: str = "a photo of a {}."  #: CoOp's
    synsets: str | None = None  #: of ImageNet's kin: timm's file of the WordNet ids that are its classes
    split: tuple[str, ...] | None = None  #: names of CoOp's split file, without regard to case and underscores
    blob: str | None = None  #: git blob id of that file
    names: str | None = None  #: sha256 of the class names joined by newlines, its first 16 digits
    test: str | None = None  #: sha256 of the sorted lines "path TAB label" of the test part, its first 16 digits
    optional: str = ""  #: beginning of split files' paths that some layouts leave out
    official: bool = False  #: can be made from files of the data set's authors
    other_images: int | None = None  #: test images of these, where CoOp's are others


_V2 = "imagenetv2-matched-frequency-format-val"

_ALL = (
    Known(
        "imagenet",
        50_000,
        1000,
        ("ImageNet/val", "imagenet/images/val", "imagenet2012/val", "ILSVRC/Data/CLS-LOC/val"),
        aliases=("I", "ImageNet-1k", "ILSVRC2012"),
        synsets="imagenet_synsets.txt",
        names="571ae1c583b4be7d",
    ),
    Known(
        "imagenet_a",
        7_500,
        200,
        ("imagenet-a", "imagenet-adversarial/imagenet-a"),
        aliases=("A", "ImageNet-Adversarial"),
        synsets="imagenet_a_synsets.txt",
    ),
    Known(
        "imagenet_v2",
        10_000,
        1000,
        (_V2, f"imagenetv2/{_V2}", f"imagenet-v2/{_V2}"),
        aliases=("V", "ImageNetV2"),
        synsets="imagenet_synsets.txt",
        names="571ae1c583b4be7d",
    ),
    Known(
        "imagenet_r",
        30_000,
        200,
        ("imagenet-r", "imagenet-rendition/imagenet-r"),
        aliases=("R", "ImageNet-Rendition"),
        synsets="imagenet_r_synsets.txt",
    ),
    Known(
        "imagenet_sketch",
        50_889,
        1000,
        ("ImageNet-Sketch", "imagenet-sketch/images", "ImageNet-Sketch/sketch"),
        aliases=("K",),
        synsets="imagenet_synsets.txt",
        names="571ae1c583b4be7d",
    ),
    Known(
        "flowers102",
        2_463,
        102,
        ("Flower102/jpg", "oxford_flowers/jpg", "flowers-102/jpg"),
        aliases=("Flower102", "OxfordFlowers", "Flowers"),
        template="a photo of a {}, a type of flower.",
        split=("split_zhou_OxfordFlowers.json", "split_zhou_flowers102.json"),
        blob="8d10037b0690b6c65e307a354b039efb0f42404c",
        names="0d27092c2140383d",
        test="68f92619ab07ad6d",
        official=True,
        other_images=6_149,
    ),
    Known(
        "dtd",
        1_692,
        47,
        ("DTD/images", "dtd/dtd/images"),
        aliases=("DescribableTextures",),
        template="{} texture.",
        split=("split_zhou_DescribableTextures.json", "split_zhou_dtd.json"),
        blob="8dd197a94b598fa44ee3c9e35c486dd017ab00a7",
        names="681d23b9cd3c2ede",
        test="38876f2681891665",
        official=True,
        other_images=1_880,
    ),
    Known(
        "pets",
        3_669,
        37,
        ("OxfordPets", "oxford_pets/images", "oxford-iiit-pet/images", "OxfordPets/images"),
        aliases=("OxfordPets", "OxfordIIITPet"),
        template="a photo of a {}, a type of pet.",
        split=("split_zhou_OxfordPets.json",),
        blob="fa821d9f9e7d32fdf3640bf74fa7491ed04f37da",
        names="8e35ab44db27d55a",
        test="b39fc8f9fd146e87",
        official=True,
    ),
    Known(
        "cars",
        8_041,
        196,
        ("StanfordCars", "stanford_cars", "stanford_cars/images", "stanford_cars/cars_test"),
        aliases=("StanfordCars",),
        split=("split_zhou_StanfordCars.json",),
        blob="dcdb8264712e9940e74cfb0f06ddb8f9cc239b81",
        names="2caca90b5c02b65f",
        test="ed8687df35b3d56e",
        optional="cars_",  # ZERO has images/test/00001.jpg where the file has cars_test/00001.jpg
        official=True,
    ),
    Known(
        "ucf101",
        3_783,
        101,
        ("UCF101", "ucf101/UCF-101-midframes", "ucf101/images"),
        template="a photo of a person doing {}.",
        split=("split_zhou_UCF101.json",),
        blob="ea87e3de7b4f6f00fdd77618e34a23508b4c5590",
        names="d22e81fba7ebebf0",
        test="47a1d142649bd3de",
        official=True,
    ),
    Known(
        "caltech101",
        2_465,
        100,
        (
            "Caltech101",
            "caltech-101/101_ObjectCategories",
            "caltech-101/images",
            "caltech101/101_ObjectCategories",
        ),
        aliases=("Caltech",),
        split=("split_zhou_Caltech101.json",),
        blob="8be694a80de04a39fb159c462bea9696aa47ccf1",
        names="84f9ff49dce58ae6",
        test="a71f11d88349ebd0",
    ),
    Known(
        "food101",
        30_300,
        101,
        ("Food101/images", "food-101/images"),
        aliases=("Food",),
        template="a photo of {}, a type of food.",
        split=("split_zhou_Food101.json",),
        blob="39557040ee6501bd32aa8b5dfd75f7941a32f0a7",
        names="efe7060c0e6aa88c",
        official=True,
        other_images=25_250,
    ),
    Known(
        "sun397",
        19_850,
        397,
        ("SUN397", "sun397/SUN397", "sun397/images"),
        aliases=("SUN",),
        split=("split_zhou_SUN397.json",),
        blob="8d5725db8f70bcf02245665304f863e68f96a24c",
        names="583c0fad85d22c56",
        official=True,
    ),
    Known(
        "aircraft",
        3_333,
        100,
        ("fgvc_aircraft/images", "fgvc-aircraft-2013b/data/images"),
        aliases=("FGVCAircraft", "FGVC"),
        template="a photo of a {}, a type of aircraft.",
        names="e1c9e72060e63d52",
        official=True,
    ),
    Known(
        "eurosat",
        8_100,
        10,
        ("eurosat", "eurosat/2750", "eurosat/images"),
        template="a centered satellite photo of {}.",
        split=("split_zhou_EuroSAT.json",),
        blob="6bdc847a5d5c49dcc78e8cb8707b87198cbfa5a4",
        names="bcff3a8022b63397",
        test="0edf11409ee896d4",
    ),
)

SETS: dict[str, Known] = {each.id: each for each in _ALL}  #: by id

_OTHERS = ("cifar10", "cifar100", "tiny-imagenet", "tiny-imagenet-demo")


def plain(name: str) -> str:
    """As names are compared: TPT's ids differ in capitals from set to set, folders in strokes."""
    return re.sub(r"[-_ ]", "", name.lower())


_BY_NAME = {plain(name): each.id for each in _ALL for name in (each.id, *each.aliases)}
_BY_NAME |= {plain(f"{each.id}-official"): f"{each.id}-official" for each in _ALL if each.other_images}
_BY_NAME |= {plain(name): name for name in _OTHERS}


def canonical(name: str) -> str | None:
    """The id of a set, also with "-official", of whatever spelling; None where no set is called so."""
    return _BY_NAME.get(plain(name))
