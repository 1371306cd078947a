"""Builds the embedded sample: the first photographs of each class of CIFAR-10, as WebDataset shards. The same bytes at every run.

    python -m datamodules.build_sample --cifar10 data/cifar10
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from aft.errors import DataError
from datamodules.folder import class_folder, folders_of
from datamodules.sources import ZipSource
from datamodules.writer import write_tar

HERE = Path(__file__).parent / "sample_data"
PLAN = {"train": (200, 4), "test": (100, 2)}  # photographs a class, shards


def build(cifar10: str | Path, target: str | Path = HERE) -> list[Path]:
    """Writes the shards of both splits.

    Args:
        cifar10: folder with ``train.zip`` and ``test.zip``, members ``CLASS/NNNN.jpg``.
        target: folder for ``{train,test}-0000N.tar``; made when missing.

    Returns:
        The paths written.

    Raises:
        DataError: a zip is missing or a class has too few photographs.
    """
    Path(target).mkdir(parents=True, exist_ok=True)
    return [path for split, (per_class, shards) in PLAN.items()
            for path in write_split(ZipSource(Path(cifar10) / f"{split}.zip"), Path(target), split, per_class, shards)]


def write_split(source: ZipSource, target: Path, split: str, per_class: int, shards: int) -> list[Path]:
    """Writes one split: in turn a photograph of each class, so that every shard is balanced."""
    by_class: dict[str, list[int]] = {folder: [] for folder in folders_of(source)}
    for position, member in enumerate(source.members):
        by_class[class_folder(member)].append(position)
    short = {folder: len(found) for folder, found in by_class.items() if len(found) < per_class}
    if short:
        raise DataError(f"{source.path} has too few photographs ({short}): {per_class} a class are needed.")
    turns = [(folder, by_class[folder][turn]) for turn in range(per_class) for folder in by_class]
    labels = {folder: label for label, folder in enumerate(by_class)}
    size = len(turns) // shards
    paths = []
    for shard in range(shards):
        paths.append(target / f"{split}-{shard:05d}.tar")
        part = [(source.members[position].rsplit(".", 1)[0], labels[folder], source.read(position))
                for folder, position in turns[shard * size:(shard + 1) * size]]
        write_tar(paths[-1], [(f"{key}.{ending}", data) for key, label, jpeg in part
                              for ending, data in (("jpg", jpeg), ("cls", str(label).encode()))])
    return paths


def main(args: Sequence[str] | None = None) -> list[Path]:
    """The command; returns the paths written."""
    parser = argparse.ArgumentParser(description="Builds the embedded sample from CIFAR-10.")
    parser.add_argument("--cifar10", required=True, help="folder with train.zip and test.zip, members CLASS/NNNN.jpg")
    parser.add_argument("--target", default=str(HERE), help="folder for the shards")
    given = parser.parse_args(args)
    return build(given.cifar10, given.target)


if __name__ == "__main__":
    print(*main(), sep="\n")
