"""Where an evaluation runs: which share of the work, on which device, with how many threads; and how often it speaks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from aft.errors import ConfigError, RunError

SECONDS_BETWEEN_LINES = 10


@dataclass(frozen=True)
class Place:
    """This process among those that share the work; each may run anywhere that sees the same folder.

    Args:
        rank: from 0.
        world: how many there are.

    Raises:
        ConfigError: a rank that is not among them.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ConfigError(f"rank = {self.rank} of world = {self.world}: ranks are 0 to world - 1.")

    @classmethod
    def of_environment(cls) -> Place:
        """As torchrun and Lightning tell it (``RANK``, ``WORLD_SIZE``); alone where they say nothing."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def torch_device(name: str) -> torch.device:
    """The device of that name; of several GPUs the one that the launcher gave this process (``LOCAL_RANK``).

    Raises:
        RunError: CUDA is asked for where torch sees none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RunError("device = cuda, but torch sees no CUDA device: use cpu or auto, or install a CUDA build of torch.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def use_threads(count: int | None) -> None:
    """Sets torch's CPU threads, unless it is to choose for itself.

    Raises:
        ConfigError: fewer than one.
    """
    if count is not None and count < 1:
        raise ConfigError(f"threads = {count}: give 1 or more, or null for torch's own choice.")
    if count is not None:
        torch.set_num_threads(count)


def now_and_then(say: Callable[[str], None]) -> Callable[[str], None]:
    """``say``, but at most every ten seconds."""
    last = time.perf_counter()

    def perhaps(text: str) -> None:
        """Says it, if the last line is long enough ago."""
        nonlocal last
        if time.perf_counter() - last >= SECONDS_BETWEEN_LINES:
            last = time.perf_counter()
            say(text)

    return perhaps
