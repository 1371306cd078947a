"""Makes WebDataset shards: from a folder of class folders, a zip of one, or a table of captions. The same bytes at every run.

    python -m datamodules.convert photos/train shards/train --resize 224 --holdout 5000
    python -m datamodules.convert pairs.csv shards/pairs --resize 224
    python -m datamodules.convert shards/others --manifest-only          # for shards that exist already
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from aft.errors import ConfigError, DataError, ending_calmly
from datamodules import class_names
from datamodules.base import HOLDOUT_SEED, choose_in_turn
from datamodules.captions import ENDINGS, CaptionSource
from datamodules.folder import ImageFolder
from datamodules.manifest import FILE, Location, Manifest, Shard, read, sha256
from datamodules.shard_reader import ShardIndex, scan
from datamodules.shard_writer import Recipe, Task, write_set
from datamodules.writer import write_text


def convert(source: str, out: str, recipe: Recipe, *, holdout: int = 0, classes: str | None = "auto", images: str | None = None,
            columns: tuple[str, str] = ("image", "caption")) -> list[Path]:
    """Writes shards and their manifest.

    Args:
        source: folder or zip of class folders, or a table of captions (``datamodules.captions.read_table``).
        out: folder for the shards; made when missing, else it must be empty. Held-out images go to ``OUT-holdout``.
        recipe: how.
        holdout: images to hold out, balanced over the classes; 0: none.
        classes: file with the class names, see ``datamodules.ImageFolder``.
        images, columns: of a table, see ``datamodules.Captions``.

    Returns:
        The folders written.

    Raises:
        DataError: the source is unusable, too much of it is damaged, or a folder to write to is not empty.
        ConfigError: more images are to be held out than there are, or captions are to be.
    """
    targets = [Path(out), *([Path(f"{out}-holdout")] if holdout else [])]
    for target in targets:
        refuse_if_filled(target)
    task = caption_task(source, images, columns) if source.lower().endswith(ENDINGS) else class_task(source, classes)
    if holdout and task.labels is None:
        raise ConfigError(f"--holdout {holdout}: captions have no classes to validate on; leave it out.")
    parts = [task.positions]
    if holdout:
        held = choose_in_turn(torch.tensor(task.labels), torch.arange(len(task.positions)), holdout, HOLDOUT_SEED).tolist()
        parts = [[p for p in task.positions if not held[p]], [p for p in task.positions if held[p]]]
        if not parts[0]:
            raise ConfigError(f"--holdout {holdout} takes all {len(task.positions)} images: hold out fewer.")
    for target, positions in zip(targets, parts, strict=True):
        write_set(replace(task, positions=positions), target, recipe)
    return targets


def refuse_if_filled(target: Path) -> None:
    """Raises DataError where a folder to write to has something in it."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        left = "" if (target / FILE).exists() or not target.is_dir() else f" It has no {FILE}: if a conversion stopped there, delete it."
        raise DataError(f"{str(target)!r} is not an empty folder: choose another, or delete it.{left}")


def class_task(source: str, classes: str | None) -> Task:
    """What to convert, from class folders."""
    data = ImageFolder(source, classes=classes)
    listing = data.listing("train")
    return Task(listing.source, data.all_classes(), listing.labels_M.tolist(), None, list(range(len(listing.source))), Path(source).name)


def caption_task(table: str, images: str | None, columns: tuple[str, str]) -> Task:
    """What to convert, from a table of captions."""
    source = CaptionSource(table, images, *columns)
    return Task(source, None, None, source.captions, list(range(len(source))), Path(table).name)


def describe(folder: str, classes: str | None) -> Path:
    """Writes the manifest of shards that others made (``key.jpg`` with ``key.cls``, ``key.txt`` or ``key.json``).

    Args:
        folder: with the tars; an old manifest is replaced.
        classes: file with the class names in label order; ``auto`` or none: the old manifest's, else numbers as names.

    Raises:
        DataError: there are no tars, one cannot be read, or a label is outside the class names.
    """
    place = Path(folder)
    tars = sorted(place.glob("*.tar"))
    if not tars:
        raise DataError(f"{folder!r} holds no .tar: give the folder of the shards.")
    members = [scan(tar) for tar in tars]
    empty = [tar.name for tar, found in zip(tars, members, strict=True) if not found]
    if empty:
        raise DataError(f"shards without a sample: {', '.join(empty[:5])}. Expected key.jpg with key.cls, key.txt or key.json; "
                        "take them out.")
    shards = tuple(Shard(tar.name, len(found), tar.stat().st_size, sha256(tar)) for tar, found in zip(tars, members, strict=True))
    manifest = Manifest("caption", shards)
    if any("cls" in parts for found in members for _, parts in found):
        numbers = [str(number) for number in range(max(ShardIndex(Location(folder), manifest).labels(sys.maxsize)) + 1)]
        manifest = replace(manifest, kind="class", classes=names_for(place, classes, numbers))
    write_text(place / FILE, manifest.to_json())
    return place


def names_for(folder: Path, classes: str | None, numbers: list[str]) -> tuple[class_names.Phrases, ...]:
    """Class names of shards that exist: from a file, from the old manifest, or numbers."""
    if classes not in (None, "auto"):
        return class_names.read(str(classes), numbers)
    old = read(Location(str(folder))).classes if (folder / FILE).is_file() else None
    return old if old is not None and len(old) >= len(numbers) else tuple((number,) for number in numbers)


def command_for(folders: Sequence[Path]) -> str:
    """The command that trains on what was written."""
    captions = read(Location(str(folders[0]))).classes is None
    recipe = "--model aft.methods.ContrastivePretraining --trainer.max_epochs 1" if captions else "-c configs/methods/tecoa.yaml"
    held = folders[1] if len(folders) > 1 else "null --checkpoint.monitor null"
    return f"python train.py fit {recipe} -c configs/data/shards.yaml --data.init_args.train {folders[0]} --data.init_args.holdout {held}"


def main(args: Sequence[str] | None = None) -> list[Path]:
    """The command; returns the folders written."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.convert", description="Makes WebDataset shards with a manifest.")
    parser.add_argument("source", help="folder or .zip of CLASS/image, a .csv, .tsv, .json or .jsonl with captions, or shards to describe")
    parser.add_argument("out", nargs="?", help="folder for the shards; must be empty or missing")
    parser.add_argument("--per-shard", type=int, default=1000, help="samples a shard; training needs a shard or more a reader")
    parser.add_argument("--resize", type=int, help="reduce larger images to this shorter side, pixels; without it files stay as they are")
    parser.add_argument("--quality", type=int, default=95, help="of JPEGs that are written anew, 1 to 100")
    parser.add_argument("--holdout", type=int, default=0, help="images to put into OUT-holdout, balanced over the classes")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the samples")
    parser.add_argument("--max-bad-share", type=float, default=0.01, help="largest share of damaged images to leave out")
    parser.add_argument("--classes", default="auto", help="file with the class names; auto: classes.json beside the folder, else its names")
    parser.add_argument("--images", help="folder that the paths in a table start from; without it, the table's own")
    parser.add_argument("--image-column", default="image", help="column of a table with the paths")
    parser.add_argument("--caption-column", default="caption", help="column of a table with the texts")
    parser.add_argument("--manifest-only", action="store_true", help="write the manifest of shards that exist in SOURCE")
    given = parser.parse_args(args)
    if given.manifest_only:
        written = [describe(given.source, given.classes)]
    elif given.out is None:
        raise ConfigError("no folder for the shards is given: python -m datamodules.convert SOURCE OUT.")
    else:
        recipe = Recipe(given.per_shard, given.resize, given.quality, given.seed, given.max_bad_share)
        written = convert(given.source, given.out, recipe, holdout=given.holdout, classes=given.classes, images=given.images,
                          columns=(given.image_column, given.caption_column))
    print(command_for(written), flush=True)
    return written


if __name__ == "__main__":
    with ending_calmly():
        main()
