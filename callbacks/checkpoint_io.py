"""How a checkpoint gets to disk: whole or not at all, and the one before it is kept."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from aft.errors import RunError

PREVIOUS = ".previous"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file beside the target, forces it to disk, and renames it; the target is whole at every moment.

    What was there before is kept as ``NAME.ckpt.previous``. (Lightning writes to the system's temporary folder and moves the file,
    which is no single act between two file systems.)
    """

    #: Asked before a file is put in place; raises where this process may not write any more.
    may_write: Callable[[], None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None) -> None:
        """Saves atomically.

        Raises:
            RunError: it could not be written (a full or read-only disk, say), or this process may not; the checkpoint that was there is
                untouched.
        """
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            if self.may_write is not None:
                self.may_write()
            keep_previous(target)
            os.replace(temporary, target)
            sync_folder(target.parent)
        except RunError:
            raise
        except (OSError, RuntimeError) as error:
            kept = " The one that was there before is whole." if target.exists() else ""
            remedy = f"make room or make it writable, then --ckpt_path last.{kept}"
            raise RunError(f"checkpoint {target} could not be written ({error}): {remedy}") from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads tensors and plain types only.

        Raises:
            RunError: the file is damaged; the one before it is named where there is one.
        """
        kwargs["weights_only"] = True
        try:
            contents: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
            return contents
        except (RuntimeError, EOFError) as error:
            previous = Path(f"{path}{PREVIOUS}")
            remedy = f"go on from {previous}" if previous.is_file() else "start anew"
            raise RunError(f"checkpoint {path} is damaged ({error}): {remedy}.") from error


def keep_previous(target: Path) -> None:
    """A second name for the file at ``target``, which outlives its replacement; no copy is made."""
    if not target.exists():
        return
    second = target.with_name(f".{target.name}.{os.getpid()}{PREVIOUS}")
    with suppress(FileNotFoundError):
        second.unlink()
    try:
        os.link(target, second)
    except OSError:  # a file system without links: the rename alone is still atomic
        return
    os.replace(second, Path(f"{target}{PREVIOUS}"))


def sweep(folder: Path) -> None:
    """Removes the temporary files of processes that were killed in a save; for who holds the run folder's lock."""
    for left in folder.glob(".*.ckpt.*"):
        if re.fullmatch(rf"\..+\.ckpt\.\d+({re.escape(PREVIOUS)})?", left.name):
            left.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Forces the renamed entry to disk, where the system can."""
    with suppress(OSError, AttributeError):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def newest_whole(path: Path) -> Path | None:
    """The checkpoint at ``path``, or the one before it where that one is damaged or missing (which is said); none: there is neither.

    Every byte is compared with the checksums that the file holds; torch does not look at them.

    Raises:
        RunError: both are damaged.
    """
    problems = {one: damage_of(one) for one in (path, Path(f"{path}{PREVIOUS}")) if one.is_file()}
    for one, problem in problems.items():
        if problem is None:
            if one != path:
                why = problems.get(path, "missing")
                warnings.warn(f"checkpoint {path} is {why}: going on from {one}, the one before it.", stacklevel=2)
            return one
    if problems:
        told = "; ".join(f"{one} ({problem})" for one, problem in problems.items())
        raise RunError(f"no checkpoint to go on from is whole: {told}. Start anew in another folder.")
    return None


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint's file; none: it is whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return f"damaged ({error})"
    return f"damaged (wrong checksum of {broken})" if broken else None
