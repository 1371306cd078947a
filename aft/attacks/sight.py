"""A staged model as one attack sees it: which stages it goes around, how it softens gates, and the dice that it throws.

Shapes: B images of a batch, n of them under attack, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aft.attacks import noise
from aft.clip.stages import Draw, Stage, Staged, Stages, act, as_attacked, draws_for, shut

#: Attacks on one batch that throw dice have so many draws each, and never see each other's.
DRAWS_AN_ATTACK = 1 << 24


class Dice:
    """The draws that an attack makes: each throw has new numbers, none of them those of the verdict or of the choice of a point.

    Args:
        keys_B: the samples' keys.
        attack: its place among the attacks on these samples.
    """

    def __init__(self, keys_B: Tensor, attack: int = 0) -> None:
        self.keys_B, self.next = keys_B, attack * DRAWS_AN_ATTACK

    def throw(self, rows_n: Tensor, count: int) -> list[Draw]:
        """``count`` new draws for the samples ``rows_n``; the same for a sample whatever its neighbours are, throw by throw."""
        draws = draws_for("attack", self.keys_B[rows_n], count, self.next)
        self.next += count
        return draws


class Sight:
    """A staged model through the eyes of an attack. It is a staged model itself: a task's ``forward`` takes it in the model's place.

    Attributes ``draw`` (the random numbers of the next forward) and ``temperature`` (of softened gates) are set before each forward.

    Args:
        model: with its stages; everything that a sight does not define is the model's.
        bpda: stages whose backward is the identity.
        closed: gated stages do what they do to images on which their gates are shut.
        hard_forward: with a temperature, forward as it is, backward smooth.
    """

    def __init__(self, model: Staged, bpda: Collection[str] = (), *, closed: bool = False, hard_forward: bool = True) -> None:
        self.model, self.bpda, self.closed, self.hard_forward = model, tuple(bpda), closed, hard_forward
        self.draw: Draw | None = None
        self.temperature: float | None = None
        self._looks = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    @property
    def undefended(self) -> Any:
        """The model's."""
        return self.model.undefended

    @property
    def stages(self) -> Stages:
        """The model's as attacked, with the draw inside: nothing of them is random any more."""
        stages = self.model.stages
        if self.closed:
            stages = Stages(**{name: _closed(stage) for name, stage in stages.declared.items()})
        altered = as_attacked(stages, self.bpda, self.temperature, self.hard_forward)
        return Stages(**{name: self._bound(stage) for name, stage in altered.declared.items()})

    def _bound(self, stage: Stage) -> Stage:
        """The stage with its gate inside, and the draw of this sight in the place of the one given."""
        return Stage(lambda value, *beside: act(stage, value, *beside[:-1], self._drawn(value) if stage.random else None),
                     stage.differentiable, batch_coupled=stage.batch_coupled)  # fmt: skip

    def _drawn(self, value: Tensor) -> Draw:
        """The draw that was set; where none was, a new one for each forward, by the images' places in the batch."""
        if self.draw is not None:
            return self.draw
        self._looks += 1
        places_n = torch.arange(len(value), device=value.device)
        return draws_for("attack", noise.sample_keys(0, 0, places_n), first=self._looks)[0]

    def excess(self, x_nCHW: Tensor) -> Tensor:
        """By how much each gate's statistic is above its threshold, relative to it (as it is for a threshold of 0), ``[gates, n]``.

        A gate sees what it would if those before it were shut; with a gradient where the caller wants one.
        """
        stages, shown_nCHW, found = self.model.stages, x_nCHW, []
        if stages.pixels is not None:
            if stages.pixels.gate is None:
                shown_nCHW = self._bound(stages.pixels).run(x_nCHW, None)
            else:
                found.append(stages.pixels.gate(x_nCHW, self.draw))
                shown_nCHW = shut(stages.pixels, x_nCHW, self.draw)
        if stages.embedding is not None and stages.embedding.gate is not None:
            found.append(stages.embedding.gate(shown_nCHW, self.draw))
        return torch.stack([(gate.statistic_n - gate.threshold) / (abs(gate.threshold) or 1.0) for gate in found])


def _closed(stage: Stage) -> Stage:
    """What is left of a stage whose gate is shut."""
    if stage.gate is None:
        return stage
    left_alone = replace(stage, gate=None, smooth=None, otherwise=None, differentiable=True)
    return replace(left_alone, run=lambda value, *beside: shut(stage, value, *beside))


def opaque(stages: Stages) -> list[str]:
    """Stages that nothing can be differentiated through: their own derivative says nothing, and they have no smooth form."""
    return [name for name, stage in stages.declared.items() if not stage.differentiable and stage.smooth is None]


def gated(stages: Stages) -> bool:
    """Whether any stage may leave an image as it is."""
    return any(stage.gated for stage in stages.declared.values())
