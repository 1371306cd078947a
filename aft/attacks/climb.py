"""Auto-PGD's walk uphill and its schedule: for L-inf and L2, and the sparse one for L1.

Shapes: n images under attack, C channels, H rows, W columns.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from aft.attacks.search import Evaluation, Walkers, per_image
from aft.attacks.threat_model import ThreatModel, sparse_signs

MOMENTUM = 0.75
RISES_NEEDED = 0.75
#: Of L1's steps: the share of entries that the first ones move; what a step size is divided by, and how small it may get; what share of
#: the moved entries the next steps move; below which share of the last count the walk counts as having grown sparser.
FIRST_SHARE, SHORTER, SHORTEST, NEXT_SHARE, SPARSER = 0.2, 1.5, 0.1, 1 / 1.5, 0.95
SPARSE_WINDOW = 0.04


def checkpoints(steps: int) -> Iterator[tuple[int, int]]:
    """The checkpoints of the step-size schedule and the length of the window that ends there.

    ``p_0 = 0``, ``p_1 = 0.22``, ``p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)``; checkpoint ``w_j = ceil(p_j steps)``.

    Example:
        >>> list(checkpoints(100))[:4]
        [(22, 22), (41, 19), (57, 16), (70, 13)]
    """
    before, now, last = 0.0, 0.22, 0
    while now <= 1:
        at = math.ceil(round(now * steps, 6))
        if at > last:
            yield at, at - last
        before, now, last = now, now + max(now - before - 0.03, 0.06), at


def sparse_checkpoints(steps: int) -> Iterator[tuple[int, int]]:
    """The same for L1: every ``max(1, 0.04 steps)`` steps.

    Example:
        >>> list(sparse_checkpoints(100))[:3]
        [(4, 4), (8, 4), (12, 4)]
    """
    window = max(int(SPARSE_WINDOW * steps), 1)
    yield from ((at, window) for at in range(window, steps + 1, window))


@dataclass
class Climb(Walkers):
    """APGD under way: the point, the one before, the best (``peak``), each with loss and gradient, and the schedule's counters."""

    clean_nCHW: Tensor
    point_nCHW: Tensor
    previous_nCHW: Tensor
    gradient_nCHW: Tensor
    loss_n: Tensor
    peak_nCHW: Tensor
    peak_gradient_nCHW: Tensor
    peak_loss_n: Tensor
    step_size_n: Tensor
    rises_n: Tensor
    halved_n: Tensor
    peak_loss_at_check_n: Tensor

    @classmethod
    def begin(cls, rows_n: Tensor, clean_nCHW: Tensor, start_nCHW: Tensor, eps: float) -> "Climb":
        """At the start, before anything has been seen."""
        zero_nCHW, zero_n = torch.zeros_like(clean_nCHW), torch.zeros_like(rows_n)
        lowest_n = clean_nCHW.new_full(rows_n.shape, -torch.inf)
        two_eps_n = torch.full_like(lowest_n, 2 * eps)
        yes_n = torch.ones_like(rows_n, dtype=torch.bool)
        return cls(
            rows_n, clean_nCHW, start_nCHW, start_nCHW, zero_nCHW, lowest_n,
            start_nCHW, zero_nCHW, lowest_n, two_eps_n, zero_n, yes_n, lowest_n,
        )  # fmt: skip

    def move(self, threat: ThreatModel, first: bool) -> None:
        """One step uphill, with a quarter of the last change; the first step knows none."""
        momentum = 1.0 if first else MOMENTUM
        project = threat.around(self.clean_nCHW)
        ahead_nCHW = project(self.point_nCHW + per_image(self.step_size_n) * threat.steepest_step(self.gradient_nCHW))
        drift_nCHW = momentum * (ahead_nCHW - self.point_nCHW) + (1 - momentum) * (self.point_nCHW - self.previous_nCHW)
        self.point_nCHW, self.previous_nCHW = project(self.point_nCHW + drift_nCHW), self.point_nCHW

    def look(self, seen: Evaluation, gradient_nCHW: Tensor) -> None:
        """Takes in loss and gradient at the point; a loss that is not finite counts as the lowest."""
        loss_n = torch.where(seen.loss_n.isfinite(), seen.loss_n, -torch.inf).to(self.loss_n)
        higher_n = loss_n > self.peak_loss_n
        self.rises_n = self.rises_n + ((loss_n > self.loss_n) & self.loss_n.isfinite())
        self.peak_loss_n = torch.where(higher_n, loss_n, self.peak_loss_n)
        self.peak_nCHW = torch.where(per_image(higher_n), self.point_nCHW, self.peak_nCHW)
        self.peak_gradient_nCHW = torch.where(per_image(higher_n), gradient_nCHW, self.peak_gradient_nCHW)
        self.loss_n, self.gradient_nCHW = loss_n, gradient_nCHW

    def decide(self, window: int) -> None:
        """At a checkpoint: who halves the step size and returns to the best point."""
        stuck_n = ~self.halved_n & (self.peak_loss_n <= self.peak_loss_at_check_n)
        self.halved_n = (self.rises_n < RISES_NEEDED * window) | stuck_n
        self.step_size_n = torch.where(self.halved_n, self.step_size_n / 2, self.step_size_n)
        self.point_nCHW = torch.where(per_image(self.halved_n), self.peak_nCHW, self.point_nCHW)
        self.gradient_nCHW = torch.where(per_image(self.halved_n), self.peak_gradient_nCHW, self.gradient_nCHW)
        self.loss_n = torch.where(self.halved_n, self.peak_loss_n, self.loss_n)
        self.rises_n = torch.zeros_like(self.rises_n)
        self.peak_loss_at_check_n = self.peak_loss_n


@dataclass
class SparseClimb(Climb):
    """The same in L1: each step moves a share of the entries alone, and the share follows how sparse the best point is.

    A step is ``P(x + a s(g))`` without momentum, with ``a = eps`` at first and ``s`` the signs of the largest 0.2 of the entries
    (:func:`aft.attacks.threat_model.sparse_signs`). At each checkpoint, every ``max(1, 0.04 steps)`` steps, the share becomes two thirds of
    the share of entries that the best point has moved. Where that number fell below 0.95 of what it was, the walk starts anew from the best
    point with ``a = eps``; else ``a`` is divided by 1.5, down to ``eps / 10``.

    Reference:
        Croce and Hein, arXiv 2103.01208 (APGD for L1); the constants are those of the released code, as in package pyautoattack.
    """

    share_n: Tensor
    moved_n: Tensor
    largest_n: Tensor

    @classmethod
    def begin(cls, rows_n: Tensor, clean_nCHW: Tensor, start_nCHW: Tensor, eps: float) -> "SparseClimb":
        """At the start, before anything has been seen."""
        plain = Climb.begin(rows_n, clean_nCHW, start_nCHW, eps)
        eps_n = torch.full_like(plain.loss_n, eps)
        plain.step_size_n = eps_n
        all_n = torch.full_like(eps_n, clean_nCHW[0].numel())
        return cls(**vars(plain), share_n=torch.full_like(eps_n, FIRST_SHARE), moved_n=all_n, largest_n=eps_n)

    def move(self, threat: ThreatModel, first: bool) -> None:
        """One sparse step uphill."""
        step_nCHW = per_image(self.step_size_n) * sparse_signs(self.gradient_nCHW, self.share_n)
        self.point_nCHW = threat.project(self.point_nCHW + step_nCHW, self.clean_nCHW)

    def decide(self, window: int) -> None:
        """At a checkpoint: how many entries to move, how far, and from where."""
        moved_n = (self.peak_nCHW != self.clean_nCHW).flatten(1).sum(1).to(self.moved_n)
        sparser_n = moved_n < SPARSER * self.moved_n
        shorter_n = torch.maximum(self.step_size_n / SHORTER, SHORTEST * self.largest_n)
        self.step_size_n = torch.where(sparser_n, self.largest_n, shorter_n)
        self.share_n, self.moved_n = NEXT_SHARE * moved_n / self.clean_nCHW[0].numel(), moved_n
        self.point_nCHW = torch.where(per_image(sparser_n), self.peak_nCHW, self.point_nCHW)
        self.gradient_nCHW = torch.where(per_image(sparser_n), self.peak_gradient_nCHW, self.gradient_nCHW)
