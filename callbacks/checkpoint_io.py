"""How a checkpoint gets to disk: whole or not at all, and the one before it is kept."""

from __future__ import annotations

import os
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

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None) -> None:
        """Saves atomically.

        Raises:
            RunError: it could not be written (disk full, say); the checkpoint that was there is untouched.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            keep_previous(target)
            os.replace(temporary, target)
            sync_folder(target.parent)
        except (OSError, RuntimeError) as error:
            kept = " The one that was there before is whole." if target.exists() else ""
            raise RunError(f"checkpoint {target} could not be written ({error}): make room, then --ckpt_path last.{kept}") from error
        finally:
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


def sync_folder(folder: Path) -> None:
    """Forces the renamed entry to disk, where the system can."""
    with suppress(OSError, AttributeError):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
