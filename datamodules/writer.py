"""Writes tars whose bytes depend on their members alone: no times, no owners, one layout."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Writes (name, bytes) in order; the file appears under its name when it is whole.

    Args:
        path: the tar; an old one is replaced.
        members: names and contents.
    """
    unfinished = path.with_name(path.name + ".part")
    with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.mode = len(data), 0, 0o644
            tar.addfile(member, io.BytesIO(data))
    os.replace(unfinished, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, UTF-8; it appears under its name when it is whole."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
