"""The embedded sample is what its README says, and its builder writes the same bytes every time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from aft.errors import DataError
from datamodules import ImageFolder, Sample
from datamodules.build_sample import main
from datamodules.sample import DATA, ShardSource

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cifar10() -> Path:
    """The folder with CIFAR-10's zips, where it is at hand."""
    for folder in (ROOT / "data" / "cifar10", ROOT.parent / "shared" / "data" / "cifar10"):
        if (folder / "train.zip").is_file():
            return folder
    pytest.skip("CIFAR-10's zips are not at data/cifar10, so the sample cannot be built anew")


@pytest.mark.parametrize(("split", "per_class"), [("train", 200), ("test", 100)])
def test_sample_is_balanced_unique_and_in_range(split: str, per_class: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 and 1,000 photographs, also from another working directory and where a distributed job's environment is set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = Sample().evaluation_set(split)
    assert found.labels_N.bincount().tolist() == [per_class] * 10 and len(set(found.index_N.tolist())) == 10 * per_class
    images = found.batch(range(len(found))).images
    assert images.dtype == torch.float32 and images.shape[1:] == (3, 32, 32) and images.min() == 0 and images.max() == 1
    assert len(torch.unique(images.flatten(1), dim=0)) == 10 * per_class


def test_classes_and_keys_agree() -> None:
    """The label of each key's folder is its place in classes.json."""
    names = Sample().class_lists["train"]
    source = ShardSource(sorted(DATA.glob("train-*.tar")))
    assert names == tuple(sorted(names)) == tuple(json.loads((DATA / "classes.json").read_text())["classes"])
    assert all(names[label] == key.split("/")[0] for key, label in zip(source.keys, source.labels, strict=True))


def test_builder_is_deterministic_and_made_the_shards(cifar10: Path, tmp_path: Path) -> None:
    """Built anew from CIFAR-10 the shards have the bytes of those in the repository."""
    built = main(["--cifar10", str(cifar10), "--target", str(tmp_path)])
    assert [path.name for path in built] == ["train-00000.tar", "train-00001.tar", "train-00002.tar", "train-00003.tar",
                                             "test-00000.tar", "test-00001.tar"]
    for path in built:
        assert path.read_bytes() == (DATA / path.name).read_bytes(), path.name


def test_sample_is_the_beginning_of_cifar10(cifar10: Path) -> None:
    """A photograph of the sample is the one of the zip, to the bit."""
    whole, sample = ImageFolder(str(cifar10 / "test.zip")), Sample()
    ours, source = sample.evaluation_set("test"), sample.listing("test").source
    members = {member: place for place, member in enumerate(whole.listing("train").source.members)}
    for row in (0, 1, 500, 999):
        assert torch.equal(ours.batch([row]).images[0], whole.store("train")[members[f"{source.name(row)}.jpg"]])


def test_missing_shards_say_how_to_build_them() -> None:
    """The remedy is the builder's command."""
    with pytest.raises(DataError, match=r"python -m datamodules.build_sample"):
        ShardSource([])
