"""Files wherever they lie, read from the beginning as a stream: a folder, a server or a bucket (by fsspec), a shell command's output."""

from __future__ import annotations

import io
import re
import time
import warnings
from contextlib import suppress
from typing import Any, BinaryIO

import fsspec
from webdataset.gopen import gopen

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
TRIES = 5
FIRST_WAIT = 1.0  # seconds; twice as long each time
BLOCK = 2**22  # bytes asked of a server at once
FINAL = (FileNotFoundError, PermissionError, ImportError, ValueError)  # asked again, they would be answered the same


def open_stream(path: str) -> BinaryIO:
    """A file, opened to be read from its beginning to its end.

    Args:
        path: of a local file; a URL (``https://``, ``s3://``, ``gs://``, ``hf://`` ...); or ``pipe:`` and a shell command, which is
            for the caller to allow.

    Raises:
        OSError: it is not there, or could not be read after several tries.
        ImportError: a package for such URLs is missing; the message names it.
        ValueError: nobody knows such URLs.
    """
    if path.startswith("pipe:"):
        stream: BinaryIO = gopen(path)
        return stream
    if URL.match(path):
        return io.BufferedReader(Remote(path), BLOCK)
    return open(path, "rb")


class Remote(io.RawIOBase):
    """A remote file that is opened again, and goes on where it was, when the connection fails.

    Args:
        url: as fsspec knows it.

    Raises:
        OSError: still no answer after ``TRIES`` tries in a row, with waits of 1, 2, 4 ... seconds between them.
    """

    def __init__(self, url: str) -> None:
        self.url, self.place = url, 0
        self.file: Any = None
        self._try("open")

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes, as many as fit."""
        data: bytes = self._try("read", len(buffer))
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)

    def _try(self, what: str, size: int = 0) -> bytes:
        for turn in range(TRIES):
            try:
                if self.file is None:
                    self.file = self._open()
                data: bytes = self.file.read(size) if size else b""
                return data
            except FINAL:
                raise
            except Exception as error:  # each of fsspec's file systems has errors of its own
                self._drop()
                if turn == TRIES - 1:
                    raise OSError(f"{self.url}: no {what} after {TRIES} tries ({type(error).__name__}: {error})") from error
                warnings.warn(f"{self.url}: {type(error).__name__} at byte {self.place}, try {turn + 2} of {TRIES}", stacklevel=2)
                time.sleep(FIRST_WAIT * 2**turn)
        raise AssertionError("unreachable")

    def _open(self) -> Any:
        opened = fsspec.open(self.url, "rb").open()
        if self.place:
            try:
                opened.seek(self.place)
            except (ValueError, OSError):  # a server that only gives whole files
                left = self.place
                while left and (gone := len(opened.read(min(left, BLOCK)))):
                    left -= gone
        return opened

    def _drop(self) -> None:
        with suppress(Exception):
            self.file.close()
        self.file = None

    def close(self) -> None:
        """Lets the connection go."""
        self._drop()
        super().close()
