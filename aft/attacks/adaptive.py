"""What an attack maximises when it knows a test-time defence: the expected loss over the defence's draws, and gates.

The searches are those of every attack (PGD, APGD, Square); only the objective is new.

=========================  ==============================================================================================
A, static transfer         the objective of the undefended model, its point shown to the defended one
B, BPDA and EOT            :class:`Expected` over ``Sight(model, bpda=every stage)``
C, full and EOT            :class:`Expected` over ``Sight(model, bpda=opaque stages)`` with a temperature
D, gate evasion            :class:`Expected` over :class:`Evading`, its weight swept
E, queries                 ``Square`` on :class:`Expected`
F, restarts                a new ``Dice`` throw at every forward, other starts; draws of the verdict are never thrown
=========================  ==============================================================================================

Shapes: B images of a batch, n of them under attack, C channels, H rows, W columns.

Reference:
    Athalye et al., arXiv 1802.00420 (BPDA, EOT); Tramèr et al., arXiv 2002.08347; Croce et al., arXiv 2202.13711.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aft.attacks.base import Judged, Objective, Targetable
from aft.attacks.search import per_image
from aft.attacks.sight import Dice, Sight
from aft.clip.stages import Draw
from aft.errors import ConfigError, InputError

#: A gradient whose largest entry is below this counts as none.
NO_GRADIENT = 1e-12
#: Cosine that two independent means of gradients shall have.
WANTED_COSINE = 0.9
#: Temperature of softened gates at the start and at the end of a run.
HOT, COLD = 0.1, 0.01
#: How far beyond its threshold a gate is pushed, relative to the threshold.
GATE_MARGIN = 0.1


class Meter:
    """Counts, for each sample, the gradients that were taken and those that were zero or not finite.

    Args:
        count: B.
    """

    def __init__(self, count: int) -> None:
        self.taken_B = torch.zeros(count, dtype=torch.long)
        self.dead_B = torch.zeros(count, dtype=torch.long)

    def note(self, rows_n: Tensor, dead_n: Tensor) -> None:
        """Takes in one gradient of each of the samples ``rows_n``."""
        self.taken_B[rows_n.cpu()] += 1
        self.dead_B[rows_n.cpu()] += dead_n.cpu().long()


@dataclass(eq=False)
class Expected:
    """The mean of an objective over draws of a defence: ``E_w[L(D(x; w), y)]``, estimated anew at each call (EOT).

    The gradient is the mean over the draws, taken one at a time so that memory does not grow with their number, then scaled to a largest
    entry of 1 for each sample: a defence that shrinks gradients does not hide their direction. For a model without randomness the
    verdict is that of the forward (``exact``); for a random one there is none, so no lucky draw ends an attack.

    Args:
        inner: an objective made on ``sight``.
        sight: the model behind it.
        dice: where the draws come from.
        draws: how many a call; 1 for a model without randomness.
        exact: whether the forward that ``inner`` judges is the model's own.
        period: calls of one run (an attack's steps + 1), over which the temperature falls from 0.1 to 0.01; none: gates stay hard.
        meter: counts gradients; none: a new one.
    """

    inner: Objective
    sight: Sight
    dice: Dice
    draws: int = 1
    exact: bool = True
    period: int | None = None
    meter: Meter | None = None
    calls: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ConfigError(f"draws = {self.draws}: an expectation needs one draw or more.")
        self.random = self.sight.model.stages.random
        self.meter = self.meter or Meter(len(self.dice.keys_B))

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The model's."""
        return [module for module in (self.sight.model, self.sight.undefended) if isinstance(module, nn.Module)]

    def __call__(self, x_nCHW: Tensor, rows_n: Tensor) -> Judged:
        """The mean loss, with the scaled gradient where ``x_nCHW`` asks for one."""
        self._cool()
        thrown = self._throw(rows_n)
        losses, broken_n, gradient_nCHW = [], None, torch.zeros_like(x_nCHW) if x_nCHW.requires_grad else None
        for draw in thrown:
            self.sight.draw = draw
            judged, slope_nCHW = self._one(x_nCHW, rows_n, gradient_nCHW is not None)
            losses.append(judged.loss_n.detach())
            broken_n = judged.broken_n
            if gradient_nCHW is not None and slope_nCHW is not None:
                gradient_nCHW = gradient_nCHW + slope_nCHW
        loss_n = torch.stack(losses).mean(0)
        if gradient_nCHW is not None:
            loss_n = _WithGradient.apply(x_nCHW, loss_n, self._scaled(gradient_nCHW, rows_n))
        return Judged(loss_n, broken_n if self.exact and not self.random else None)

    def value(self, x_nCHW: Tensor, rows_n: Tensor, draws: Sequence[Draw | None]) -> Tensor:
        """The mean loss over given draws, with its own graph: what the gradient is the gradient of, ``[n]``."""
        losses = []
        for draw in draws:
            self.sight.draw = draw
            losses.append(self.inner(x_nCHW, rows_n).loss_n)
        return torch.stack(losses).mean(0)

    def wrong_classes(self, x_nCHW: Tensor, rows_n: Tensor, count: int) -> Tensor:
        """The inner objective's, for one draw."""
        (self.sight.draw,) = self._throw(rows_n)[:1]
        return self._aimable().wrong_classes(x_nCHW, rows_n, count)

    def towards(self, targets_B: Tensor, loss: Literal["dlr_targeted", "margin_targeted"] = "dlr_targeted") -> Expected:
        """The same expectation of the targeted loss; dice and meter stay shared."""
        return replace(self, inner=self._aimable().towards(targets_B, loss))

    def _aimable(self) -> Targetable:
        if not isinstance(self.inner, Targetable):
            raise InputError(f"{type(self.inner).__name__} cannot be aimed: a targeted attack needs its methods wrong_classes and towards.")
        return self.inner

    def _throw(self, rows_n: Tensor) -> list[Draw | None]:
        return [*self.dice.throw(rows_n, self.draws)] if self.random else [None]

    def _cool(self) -> None:
        if self.period is not None:
            done = (self.calls % self.period) / max(1, self.period - 1)
            self.sight.temperature = HOT * (COLD / HOT) ** done
        self.calls += 1

    def _one(self, x_nCHW: Tensor, rows_n: Tensor, wanted: bool) -> tuple[Judged, Tensor | None]:
        """Loss and gradient for the draw that is set; none where nothing reaches the images."""
        if not wanted:
            with torch.no_grad():
                return self.inner(x_nCHW, rows_n), None
        leaf_nCHW = x_nCHW.detach().requires_grad_(True)
        judged = self.inner(leaf_nCHW, rows_n)
        if not judged.loss_n.requires_grad:
            return judged, None
        return judged, torch.autograd.grad(judged.loss_n.sum(), leaf_nCHW, allow_unused=True)[0]

    def _scaled(self, gradient_nCHW: Tensor, rows_n: Tensor) -> Tensor:
        """Each sample's gradient with a largest entry of 1; the meter hears of those that are none."""
        assert self.meter is not None
        largest_n = torch.linalg.vector_norm(gradient_nCHW, ord=torch.inf, dim=(1, 2, 3))
        sound_n = largest_n.isfinite()
        self.meter.note(rows_n, ~sound_n | (largest_n / self.draws < NO_GRADIENT))
        usable_n = sound_n & (largest_n >= torch.finfo(largest_n.dtype).tiny)
        return torch.where(per_image(usable_n), gradient_nCHW / per_image(torch.where(usable_n, largest_n, 1)), 0.0)


class _WithGradient(torch.autograd.Function):
    """Losses that are known already, with the gradient by the images that is known already."""

    @staticmethod
    def forward(ctx: Any, x_nCHW: Tensor, loss_n: Tensor, gradient_nCHW: Tensor) -> Tensor:
        """The losses."""
        ctx.save_for_backward(gradient_nCHW)
        return loss_n.clone()

    @staticmethod
    def backward(ctx: Any, upstream_n: Tensor) -> tuple[Tensor, None, None]:
        """Each sample's own."""
        (gradient_nCHW,) = ctx.saved_tensors
        return upstream_n[:, None, None, None] * gradient_nCHW, None, None


@dataclass(frozen=True, eq=False)
class Evading:
    """Raises the loss of the branch that is taken when no gate opens, and keeps gates shut:
    ``L_pass(x) - weight * sum_gates relu(excess + 0.1)``, ``excess = (statistic - threshold) / |threshold|``.

    Without a weight the two alternate: the loss while the image is right, the gates once it is wrong.

    Args:
        inner: the objective of the model with its gates shut; a loss that is positive where the image is wrong (the margin).
        sight: the model behind it, with ``closed=True``.
        weight: of the gates; none: alternating.
    """

    inner: Objective
    sight: Sight
    weight: float | None = 0.1

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The inner one's."""
        return self.inner.modules

    def __call__(self, x_nCHW: Tensor, rows_n: Tensor) -> Judged:
        """Broken where the image is wrong and every gate is shut: then the defended model is wrong, too."""
        passed = self.inner(x_nCHW, rows_n)
        excess_gn = self.sight.excess(x_nCHW).to(passed.loss_n.dtype)
        pushed_n = torch.relu(excess_gn + GATE_MARGIN).sum(0)
        broken_n = None if passed.broken_n is None else passed.broken_n & (excess_gn.detach() <= 0).all(0)
        if self.weight is not None:
            return Judged(passed.loss_n - self.weight * pushed_n, broken_n)
        wrong_n = passed.loss_n.detach() > 0
        return Judged(torch.where(wrong_n, 1 / (1 + pushed_n), passed.loss_n.clamp(max=0)), broken_n)


def eot_count(cosine: float, most: int) -> int:
    """Draws that a gradient needs: ``n = ceil(9 (1 - c) / c)``, at least 1 and at most ``most``.

    Two independent means of n gradients, of which two single ones have the cosine c, have the cosine ``n c / (n c + 1 - c)``;
    the n above makes it 0.9.

    Args:
        cosine: c, of two single-draw gradients of one image (the median over images).
        most: what may be spent.

    Example:
        >>> [eot_count(c, 1000) for c in (1.0, 0.9, 0.5, 0.3, 0.1)], eot_count(0.0, 128)
        ([1, 1, 9, 21, 81], 128)
    """
    if not cosine > 0:
        return most
    ratio = WANTED_COSINE / (1 - WANTED_COSINE)
    return min(most, max(1, math.ceil(round(ratio * (1 - cosine) / cosine, 6))))


def reached_cosine(cosine: float, draws: int) -> float:
    """``n c / (n c + 1 - c)``: what two independent means of n gradients have.

    Example:
        >>> round(reached_cosine(0.5, 9), 4)
        0.9
    """
    held = max(cosine, 0.0)
    return draws * held / (draws * held + 1 - held)


def draw_cosines(objective: Expected, x_BCHW: Tensor) -> Tensor:
    """Cosine of two gradients of each image, each for one draw of its own, ``[B]``; 0 where one of them is zero."""
    rows_B = torch.arange(len(x_BCHW), device=x_BCHW.device)
    single = replace(objective, draws=1, meter=None)
    gradients = []
    for _ in range(2):
        leaf_BCHW = x_BCHW.detach().requires_grad_(True)
        (slope_BCHW,) = torch.autograd.grad(single(leaf_BCHW, rows_B).loss_n.sum(), leaf_BCHW)
        gradients.append(slope_BCHW.flatten(1).double())
    return torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=1)


def gate_rates(model: Any, x_BCHW: Tensor, draws: Sequence[Draw | None]) -> Tensor:
    """The share of the draws for which any gate opens on each image, ``[B]``, without a graph."""
    sight, opened = Sight(model), []
    with torch.no_grad():
        for draw in draws:
            sight.draw = draw
            opened.append((sight.excess(x_BCHW) > 0).any(0))
    return torch.stack(opened).double().mean(0)
