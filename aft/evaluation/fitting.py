"""How many images go through a model at once: as many as its memory takes. It changes no verdict where images do not see their neighbours.

Shapes: n images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from aft.attacks import sample_keys
from aft.attacks.adaptive import HOT
from aft.attacks.guards import naming_out_of_memory
from aft.attacks.sight import opaque
from aft.clip.model import ZeroShotModel
from aft.clip.stages import Gate, Stage, Stages, draws_for, encode_in_stages
from aft.errors import ConfigError, RunError
from aft.evaluation.judge import Cell, stages_of

#: Images at once on a CPU, whose memory is seldom what ends: its caches are full long before.
ON_A_CPU = 100
#: Images that a probe begins with, and the most that it tries.
LEAST, MOST = 16, 4096


def images_at_once(asked: int | Literal["auto"], cell: Cell) -> int:
    """The batch size of a cell: the number that is asked for, or what fits.

    ``auto`` is 100 on a CPU. On a GPU a forward pass with the gradient of the pixels, the dearest that an attack does, is tried on 16, 32,
    64 ... images; half of the largest number that fits is taken, since attacks also hold points, gradients and records.

    Raises:
        ConfigError: a number below 1, or ``auto`` for a defence by which an image's result depends on its neighbours.
        RunError: not even 16 images fit.
    """
    if asked != "auto":
        if asked < 1:
            raise ConfigError(f"batch_size = {asked}: give one image or more, or auto.")
        return asked
    if any(stage.batch_coupled for stage in stages_of(cell.model).declared.values()):
        raise ConfigError("batch_size = auto: by this defence an image's result depends on its neighbours, so that another machine would "
                          "find another figure: give a number.")  # fmt: skip
    if next(cell.model.parameters()).device.type != "cuda":
        return min(ON_A_CPU, len(cell.data))
    return half_of_what_fits(attack_pass(cell), len(cell.data))


@dataclass(frozen=True)
class _Opened:
    """A model with all its gates half open: nothing is spared."""

    stages: Stages
    undefended: ZeroShotModel


def attack_pass(cell: Cell) -> Callable[[int], None]:
    """The dearest pass of an attack on so many images: through the smooth forms of all stages and the tower, to the pixels."""
    device = next(cell.model.parameters()).device
    image_CHW = cell.in_space(cell.data.batch([0]).images.to(device))[0]
    stages = Stages(**{name: _half_open(stage) for name, stage in stages_of(cell.model).declared.items()})
    model = _Opened(stages, cell.model.undefended)

    def run(count: int) -> None:
        """One pass."""
        leaf_nCHW = image_CHW.expand(count, -1, -1, -1).clone().requires_grad_(True)
        (draw,) = draws_for("attack", sample_keys(0, 0, torch.arange(count)).to(device))
        with torch.enable_grad():
            found = encode_in_stages(model, leaf_nCHW, draw, opaque(stages), HOT, hard_forward=True)
            torch.autograd.grad(found.precise.embedding_BD.square().sum(), leaf_nCHW)

    return run


def _half_open(stage: Stage) -> Stage:
    """The same with a statistic, and its graph, that is at the threshold whatever the image."""
    if (asked := stage.gate) is None:
        return stage

    def gate(*given: Any) -> Gate:
        """Asked all the same, since its graph takes room."""
        found = asked(*given)
        return Gate(0 * found.statistic_n + found.threshold, found.threshold)

    return replace(stage, gate=gate)


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
