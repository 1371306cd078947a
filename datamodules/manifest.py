"""The manifest beside a set of shards: what they hold, so that nothing must be read to know how long an epoch is.

    {"schema": "aft.shards/1", "kind": "class" | "caption", "samples": N, "classes": [[name, phrase ...], ...] | null,
     "resize": pixels | null, "quality": 1..100 | null, "source": {"name": ..., "sha256": ...} | null,
     "shards": [{"name": "shard-00000.tar", "samples": n, "bytes": ..., "sha256": ...}, ...]}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from aft.errors import DataError
from datamodules.remote import URL, open_stream

SCHEMA = "aft.shards/1"
FILE = "manifest.json"
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.tar")  # no folder, no scheme, nothing that a shell would read
Kind = Literal["class", "caption"]
Verify = Literal["none", "size", "sha256"]


@dataclass(frozen=True)
class Shard:
    """One tar: file name, samples in it, length in bytes, and its sha256."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a set of shards holds.

    Args:
        kind: ``class`` (``key.cls``) or ``caption`` (``key.txt``, or ``caption`` in ``key.json``).
        shards: the tars, in their own order.
        classes: for each class every phrase that is true of it, its name first; none for captions.
        resize: shorter side that larger images were reduced to, pixels; none: the original files.
        quality: of the JPEGs that were written anew; none: the original files.
        source: name and sha256 of what the shards were made from; none: not known.
    """

    kind: Kind
    shards: tuple[Shard, ...]
    classes: tuple[tuple[str, ...], ...] | None = None
    resize: int | None = None
    quality: int | None = None
    source: dict[str, str] | None = None

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps({"schema": SCHEMA, **asdict(self), "samples": self.samples}, indent=1, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Location:
    """Where shards lie: a local folder, a URL that file names are put behind, or one with ``{}`` in their place.

    Args:
        path: folder, or a URL that fsspec opens (``https://``, ``s3://``, ``hf://`` ...).
        allow_pipe: let ``pipe:`` start a shell command.

    Raises:
        DataError: ``pipe:`` without leave.
    """

    path: str
    allow_pipe: bool = False

    def __post_init__(self) -> None:
        if self.path.startswith("pipe:") and not self.allow_pipe:
            raise DataError(f"{self.path!r} starts a shell command: set allow_pipe: true if you trust it, or give a folder or URL.")

    @property
    def folder(self) -> Path | None:
        """The local folder; none for a URL."""
        return None if URL.match(self.path) else Path(self.path)

    def of(self, name: str) -> str:
        """Path or URL of one file."""
        if self.folder is not None:
            return str(self.folder / name)
        return self.path.replace("{}", name) if "{}" in self.path else f"{self.path.rstrip('/')}/{name}"


def read(location: Location) -> Manifest:
    """The manifest at a location.

    Raises:
        DataError: it is missing, unreadable, of another schema, or contradicts itself.
    """
    url = location.of(FILE)
    try:
        with closing(open_stream(url)) as stream:
            return parse(json.loads(stream.read()))
    except (OSError, ImportError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{url} is no manifest of shards ({type(error).__name__}: {error}): make shards with python -m "
                        "datamodules.convert, or write one for shards that exist with python -m datamodules.convert FOLDER "
                        "--manifest-only.") from error


def parse(given: Mapping[str, Any]) -> Manifest:
    """A manifest from its JSON.

    Raises:
        ValueError, KeyError, TypeError: it lacks something or contradicts itself.
    """
    if given.get("schema") != SCHEMA:
        raise ValueError(f"schema is {given.get('schema')!r}, not {SCHEMA!r}")
    shards = tuple(Shard(str(s["name"]), int(s["samples"]), int(s["bytes"]), str(s["sha256"])) for s in given["shards"])
    wrong = [shard.name for shard in shards if not SHARD_NAME.fullmatch(shard.name) or shard.samples < 1]
    if wrong or not shards or len({shard.name for shard in shards}) < len(shards):
        raise ValueError(f"its shards must have plain names that end in .tar, each once, and a sample or more; not so: {wrong[:5]}")
    if given["kind"] not in ("class", "caption") or (given["kind"] == "class") != bool(given.get("classes")):
        raise ValueError(f"kind = {given['kind']!r} must be 'class' with a list of classes, or 'caption' without one")
    classes = tuple(tuple(map(str, phrases)) for phrases in given["classes"]) if given.get("classes") else None
    found = Manifest(given["kind"], shards, classes, given.get("resize"), given.get("quality"), given.get("source"))
    if found.samples != given["samples"]:
        raise ValueError(f"samples = {given['samples']}, but its shards count {found.samples}")
    return found


def check(manifest: Manifest, location: Location, verify: Verify) -> None:
    """Compares local shards with their manifest; what lies behind a URL is checked while it is read.

    Args:
        verify: ``size`` compares lengths (quick), ``sha256`` reads every byte, ``none`` only asks that the files exist.

    Raises:
        DataError: shards are missing or differ; they are named.
    """
    if location.folder is None:
        return
    problems = [(shard.name, problem_of(location.folder / shard.name, shard, verify)) for shard in manifest.shards]
    wrong = [f"{name} ({problem})" for name, problem in problems if problem]
    if wrong:
        raise DataError(f"{len(wrong)} of {len(manifest.shards)} shards in {location.path!r} are not what {FILE} says: "
                        f"{'; '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}. Fetch or make them again; with verify: none "
                        "samples that are missing are skipped, up to max_bad_share.")


def problem_of(path: Path, shard: Shard, verify: Verify) -> str | None:
    """What is wrong with a shard's file, in a few words; none: nothing was found."""
    if not path.is_file():
        return "missing"
    if verify != "none" and path.stat().st_size != shard.bytes:
        return f"{path.stat().st_size} bytes, not {shard.bytes}"
    if verify == "sha256" and sha256(path) != shard.sha256:
        return "another sha256"
    return None


def sha256(path: Path) -> str:
    """Hash of a file, read in parts."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def stable_number(shard: str, key: str) -> int:
    """The number of a sample, whatever the order it is read in: 63 bits of a hash of shard and key."""
    return int.from_bytes(hashlib.blake2b(f"{shard}/{key}".encode(), digest_size=8).digest(), "big") >> 1
