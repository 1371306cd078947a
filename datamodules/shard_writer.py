"""From images of any source to shards with a manifest: in a fixed random order, with bytes that depend on the source alone."""

from __future__ import annotations

import hashlib
import io
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from aft.errors import ConfigError, DataError
from datamodules.base import mix
from datamodules.common import check_least
from datamodules.images import DAMAGED, FORMATS, THREADS, guard_size, report_damage, shorten
from datamodules.manifest import FILE, Manifest, Shard, sha256
from datamodules.sources import Source
from datamodules.writer import write_tar, write_text

ENDING = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
QUIET = 5.0  # seconds between two lines where the output is no terminal


@dataclass(frozen=True)
class Recipe:
    """How to write.

    Args:
        per_shard: files a shard; damaged ones are left out of it.
        resize: larger images are reduced to this shorter side, pixels (bicubic, aspect kept); none: all files stay as they are.
        quality: of the JPEGs written then, 1 to 100.
        seed: of the order.
        max_bad_share: largest share of damaged images to leave out, 0 to 1.

    Raises:
        ConfigError: a setting is out of range.
    """

    per_shard: int = 1000
    resize: int | None = None
    quality: int = 95
    seed: int = 0
    max_bad_share: float = 0.01

    def __post_init__(self) -> None:
        check_least(per_shard=(self.per_shard, 1), resize=(1 if self.resize is None else self.resize, 1), quality=(self.quality, 1),
                    seed=(self.seed, 0), max_bad_share=(self.max_bad_share, 0))
        if self.quality > 100:
            raise ConfigError(f"quality = {self.quality} is above 100: give 1 to 100.")


@dataclass(frozen=True)
class Task:
    """What to write.

    Args:
        source: the encoded images.
        classes: for each class its phrases; none for captions.
        labels, captions: one for each image of the source; one of the two is given.
        positions: the images to take.
        name: of the source, for the manifest.
    """

    source: Source
    classes: tuple[tuple[str, ...], ...] | None
    labels: Sequence[int] | None
    captions: Sequence[str] | None
    positions: list[int]
    name: str

    def text(self, position: int) -> tuple[str, bytes]:
        """Ending and content of what goes beside the image."""
        if self.labels is not None:
            return "cls", str(self.labels[position]).encode()
        assert self.captions is not None
        return "txt", self.captions[position].encode()


def write_set(task: Task, target: Path, recipe: Recipe) -> Manifest:
    """Writes the shards of a task in a random order that the seed decides, and last the manifest.

    Raises:
        DataError: too many images are damaged.
    """
    target.mkdir(parents=True, exist_ok=True)
    positions = np.array(task.positions)
    order = positions[np.argsort(mix(positions.astype(np.uint64) + mix([recipe.seed])), kind="stable")].tolist()
    shards: list[Shard] = []
    digests: dict[int, bytes] = {}
    bad: dict[int, str] = {}
    show = Progress(str(target), len(order))
    with ThreadPoolExecutor(THREADS) as pool:
        for started in range(0, len(order), recipe.per_shard):
            chunk = order[started:started + recipe.per_shard]
            members = []
            for position, (digest, found) in zip(chunk, pool.map(lambda p: prepare(task.source, p, recipe), chunk), strict=True):
                digests[position] = digest
                if isinstance(found, str):
                    bad[position] = found
                    continue
                text_ending, text = task.text(position)
                members += [(f"{position:09d}.{found[0]}", found[1]), (f"{position:09d}.{text_ending}", text)]
            if members:
                path = target / f"shard-{len(shards):05d}.tar"
                write_tar(path, members)
                shards.append(Shard(path.name, len(members) // 2, path.stat().st_size, sha256(path)))
            show(started + len(chunk))
    if not shards:
        raise DataError(f"none of the {len(order)} images of {task.name} can be decoded: fetch the data again.")
    report_damage(task.source, bad, recipe.max_bad_share)
    whole = hashlib.sha256(b"".join(digests[position] for position in sorted(digests))).hexdigest()
    manifest = Manifest("caption" if task.classes is None else "class", tuple(shards), task.classes, recipe.resize,
                        None if recipe.resize is None else recipe.quality, {"name": task.name, "sha256": whole})
    write_text(target / FILE, manifest.to_json())
    return manifest


def prepare(source: Source, position: int, recipe: Recipe) -> tuple[bytes, tuple[str, bytes] | str]:
    """Hash of an encoded image, and ending and bytes to write, or why it cannot be decoded."""
    try:
        data = source.read(position)
    except DAMAGED as error:
        return hashlib.sha256(b"").digest(), str(error)
    digest = hashlib.sha256(data).digest()
    try:
        return digest, encode(data, recipe.resize, recipe.quality)
    except DAMAGED as error:
        return digest, str(error)


def encode(data: bytes, resize: int | None, quality: int) -> tuple[str, bytes]:
    """Ending and bytes to write for an image: its own, or a smaller JPEG. A BMP becomes a PNG.

    Args:
        data: JPEG, PNG, WebP or BMP; decoded whole, to be sure that it can be.
        resize: shorter side to reduce larger images to, pixels; none: leave the size.
        quality: of a new JPEG.

    Raises:
        DecompressionBombError: too many pixels.
        OSError, SyntaxError, ValueError: the bytes are damaged.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        guard_size(image)
        image.load()
        kind, smaller = str(image.format), resize is not None and min(image.size) > resize
        if not smaller and kind in ENDING:
            return ENDING[kind], data
        picture = image.convert("RGB")
    out = io.BytesIO()
    if smaller and resize is not None:
        shorten(picture, resize).save(out, "JPEG", quality=quality)
        return "jpg", out.getvalue()
    picture.save(out, "PNG")
    return "png", out.getvalue()


class Progress:
    """One line that is written over in a terminal, else a line now and then.

    Args:
        what: is written.
        total: number of images.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.started, self.last = what, total, time.monotonic(), 0.0

    def __call__(self, done: int) -> None:
        """Shows how many are done."""
        now, end = time.monotonic(), done == self.total
        rate = done / max(now - self.started, 1e-9)
        line = f"{self.what}: {done:,} of {self.total:,} images, {rate:,.0f}/s"
        if sys.stdout.isatty():
            print(f"\r{line}", end="\n" if end else "", flush=True)
        elif end or now - self.last > QUIET:
            self.last = now
            print(line, flush=True)
