"""Where encoded images lie: a folder per class, or a zip of one, read in place. A source gives bytes; nothing here decodes."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

from aft.errors import DataError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


class Source(Protocol):
    """Encoded images in a fixed order; a position in it is the stable number of a sample."""

    def __len__(self) -> int:
        """Number of files, damaged ones included."""

    def name(self, position: int) -> str:
        """What a message calls this file."""

    def read(self, position: int) -> bytes:
        """The encoded bytes; safe to call from several threads and from forked processes."""


class FilesBelow:
    """Files by their paths below a root."""

    root: Path
    members: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.members)

    def name(self, position: int) -> str:
        """Path of the file, the root included."""
        return str(self.root / self.members[position])

    def read(self, position: int) -> bytes:
        """The encoded bytes of one file."""
        return (self.root / self.members[position]).read_bytes()


class FolderSource(FilesBelow):
    """``ROOT/CLASS/anything.jpg``, sorted by class folder, then by path.

    Args:
        root: the folder that holds the class folders.

    Raises:
        DataError: the folder is missing or empty, or a class folder holds no image.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"{str(root)!r} is no folder: give a folder of class folders, or a .zip of one.")
        folders = [entry.name for entry in self.root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
        found = [str(PurePosixPath(*Path(base, file).relative_to(self.root).parts))
                 for folder in folders for base, _, files in os.walk(self.root / folder, followlinks=True) for file in files]
        self.members = image_members(found, folders, str(root))


class ZipSource:
    """The same layout inside a zip, read without unpacking. Every process opens the file for itself.

    Args:
        path: the zip; its members are ``CLASS/anything.jpg``.

    Raises:
        DataError: no such file, no zip, empty, or a class folder holds no image.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{str(path)!r} does not exist: give a folder of class folders, or a .zip of one.")
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        names = self._zip().namelist()
        folders = {PurePosixPath(name).parts[0] for name in names if "/" in name}
        self.members = image_members(names, sorted(folders), str(path))

    def _zip(self) -> zipfile.ZipFile:
        """The open zip of this process: a forked worker that shared the file offset would read other members' bytes."""
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = (os.getpid(), zipfile.ZipFile(self.path))
            except zipfile.BadZipFile as error:
                raise DataError(f"{str(self.path)!r} cannot be read as a zip ({error}): fetch it again, or give a folder.") from error
        return self._opened[1]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_opened": None}

    def __len__(self) -> int:
        return len(self.members)

    def name(self, position: int) -> str:
        """Path of the zip, then of the member."""
        return f"{self.path}/{self.members[position]}"

    def read(self, position: int) -> bytes:
        """The encoded bytes of one member."""
        return self.read_member(self.members[position])

    def read_member(self, member: str) -> bytes:
        """The encoded bytes of a member by its path."""
        return self._zip().read(member)


def open_source(path: str | Path) -> FolderSource | ZipSource:
    """A folder or a ``.zip`` as a source, by what lies at ``path``.

    Raises:
        DataError: nothing usable lies there.
    """
    return FolderSource(path) if Path(path).is_dir() else ZipSource(path)


def image_members(paths: Sequence[str], folders: Sequence[str], origin: str) -> tuple[str, ...]:
    """The image files among ``paths``, sorted by class folder and path; junk of archivers is left out.

    Args:
        paths: ``CLASS/...`` with forward slashes.
        folders: every class folder that exists, also those without files.
        origin: what an error calls the data.

    Returns:
        Sorted paths.

    Raises:
        DataError: no image at all, or class folders without one.
    """
    parts = [PurePosixPath(path).parts for path in paths if path.lower().endswith(SUFFIXES)]
    parts = sorted(p for p in parts if len(p) > 1 and not hidden(p[0]) and not p[-1].startswith("."))
    if not parts:
        raise DataError(f"{origin!r} holds no image: expected CLASS/anything with one of the endings {', '.join(SUFFIXES)}.")
    empty = sorted({folder for folder in folders if not hidden(folder)} - {p[0] for p in parts})
    if empty:
        raise DataError(f"{len(empty)} class folders of {origin!r} hold no image ({', '.join(empty[:5])}): fill or remove them.")
    return tuple("/".join(p) for p in parts)


def hidden(folder: str) -> bool:
    """Whether a folder is an archiver's or an editor's (``__MACOSX``, ``.cache``), no class."""
    return folder.startswith((".", "__MACOSX"))
