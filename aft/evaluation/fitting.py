"""How many images go through a model at once: as many as its memory takes. It changes no verdict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from aft.attacks.guards import naming_out_of_memory
from aft.errors import ConfigError, RunError
from aft.evaluation.judge import Cell

#: Images at once on a CPU, whose memory is seldom what ends: its caches are full long before.
ON_A_CPU = 100
#: Images that a probe begins with, and the most that it tries.
LEAST, MOST = 16, 4096


def images_at_once(asked: int | Literal["auto"], cell: Cell) -> int:
    """The batch size of a cell: the number that is asked for, or what fits.

    ``auto`` is 100 on a CPU. On a GPU a forward pass with the gradient of the pixels, the dearest that an attack does, is tried on 16, 32,
    64 ... images; half of the largest number that fits is taken, since attacks also hold points, gradients and records.

    Raises:
        ConfigError: a number below 1.
        RunError: not even 16 images fit.
    """
    if asked != "auto":
        if asked < 1:
            raise ConfigError(f"batch_size = {asked}: give one image or more, or auto.")
        return asked
    weight = next(cell.model.parameters())
    if weight.device.type != "cuda":
        return min(ON_A_CPU, len(cell.data))
    image_CHW = cell.in_space(cell.data.batch([0]).images.to(weight.device))[0]

    def run(count: int) -> None:
        """One pass of an attack on so many images."""
        leaf_nCHW = image_CHW.expand(count, -1, -1, -1).clone().requires_grad_(True)
        with torch.enable_grad():
            torch.autograd.grad(cell.model.encode(leaf_nCHW).precise.embedding_BD.square().sum(), leaf_nCHW)

    return half_of_what_fits(run, len(cell.data))


def half_of_what_fits(run: Callable[[int], None], wanted: int) -> int:
    """Half of the largest of 16, 32, 64 ... for which ``run`` does not end in a lack of memory; ``wanted`` where that is less.

    Args:
        run: tries so many images.
        wanted: how many there are.

    Raises:
        RunError: the first number does not fit.
    """
    count = LEAST
    while True:
        try:
            with naming_out_of_memory("the search for a batch size", torch.empty(count, 1, 1, 1)):
                run(count)
        except RunError:
            if count == LEAST:
                raise
            count //= 2
            break
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if count >= min(MOST, 2 * wanted):
            break
        count *= 2
    return max(1, min(wanted, count // 2))
