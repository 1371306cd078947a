"""One process at a time trains in a run folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
from filelock import FileLock, Timeout

from aft.errors import RunError


class RunLock(L.Callback):
    """Holds ``FOLDER/run.lock`` while a run goes on; the system lets it go when the process ends, however it ends.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(folder / "run.lock", timeout=0)

    def acquire(self) -> None:
        """Takes it.

        Raises:
            RunError: another process has it.
        """
        try:
            self.lock.acquire()
        except Timeout as error:
            raise RunError(
                f"another process trains in {self.folder} right now: two would overwrite each other's checkpoints. Wait for it, stop it, "
                "or choose another folder with --trainer.default_root_dir FOLDER."
            ) from error
        except NotImplementedError:
            warnings.warn(f"the file system of {self.folder} has no locks: make sure that no other process trains there.", stacklevel=2)

    def release(self) -> None:
        """Lets it go; once is enough, more is no fault."""
        self.lock.release(force=True)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The run is over."""
        self.release()

    def on_exception(self, *_: Any) -> None:
        """The run was stopped."""
        self.release()
