"""Every YAML under configs/data is a datamodule that jsonargparse can build, with a comment above each key; the new ones train a step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torchvision
import yaml
from jsonargparse import ArgumentParser
from lightning import LightningDataModule
from PIL import Image

import train
from datamodules import ZeroShotSuite
from datamodules.common import ImageData

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS])
def test_config_builds_its_datamodule(name: str) -> None:
    """Typed and complete: unknown keys are errors."""
    path = next(path for path in CONFIGS if path.stem == name)
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    given = yaml.safe_load(path.read_text())
    given.pop("checkpoint", None)
    data = parser.instantiate_classes(parser.parse_object(given)).data
    if isinstance(data, ZeroShotSuite):
        assert str(data.root) == given["data"]["init_args"]["root"]
    else:
        assert isinstance(data, ImageData) and data.batch_size == given["data"]["init_args"]["batch_size"]
    lines = path.read_text().splitlines()
    body = lines[lines.index("  init_args:") + 1:]
    assert all(body[place - 1].lstrip().startswith("#") for place, line in enumerate(body) if not line.lstrip().startswith("#"))
    with pytest.raises(SystemExit):
        parser.parse_object({"data": {**given["data"], "init_args": {**given["data"]["init_args"], "batchsize": 1}}})


class Fake(torchvision.datasets.VisionDataset):
    """Forty pictures under CIFAR-10's name."""

    classes, targets = [f"class {number}" for number in range(10)], [number % 10 for number in range(40)]

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        super().__init__(root)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, place: int) -> tuple[Image.Image, int]:
        return Image.fromarray(np.full((32, 32, 3), 6 * place, np.uint8)), place % 10


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["folder", "shards", "captions", "torchvision"])
def test_it_trains_one_step(name: str, make_folder, make_shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file as it is, on small data in place of what it names, and with batches and images to match."""
    monkeypatch.chdir(train.HERE)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    settings = {"batch_size": 4, "image_size": 32}
    if name == "folder":
        settings |= {"train": make_folder(per_class=8), "holdout": 3}
    elif name == "shards":
        settings |= {"train": make_shards(), "holdout": make_shards((2, 2), name="held")}
    elif name == "captions":
        make_folder()
        (tmp_path / "pairs.csv").write_text("image,caption\n" + "".join(f"train/cat/00{n}.png,cat {n}\n" for n in range(4)))
        settings |= {"train": tmp_path / "pairs.csv"}
    else:
        settings |= {"root": tmp_path, "holdout": 10}
    method = ["--model=aft.methods.ContrastivePretraining"] if name == "captions" else ["-c", "configs/methods/tecoa.yaml"]
    small = {"model.init_args.clip.name": "tiny", "model.init_args.clip.pretrained": "random", "trainer.max_steps": 1,
             "model.init_args.optimizer.warmup_steps": 0, "trainer.accelerator": "cpu", "trainer.default_root_dir": tmp_path / "run",
             **{f"data.init_args.{key}": value for key, value in settings.items()}}
    run = train.main(["fit", *method, "-c", f"configs/data/{name}.yaml", *(f"--{key}={value}" for key, value in small.items())])
    assert run.trainer.global_step == 1
