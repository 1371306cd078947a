"""One process at a time trains in a run folder, and one that was given up writes no more."""

from __future__ import annotations

import json
import os
import socket
import uuid
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from filelock import FileLock, Timeout

from aft.errors import RunError


class RunLock(L.Callback):
    """Holds ``FOLDER/run.lock`` while a run goes on; the system lets it go when the process ends, however it ends.

    ``FOLDER/run.owner`` says who holds it. When SLURM starts a job again because a node was lost, a process of the start before may still
    live there: the new start takes the folder over, and the old process is refused when it next saves or logs (``still_ours``).

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.owner = folder / "run.owner"
        self.lock = FileLock(folder / "run.lock", timeout=0)
        self.me = {"start": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), **start_of_job()}

    def acquire(self) -> None:
        """Takes it.

        Raises:
            RunError: another process has it, and it is no earlier start of this job.
        """
        try:
            self.lock.acquire()
        except Timeout as error:
            holder = self._holder()
            if not is_before(holder, self.me):
                who = f" (process {holder['pid']} on {holder['host']}{', job ' + holder['job'] if holder['job'] else ''})" if holder else ""
                raise RunError(
                    f"another process trains in {self.folder} right now{who}: two would overwrite each other's checkpoints. Wait for it, "
                    "stop it, or choose another folder with --trainer.default_root_dir FOLDER."
                ) from error
            self._take_over(holder)
        except NotImplementedError:
            warnings.warn(f"the file system of {self.folder} has no locks: make sure that no other process trains there.", stacklevel=2)
        temporary = self.owner.with_name(f".run.owner.{os.getpid()}")
        temporary.write_text(json.dumps(self.me), encoding="utf-8")
        os.replace(temporary, self.owner)

    def _take_over(self, holder: dict[str, Any]) -> None:
        """Another file of the same name: a lock belongs to the file, not to its name."""
        print(f"process {holder['pid']} on {holder['host']}, of an earlier start of this job, still lives: it will write nothing more here")
        (self.folder / "run.lock").unlink(missing_ok=True)
        self.lock.acquire()

    def _holder(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self.owner.read_text(encoding="utf-8"))
            return found
        except (OSError, ValueError):
            return {}

    def still_ours(self) -> None:
        """Looks whether this start is still the one that may write.

        Raises:
            RunError: the run was started again elsewhere.
        """
        holder = self._holder()
        if holder and holder["start"] != self.me["start"]:
            raise RunError(
                f"the run in {self.folder} was started again (process {holder['pid']} on {holder['host']}): this process, of an earlier "
                "start, writes nothing more and ends."
            )

    def release(self) -> None:
        """Lets it go; once is enough, more is no fault."""
        self.lock.release(force=True)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """At each log entry."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            self.still_ours()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The run is over."""
        self.release()

    def on_exception(self, *_: Any) -> None:
        """The run was stopped."""
        self.release()


def start_of_job() -> dict[str, Any]:
    """The SLURM job of this process and how often it was started before; none outside of SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    return {"job": job, "restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0))}


def is_before(holder: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether the holder is of an earlier start of the same job."""
    return bool(holder) and me["job"] is not None and holder["job"] == me["job"] and holder["restarts"] < me["restarts"]
