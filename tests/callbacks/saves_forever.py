"""A process that does nothing but save a checkpoint, until it is killed. (A module of its own: a server process imports it once.)"""

from __future__ import annotations

import tempfile
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from callbacks import AtomicCheckpointIO


def save_forever(path: Path, temporary_files: Path, said: Connection) -> None:
    """Saves 0, 1, 2, ... each with 8 MB beside it, and says so.

    Args:
        path: the checkpoint.
        temporary_files: where Python puts them, as by TMPDIR.
        said: gets each number once it is saved.
    """
    tempfile.tempdir = str(temporary_files)
    torch.set_num_threads(1)
    for value in count():
        AtomicCheckpointIO().save_checkpoint({"value": torch.tensor(float(value)), "bulk": torch.zeros(2_000_000)}, path)
        said.send(value)
