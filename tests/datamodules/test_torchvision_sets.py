"""Sets of torchvision by name, on made-up data in their own layouts."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from aft.errors import DataError
from datamodules import Torchvision


@pytest.fixture
def eurosat(make_folder, tmp_path: Path) -> Path:
    """A root in EuroSAT's layout (folders of images, no splits)."""
    folder = make_folder(("AnnualCrop", "SeaLake"), per_class=5, ending="png")
    (tmp_path / "eurosat").mkdir()
    folder.rename(tmp_path / "eurosat" / "2750")
    return tmp_path


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    """A root with CIFAR-10's pickles of 20 made-up images a batch, and the md5 sums that torchvision expects changed to theirs."""
    kind, folder = torchvision.datasets.CIFAR10, tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (120, 3072), dtype=np.uint8)

    def write(name: str, content: object) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    lists: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}
    for place, (key, (name, _)) in enumerate([*(("train_list", entry) for entry in kind.train_list), ("test_list", kind.test_list[0])]):
        part = slice(20 * place, 20 * place + 20)
        lists[key].append([name, write(name, {"data": pixels[part], "labels": [i % 10 for i in range(20)]})])
    for key, value in lists.items():
        monkeypatch.setattr(kind, key, value)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": write("batches.meta", {"label_names": names})})
    return tmp_path, pixels.reshape(120, 3, 32, 32)


def test_cifar10_is_what_torchvision_reads(cifar10) -> None:
    """Train and test by the set's own switch, its class names, exact pixels; a held-out part is balanced."""
    root, pixels = cifar10
    data = Torchvision("CIFAR10", str(root), holdout=10, batch_size=30)
    data.setup("fit")
    assert data.name == "cifar10" and data.class_lists["train"][:2] == ("airplane", "automobile")
    test = data.evaluation_set("test")
    assert torch.equal(test.batch(range(20)).images, torch.from_numpy(pixels[100:]).float() / 255)
    assert test.labels_N.tolist() == [i % 10 for i in range(20)]
    assert data.evaluation_set("holdout").labels_N.bincount().tolist() == [1] * 10
    batch = next(iter(Torchvision("CIFAR10", str(root), batch_size=100, augment="none").train_dataloader()))
    assert torch.equal(batch.images, torch.from_numpy(pixels[batch.index.numpy()]).float() / 255) and len(set(batch.index.tolist())) == 100


def test_a_set_without_splits(eurosat: Path) -> None:
    """All of it is training data; there is no test set, and it says so. Names may be given."""
    data = Torchvision("EuroSAT", str(eurosat), class_names=["annual crop land", "lake"])
    found = data.evaluation_set("train")
    assert len(found) == 10 and found.class_names == ("annual crop land", "lake") and found.labels_N.tolist() == [0] * 5 + [1] * 5
    first = sorted((eurosat / "eurosat").rglob("*.png"))[0]
    assert torch.equal(found.batch([0]).images[0], torch.from_numpy(np.asarray(Image.open(first)).copy()).permute(2, 0, 1) / 255)
    assert Torchvision("EuroSAT", str(eurosat)).class_lists["train"] == ("AnnualCrop", "SeaLake")
    with pytest.raises(DataError, match="EuroSAT has no test images"):
        data.evaluation_set("test")
    with pytest.raises(DataError, match="has 1 class names, but labels from 0 to 1"):
        Torchvision("EuroSAT", str(eurosat), class_names=["land"]).setup("fit")


@pytest.mark.parametrize(("name", "message"), [
    ("Cifar-10", "did you mean 'CIFAR10'"), ("Resnet", "unknown torchvision set"), ("VisionDataset", "unknown torchvision set"),
    ("EuroSAT", "set download: true to fetch it"), ("Flowers102", "set download: true to fetch it")])
def test_unknown_and_missing_sets_say_what_to_do(tmp_path: Path, name: str, message: str) -> None:
    """Near matches; how to fetch."""
    with pytest.raises(DataError, match=message):
        Torchvision(name, str(tmp_path)).setup("fit")


def test_a_set_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Items that are not (image, class number), such as boxes."""
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for part in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (folder / part).mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    Image.new("RGB", (8, 8)).save(folder / "JPEGImages" / "a.jpg")
    (folder / "Annotations" / "a.xml").write_text("<annotation><object><name>cat</name></object></annotation>")
    with pytest.raises(DataError, match=r"an item is \['Image', 'dict'\], expected \(image, class number\)"):
        Torchvision("VOCDetection", str(tmp_path), train_split="train").setup("fit")


def test_download_is_for_one_process(eurosat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only prepare_data fetches, and only when asked to."""
    fetched = []
    monkeypatch.setattr(torchvision.datasets.EuroSAT, "download", lambda self: fetched.append(self.root))
    for download in (False, True):
        data = Torchvision("EuroSAT", str(eurosat), download=download)
        data.prepare_data()
        data.setup("fit")
    assert fetched == [str(eurosat)]
