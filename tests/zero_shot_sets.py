"""Every set of the zero-shot table on the disk as its authors publish it, but with one tiny picture a class.

The colour of a picture says which class it is of, so that a test can see whether the label means that class.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from datamodules.writer import write_tar
from datamodules.zero_shot_table import table

STEP = 16  # grey levels between two classes: more than a JPEG changes a flat picture by


def colour(number: int) -> tuple[int, int, int]:
    """The colour of a class, for up to 4,096 classes."""
    return (STEP * (number % 16) + 8, STEP * (number // 16 % 16) + 8, STEP * (number // 256) + 8)


def class_of(image_CHW) -> int:
    """The class that a picture is of."""
    red, green, blue = (int(255 * float(channel.mean())) // STEP for channel in image_CHW)
    return red + 16 * green + 256 * blue


def picture(number: int, side: int = 8, form: str = "JPEG") -> bytes:
    """An encoded flat picture of a class."""
    data = io.BytesIO()
    Image.new("RGB", (side, side), colour(number)).save(data, form)
    return data.getvalue()


def array(number: int, side: int) -> np.ndarray:
    """The same as ``uint8 [H, W, 3]``."""
    return np.broadcast_to(np.array(colour(number), np.uint8), (side, side, 3)).copy()


def put(path: Path, content: bytes | str) -> str:
    """Writes a file and returns its md5, which torchvision compares."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(raw)
    return hashlib.md5(raw).hexdigest()


def folders(root: Path, names: list[str], file: str = "0001.jpg", side: int = 8) -> None:
    """A picture in each class folder."""
    for number, name in enumerate(names):
        put(root / name / file, picture(number, side))


def made_up(name: str, count: int) -> list[str]:
    """Names that sort as they are numbered."""
    return [f"{name}_{number:03d}" for number in range(count)]


def known(name: str) -> list[str]:
    """The table's own names."""
    given = table()[name].given_names
    return list(given.values() if isinstance(given, dict) else given)


def given_folders(name: str) -> list[str]:
    """The folders that the table has names for."""
    return list(table()[name].given_names)


def cifar(root: Path, patch: pytest.MonkeyPatch, count: int) -> list[str]:
    """CIFAR's pickles; torchvision looks at the md5 of all of them."""
    kind = torchvision.datasets.CIFAR10 if count == 10 else torchvision.datasets.CIFAR100
    labels, names = ("labels", "label_names") if count == 10 else ("fine_labels", "fine_label_names")
    pixels = np.stack([array(number, 32).transpose(2, 0, 1).reshape(-1) for number in range(count)])
    for key in ("train_list", "test_list"):
        content = pickle.dumps({"data": pixels, labels: list(range(count))})
        patch.setattr(kind, key, [[name, put(root / kind.base_folder / name, content)] for name, _ in getattr(kind, key)])
    meta = pickle.dumps({names: made_up("thing", count)})
    patch.setattr(kind, "meta", {**kind.meta, "md5": put(root / kind.base_folder / kind.meta["filename"], meta)})
    return [f"thing {number:03d}" for number in range(count)]


def stl10(root: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """Columns before rows, labels from 1."""
    kind = torchvision.datasets.STL10
    pixels = np.stack([array(number, 96).transpose(2, 1, 0) for number in range(10)]).tobytes()
    labels = bytes(range(1, 11))
    for key in ("train_list", "test_list"):
        patch.setattr(kind, key, [[name, put(root / "stl10_binary" / name, labels if "_y" in name else pixels)]
                                  for name, _ in getattr(kind, key)])  # fmt: skip
    put(root / "stl10_binary" / "class_names.txt", "\n".join(made_up("thing", 10)))
    return [f"thing {number:03d}" for number in range(10)]


def tiny_imagenet32(root: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """Folders of WordNet ids, and their names in a file beside them."""
    wnids = [f"n{number:08d}" for number in range(200)]
    folders(root / "tiny-imagenet-32" / "val", wnids, "0001.webp", 32)
    record = {wnid: {"names": [f"thing {wnid}", "synonym"], "gloss": "", "hypernyms": []} for wnid in wnids}
    put(root / "tiny-imagenet-32" / "classes.json", json.dumps(record))
    return [f"thing {wnid}" for wnid in wnids]


def by_folder(place: str, file: str) -> Callable[[Path, pytest.MonkeyPatch, str], list[str]]:
    """Folders that the table has names for."""
    def build(root: Path, patch: pytest.MonkeyPatch, name: str) -> list[str]:
        """Pictures in all of them, and the notes that lie beside them."""
        folders(root / place, given_folders(name), file, table()[name].side or 8)
        put(root / place / "README.txt", "notes")
        return known(name)

    return build


def caltech101(root: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """101 folders, capitals before small letters, and one of no class."""
    names = ["Faces", "Faces_easy", "Leopards", "Motorbikes", *made_up("thing", 97)]
    folders(root / "caltech101" / "101_ObjectCategories", names, "image_0001.jpg")
    put(root / "caltech101" / "101_ObjectCategories" / "BACKGROUND_Google" / "image_0001.jpg", picture(999))
    return known("caltech101")


def caltech256(root: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """Numbered folders, some with the other set's mark, one of no class, and a leftover further down."""
    names = [f"{number + 1:03d}.sea-thing{number}" + "-101" * (number % 7 == 0) for number in range(256)]
    folders(root / "caltech256" / "256_ObjectCategories", names)
    for leftover in ("257.clutter/257_0001.jpg", f"{names[55]}/greg/056_0001.jpg"):
        put(root / "caltech256" / "256_ObjectCategories" / leftover, picture(999))
    return [f"sea thing{number}" for number in range(256)]


def oxford_pets(root: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """Labels from 1 in a list, files of all classes in one folder, one of them no JPEG."""
    place, names = root / "oxford-iiit-pet", made_up("Furry", 37)
    put(place / "annotations" / "test.txt", "".join(f"{name}_7 {number + 1} 1 1\n" for number, name in enumerate(names)))
    for number, name in enumerate(names):
        put(place / "images" / f"{name}_7.jpg", picture(number, form="GIF" if number == 3 else "JPEG"))
    return [f"Furry {number:03d}" for number in range(37)]


def flowers102(root: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """MATLAB files with labels from 1 and the numbers of the test images; files are numbered against the labels."""
    io_ = pytest.importorskip("scipy.io", reason="torchvision reads Flowers-102 and Stanford Cars with scipy")
    place, kind = root / "flowers-102", torchvision.datasets.Flowers102
    place.mkdir(parents=True)
    io_.savemat(place / "imagelabels.mat", {"labels": np.arange(102, 0, -1)})
    io_.savemat(place / "setid.mat", {"trnid": [1], "valid": [2], "tstid": np.arange(1, 103)})
    for number in range(102):
        put(place / "jpg" / f"image_{102 - number:05d}.jpg", picture(number))
    sums = {key: (file, hashlib.md5((place / file).read_bytes()).hexdigest()) for key, file in (("label", "imagelabels.mat"),
                                                                                              ("setid", "setid.mat"))}  # fmt: skip
    patch.setattr(kind, "_file_dict", {**kind._file_dict, **sums})
    return known("flowers102")


def fgvc_aircraft(root: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """A list of variants and a list of images."""
    place, names = root / "fgvc-aircraft-2013b" / "data", [f"7{number:02d}-300" for number in range(100)]
    put(place / "variants.txt", "\n".join(names) + "\n")
    put(place / "images_variant_test.txt", "".join(f"{9000 - number:07d} {name}\n" for number, name in enumerate(names)))
    for number in range(100):
        put(place / "images" / f"{9000 - number:07d}.jpg", picture(number))
    return names


def stanford_cars(root: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """MATLAB structures with labels from 1."""
    io_ = pytest.importorskip("scipy.io", reason="torchvision reads Flowers-102 and Stanford Cars with scipy")
    place, names = root / "stanford_cars", [f"Make Model {number:03d} 2012" for number in range(196)]
    (place / "devkit").mkdir(parents=True)
    notes = np.array([(number + 1, f"{number + 1:05d}.jpg") for number in range(196)], dtype=[("class", "O"), ("fname", "O")])
    io_.savemat(place / "cars_test_annos_withlabels.mat", {"annotations": notes})
    io_.savemat(place / "devkit" / "cars_meta.mat", {"class_names": np.array(names, dtype=object)})
    for number in range(196):
        put(place / "cars_test" / f"{number + 1:05d}.jpg", picture(number))
    return names


def sun397(root: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """Folders two or three levels down, named in a list."""
    names = [f"place_{number:03d}" + "/indoor" * (number % 5 == 0) for number in range(397)]
    put(root / "SUN397" / "ClassName.txt", "".join(f"/p/{name}\n" for name in names))
    for number, name in enumerate(names):
        put(root / "SUN397" / "p" / name / f"sun_{number:04x}.jpg", picture(number))
    return [name.replace("_", " ").replace("/", " ") for name in names]


def country211(root: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """Folders of two letters."""
    codes = [chr(65 + number // 26) + chr(65 + number % 26) for number in range(211)]
    folders(root / "country211" / "test", codes)
    return known("country211")


def food101(root: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """A list of files by class."""
    names = made_up("dish", 101)
    put(root / "food-101" / "meta" / "test.json", json.dumps({name: [f"{name}/77"] for name in reversed(names)}))
    folders(root / "food-101" / "images", names, "77.jpg")
    return [name.replace("_", " ") for name in names]


def dtd(root: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """A list of files of the first partition."""
    names = made_up("rough", 47)
    put(root / "dtd" / "dtd" / "labels" / "test1.txt", "".join(f"{name}/{name}_0001.jpg\n" for name in names))
    for number, name in enumerate(names):
        put(root / "dtd" / "dtd" / "images" / name / f"{name}_0001.jpg", picture(number))
    return [name.replace("_", " ") for name in names]


def pcam(root: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """Two HDF5 files."""
    h5py = pytest.importorskip("h5py", reason="torchvision reads PCAM with h5py, which is an extra: pip install 'aft[sets]'")
    (root / "pcam").mkdir(parents=True)
    for letter, content in (("x", np.stack([array(number, 96) for number in (0, 1, 1)])), ("y", np.reshape([0, 1, 1], (3, 1, 1, 1)))):
        with h5py.File(root / "pcam" / f"camelyonpatch_level_2_split_test_{letter}.h5", "w") as file:
            file[letter] = content
    return known("pcam")


#: Id -> what writes the set below a root and returns its class names, in the order of the pictures' colours.
BUILD: dict[str, Callable[[Path, pytest.MonkeyPatch], list[str]]] = {
    "cifar10": lambda root, patch: cifar(root, patch, 10), "cifar100": lambda root, patch: cifar(root, patch, 100), "stl10": stl10,
    "tiny_imagenet32": tiny_imagenet32, "caltech101": caltech101, "caltech256": caltech256, "oxford_pets": oxford_pets,
    "flowers102": flowers102, "fgvc_aircraft": fgvc_aircraft, "stanford_cars": stanford_cars, "sun397": sun397, "country211": country211,
    "food101": food101, "dtd": dtd, "pcam": pcam,
    **{name: (lambda root, patch, name=name, place=place, file=file: by_folder(place, file)(root, patch, name)) for name, place, file in (
        ("imagenet", "imagenet/val", "ILSVRC2012_val_00000001.JPEG"), ("imagenet_sketch", "sketch", "sketch_0.JPEG"),
        ("imagenet_v2", "imagenetv2-matched-frequency-format-val", "0a1b.jpeg"), ("imagenet_a", "imagenet-a", "0.000_a.jpg"),
        ("imagenet_r", "imagenet-r", "art_0.jpg"), ("eurosat", "eurosat/2750", "1.jpg"))},
}  # fmt: skip


def clip_benchmark(place: Path, names: list[str], count: int = 2, side: int = 8, form: str = "webp") -> Path:
    """Shards in CLIP_benchmark's layout, a picture a class."""
    place.joinpath("test").mkdir(parents=True)
    put(place / "classnames.txt", "\n".join(names) + "\n")
    put(place / "zeroshot_classification_templates.txt", "a photo of a {c}.\n")
    put(place / "test" / "nshards.txt", f"{count}\n")
    encoded = {"webp": "WEBP", "jpg": "JPEG", "png": "PNG"}[form]
    for shard in range(count):
        write_tar(place / "test" / f"{shard}.tar", [
            member for number in range(shard, len(names), count) for member in (
                (f"s{number:07d}.{form}", picture(number, side, encoded)), (f"s{number:07d}.cls", str(number).encode()))])  # fmt: skip
    return place
