"""Small image folders, zips of them, and the trainer stand-in of a rank."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from datamodules.base import LabelledImages

MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Writes ``per_class`` random PNGs for each class name and returns the folder; sizes in pixels."""

    def make(classes: tuple[str, ...] = ("cat", "dog", "sea_horse"), per_class: int = 4, size: tuple[int, int] = (8, 8),
             name: str = "train", ending: str = "png") -> Path:
        random = np.random.default_rng(0)
        for folder in classes:
            (tmp_path / name / folder).mkdir(parents=True)
            for number in range(per_class):
                pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / name / folder / f"{number:03d}.{ending}")
        return tmp_path / name

    return make


@pytest.fixture
def zipped() -> Callable[[Path], Path]:
    """Zips a folder of class folders, uncompressed, members in reverse order, and returns the path."""

    def make(folder: Path) -> Path:
        path = folder.with_suffix(".zip")
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*"), reverse=True):
                archive.write(file, file.relative_to(folder))
        return path

    return make


@pytest.fixture
def as_rank() -> Callable[[LabelledImages, int, int], LabelledImages]:
    """Makes a datamodule believe that it runs on rank r of W."""

    def set_rank(data: LabelledImages, rank: int, world: int) -> LabelledImages:
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world)
        return data

    return set_rank
