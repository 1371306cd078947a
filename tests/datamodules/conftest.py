"""Small image folders, zips of them, shards, and the trainer stand-in of a rank."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from datamodules.common import ImageData
from datamodules.manifest import FILE, Manifest, Shard, sha256
from datamodules.writer import write_tar

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
def as_rank() -> Callable[[ImageData, int, int], ImageData]:
    """Makes a datamodule believe that it runs on rank r of W."""

    def set_rank(data: ImageData, rank: int, world: int) -> ImageData:
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world)
        return data

    return set_rank


def png(number: int, side: int = 8) -> bytes:
    """A random picture."""
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    """Writes shards of so many samples each, and their manifest, by hand; ``replace`` gives other bytes to a member of a name."""

    def make(counts: tuple[int, ...] = (8, 8, 8, 8), kind: str = "class", name: str = "shards",
             replace: dict[str, bytes] | None = None) -> Path:
        folder, first, shards = tmp_path / name, 0, []
        folder.mkdir()
        for place, count in enumerate(counts):
            members = []
            for number in range(first, first + count):
                text = ("cls", str(number % 2).encode()) if kind == "class" else ("txt", f"picture {number}".encode())
                members += [(f"{number:03d}.png", png(number)), (f"{number:03d}.{text[0]}", text[1])]
            first += count
            path = folder / f"shard-{place:05d}.tar"
            write_tar(path, [(member, (replace or {}).get(member, data)) for member, data in members])
            shards.append(Shard(path.name, count, path.stat().st_size, sha256(path)))
        manifest = Manifest(kind, tuple(shards), (("cat",), ("dog", "hound")) if kind == "class" else None)
        (folder / FILE).write_text(manifest.to_json())
        return folder

    return make
