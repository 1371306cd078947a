"""Samples out of tars, in order and as they are: bytes by ending, never decoded by name, so that no pickle is ever opened."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from aft.errors import DataError
from datamodules.manifest import Location, Manifest, Shard, stable_number
from datamodules.remote import open_stream

IMAGES = ("jpg", "jpeg", "png", "webp")
ENDINGS = frozenset({*IMAGES, "cls", "txt", "json"})  # all else in a tar is passed over unread
META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class Sample:
    """One sample as it lies in its shard, or the note that it is missing.

    Args:
        shard, key: its names; the key of a missing one is its place in the shard.
        parts: bytes by ending, such as ``jpg`` and ``cls``; empty when it is missing.
        problem: why it is missing; none: it is there.
    """

    shard: str
    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    problem: str | None = None

    @property
    def name(self) -> str:
        """What a message calls it."""
        return f"{self.shard}/{self.key}"

    @property
    def index(self) -> int:
        """Its stable number, 63 bits."""
        return stable_number(self.shard, self.key)

    def image(self) -> bytes:
        """The encoded image.

        Raises:
            ValueError: it has none.
        """
        found = next((self.parts[ending] for ending in IMAGES if ending in self.parts), None)
        if found is None:
            raise ValueError(self.problem or f"no image: it has {sorted(self.parts)}, expected one of {', '.join(IMAGES)}")
        return found

    def captions(self) -> list[str]:
        """All its texts: the lines of ``.txt``; of ``.json`` the list ``captions``, else ``caption``.

        Raises:
            ValueError: it has none.
        """
        if "txt" in self.parts:
            texts = [" ".join(line.split()) for line in self.parts["txt"].decode().splitlines()]
        else:
            told = json.loads(self.parts.get("json", b"null"))
            given = told.get("captions") if isinstance(told, dict) else None
            texts = [" ".join(text.split()) for text in given if isinstance(text, str)] if isinstance(given, list) else [self.caption()]
        if not any(texts):
            raise ValueError("no caption in .txt or .json")
        return [text for text in texts if text]

    def label(self, classes: int) -> int:
        """Its class.

        Raises:
            ValueError: ``.cls`` is missing, no number, or outside the list of classes.
        """
        label = int(self.parts.get("cls", b"").decode())
        if not 0 <= label < classes:
            raise ValueError(f"class {label} is outside the list of {classes} classes")
        return label

    def caption(self) -> str:
        """Its text: ``.txt``, or ``caption`` in ``.json``.

        Raises:
            ValueError: it has none.
        """
        given = self.parts["txt"].decode() if "txt" in self.parts else json.loads(self.parts.get("json", b"null"))
        text = given.get("caption") if isinstance(given, dict) else given
        if not isinstance(text, str) or not text.strip():
            raise ValueError("no caption in .txt or .json")
        return " ".join(text.split())


def read_shard(location: Location, shard: Shard, first: int, last: int) -> Iterator[Sample]:
    """The samples ``first`` to ``last`` of a shard, exactly so many: what a broken tar does not give comes as missing.

    Raises:
        DataError: the shard has more samples than its manifest says.
    """
    problems: list[str] = []

    def note(error: Exception) -> bool:
        """Keeps what is wrong; the archive is read on."""
        problems.append(f"{type(error).__name__}: {error.args[0] if error.args else ''}")
        return False

    given = 0
    stream = samples_of(location.of(shard.name), note)
    for parts in islice(stream, first, last):
        given += 1
        yield Sample(shard.name, str(parts.pop("__key__")), {key: value for key, value in parts.items() if isinstance(value, bytes)})
    for place in range(first + given, last):
        yield Sample(shard.name, f"#{place}", problem=f"the tar ends early ({'; '.join(problems) or 'no more members'})")
    if given == last - first and last == shard.samples and next(stream, None) is not None:
        raise DataError(f"{shard.name} has more than the {shard.samples} samples of its manifest: write the manifest anew with "
                        "python -m datamodules.convert FOLDER --manifest-only.")
    stream.close()


def samples_of(url: str, note: Callable[[Exception], bool]) -> Generator[dict[str, object], None, None]:
    """The samples of one tar in order, read as a stream by ``webdataset``.

    Args:
        url: path or URL.
        note: is told of every error; what it returns says whether to go on.
    """
    try:
        stream = open_stream(url)
    except Exception as error:
        note(error)
        return
    try:
        files = tar_file_expander([{"url": url, "stream": stream}], handler=note, select_files=wanted)
        yield from group_by_keys(files, handler=note)
    finally:
        with suppress(OSError):  # a pipe that is closed early says so
            stream.close()


def wanted(member: str) -> bool:
    """Whether a member's ending is one of those that are read; notes of the format itself (``__x__``) are not."""
    return not META.match(member) and (base_plus_ext(member)[1] or "").lower() in ENDINGS


class ShardIndex:
    """All samples of local shards by place: headers are read once, bytes when they are asked for. A ``datamodules.sources.Source``.

    Args:
        location: a local folder.
        manifest: of these shards.

    Raises:
        DataError: the location is no folder, or a shard has another number of samples than its manifest says.
    """

    def __init__(self, location: Location, manifest: Manifest) -> None:
        if location.folder is None:
            raise DataError(f"{location.path!r} is not local: to validate or evaluate on shards, fetch them and give the folder.")
        self.folder, self.kind, self.classes = location.folder, manifest.kind, len(manifest.classes or ())
        self.members = [(shard.name, *member) for shard in manifest.shards for member in scan(self.folder / shard.name, shard.samples)]

    def __len__(self) -> int:
        return len(self.members)

    def name(self, position: int) -> str:
        """Folder, shard and key."""
        shard, key, _ = self.members[position]
        return f"{self.folder}/{shard}/{key}"

    def sample(self, position: int, endings: frozenset[str] = ENDINGS) -> Sample:
        """One sample, of its parts those with the given endings."""
        shard, key, places = self.members[position]
        with (self.folder / shard).open("rb") as file:
            parts = {ending: read_at(file, *place) for ending, place in places.items() if ending in endings}
        return Sample(shard, key, parts)

    def read(self, position: int) -> bytes:
        """The encoded image."""
        return self.sample(position, frozenset(IMAGES)).image()

    def labels(self, classes: int | None = None) -> list[int]:
        """The class of every sample.

        Args:
            classes: how many there are; none: as many as the manifest lists.

        Raises:
            DataError: a sample has none, or one outside the list.
        """
        found = []
        for position in range(len(self)):
            try:
                found.append(self.sample(position, frozenset({"cls"})).label(self.classes if classes is None else classes))
            except ValueError as error:
                raise DataError(f"{self.name(position)}.cls: {error}. Make the shards again.") from error
        return found

    def captions_by_image(self, positions: Sequence[int]) -> tuple[Tensor, list[list[str]]]:
        """The captions of each image: samples with the same encoded image are one.

        Returns:
            For each image the place in ``positions`` of its first sample, int64, and its captions.

        Raises:
            DataError: a sample has no caption.
        """
        first: dict[bytes, int] = {}
        captions: dict[bytes, list[str]] = {}
        for row, position in enumerate(positions):
            sample = self.sample(position)
            try:
                image, texts = hashlib.sha256(sample.image()).digest(), sample.captions()
            except ValueError as error:
                raise DataError(f"{self.name(position)}: {error}. Make the shards again.") from error
            first.setdefault(image, row)
            captions.setdefault(image, []).extend(texts)
        return torch.tensor(list(first.values())), list(captions.values())

    def indices(self) -> list[int]:
        """The stable number of every sample."""
        return [stable_number(shard, key) for shard, key, _ in self.members]


def read_at(file: io.BufferedReader, offset: int, size: int) -> bytes:
    """So many bytes from there."""
    file.seek(offset)
    return file.read(size)


def scan(path: Path, expected: int | None = None) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """Keys of a local tar in order, each with (offset, bytes) by ending; headers alone are read.

    Args:
        path: the tar.
        expected: samples it should have; none: any number.

    Raises:
        DataError: it cannot be read, or has another number of samples.
    """
    found: list[tuple[str, dict[str, tuple[int, int]]]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg() or not wanted(member.name):
                    continue
                key, ending = base_plus_ext(member.name)
                if not found or found[-1][0] != key:
                    found.append((key, {}))
                found[-1][1][ending.lower()] = (member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path} cannot be read as a tar ({error}): fetch it again.") from error
    if expected is not None and len(found) != expected:
        raise DataError(f"{path} has {len(found)} samples, its manifest says {expected}: fetch it again, or write the manifest anew "
                        "with python -m datamodules.convert FOLDER --manifest-only.")
    return found
