"""Remote files: a connection that fails is opened again and goes on where it was, up to a number of tries."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from datamodules import remote

CONTENT = os.urandom(100_000)
URL = "breaking://shards/a.tar"


class BreakingFile(io.BytesIO):
    """Fails at reads whose number is in ``Breaking.at``."""

    def read(self, size: int | None = -1) -> bytes:
        """So many bytes, or an error."""
        Breaking.reads += 1
        if Breaking.reads in Breaking.at:
            raise ConnectionError("cut")
        return super().read(size)

    def seek(self, place: int, whence: int = 0) -> int:
        """Where the server allows it."""
        if not Breaking.seeks:
            raise ValueError("cannot seek")
        return super().seek(place, whence)


class Breaking(MemoryFileSystem):
    """A server whose connections break."""

    protocol = "breaking"
    cachable = False
    reads, seeks, opened = 0, True, 0
    at: Sequence[int] = ()

    def _open(self, path: str, *args: object, **kwargs: object) -> BreakingFile:
        Breaking.opened += 1
        if "absent" in path:
            raise FileNotFoundError(path)
        return BreakingFile(CONTENT)


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered, with small reads and no waits."""
    fsspec.register_implementation("breaking", Breaking, clobber=True)
    for name, value in (("reads", 0), ("seeks", True), ("opened", 0), ("at", ())):
        monkeypatch.setattr(Breaking, name, value)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(remote, "BLOCK", 10_000)


@pytest.mark.parametrize("seeks", [True, False])
def test_a_broken_connection_loses_no_byte(monkeypatch: pytest.MonkeyPatch, seeks: bool) -> None:
    """Also where the server only gives whole files."""
    monkeypatch.setattr(Breaking, "seeks", seeks)
    monkeypatch.setattr(Breaking, "at", (1, 4, 5))
    with pytest.warns(UserWarning, match=r"ConnectionError at byte \d{4,}, try 2 of 5"), remote.open_stream(URL) as stream:
        assert stream.read() == CONTENT
    assert Breaking.opened == 4


def test_it_gives_up_and_says_after_how_many_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """An OSError, which a reader of shards counts as damage."""
    monkeypatch.setattr(Breaking, "at", range(1, 100))
    stream = remote.open_stream(URL)
    with pytest.warns(UserWarning, match="try 5 of 5"), pytest.raises(OSError, match=r"a.tar: no read after 5 tries .*cut"):
        stream.read(1)


def test_what_is_not_there_is_asked_for_once(tmp_path: Path) -> None:
    """And an unknown kind of URL is an error at once; local files are plain files."""
    with pytest.raises(FileNotFoundError):
        remote.open_stream("breaking://shards/absent.tar")
    assert Breaking.opened == 1
    with pytest.raises(ValueError, match="nowhere"):
        remote.open_stream("nowhere://a.tar")
    (tmp_path / "a").write_bytes(b"x")
    with remote.open_stream(str(tmp_path / "a")) as stream:
        assert stream.read() == b"x"
