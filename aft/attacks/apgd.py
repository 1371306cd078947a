"""Auto-PGD: projected gradient ascent that halves its own step size; untargeted on any objective, and targeted.

Shapes: B images, C channels, H rows, W columns; n of them are still under attack; T targets an image.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aft.attacks.base import Adversarial, Attack, Objective, Targetable
from aft.attacks.pgd import need_at_least_one
from aft.attacks.search import Evaluation, Record, Walkers, per_image, value_and_gradient
from aft.attacks.threat_model import Norm, ThreatModel
from aft.errors import InputError

MOMENTUM = 0.75
RISES_NEEDED = 0.75


@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Auto-PGD: ``z = P(x_k + a s(g_k))``, ``x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}))``, with a step size of its own.

    Each sample starts with ``a = 2 eps``. At the checkpoints ``w_j = ceil(p_j steps)`` (:func:`checkpoints`) it halves ``a`` and goes on
    from its best point where fewer than 0.75 of the last window's steps raised the loss, or where neither ``a`` nor the best loss has
    changed since the last checkpoint. Takes ``steps + 1`` forward passes a restart and returns the best point.

    Args:
        eps: radius in units of the pixel range, such as ``4/255``.
        norm: ``linf`` or ``l2``.
        steps: gradient steps in a run.
        restarts: runs from different random starts.
        drop_broken: spend no further work on a sample once it is broken; its verdict is the same.

    Raises:
        ConfigError: a setting is out of range.

    Reference:
        Croce and Hein, arXiv 2003.01690. Starts are uniform in the ball (released code: stretched to touch its surface).
    """

    name: ClassVar[str] = "apgd"

    eps: float | str
    norm: Norm = "linf"
    steps: int = 100
    restarts: int = 1
    drop_broken: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", self.threat.radius)
        need_at_least_one(steps=self.steps, restarts=self.restarts)

    def describe(self) -> dict[str, Any]:
        """The settings as a plain dictionary, for result cards."""
        return _description(self.name, self.threat, self.steps, self.restarts)

    def search(self, objective: Objective, x_BCHW: Tensor, keys_B: Tensor) -> Adversarial:
        """Runs every restart on the samples that are not broken; see :class:`APGD`."""
        record = Record(x_BCHW)
        for draw in range(self.restarts):
            self.run(objective, x_BCHW, keys_B, draw, record)
        return record.result()

    def run(self, objective: Objective, x_BCHW: Tensor, keys_B: Tensor, draw: int, record: Record) -> None:
        """One run from the random start number ``draw``, told to ``record``."""
        rows_n = record.open_rows() if self.drop_broken else torch.arange(len(x_BCHW), device=x_BCHW.device)
        if not len(rows_n):
            return
        climb = _Climb.begin(rows_n, x_BCHW[rows_n], self.threat.random_start(x_BCHW[rows_n], keys_B[rows_n], draw), self.threat.radius)
        windows = dict(checkpoints(self.steps))
        for step in range(self.steps + 1):
            if step:
                climb.move(self.threat, MOMENTUM if step > 1 else 1.0)
            seen, gradient_nCHW = value_and_gradient(objective, climb.point_nCHW, climb.rows_n)
            record.update(climb.rows_n, climb.point_nCHW, seen)
            climb.look(seen, gradient_nCHW)
            if step in windows:
                climb.decide(windows[step])
            if self.drop_broken:
                climb = climb.only(~record.broken_B[climb.rows_n])
            if not len(climb.rows_n):
                return


@dataclass(frozen=True, kw_only=True)
class APGDTargeted(Attack):
    """Auto-PGD with the targeted DLR loss, towards each of the T most likely wrong classes of the clean image in turn.

    Takes one forward pass for the clean logits and ``steps + 1`` for each target and restart; a broken sample gets none after that.
    Needs T + 1 classes or more, and 4 for the loss.

    Args:
        eps: radius in units of the pixel range, such as ``4/255``.
        norm: ``linf`` or ``l2``.
        steps: gradient steps in a run.
        targets: T.
        restarts: runs for each target.

    Raises:
        ConfigError: a setting is out of range.
        InputError: too few classes, or an objective that cannot be aimed (see :class:`Targetable`).

    Reference:
        Croce and Hein, arXiv 2003.01690 (APGD-T).
    """

    name: ClassVar[str] = "apgd_targeted"

    eps: float | str
    norm: Norm = "linf"
    steps: int = 100
    targets: int = 9
    restarts: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", self.threat.radius)
        need_at_least_one(steps=self.steps, targets=self.targets, restarts=self.restarts)

    def describe(self) -> dict[str, Any]:
        """The settings as a plain dictionary, for result cards."""
        return {**_description(self.name, self.threat, self.steps, self.restarts), "targets": self.targets}

    def search(self, objective: Objective, x_BCHW: Tensor, keys_B: Tensor) -> Adversarial:
        """Runs every target and restart on the samples that are not broken; see :class:`APGDTargeted`."""
        if not isinstance(objective, Targetable):
            raise InputError(f"{type(objective).__name__} cannot be aimed: a targeted attack needs its methods wrong_classes and towards.")
        with torch.no_grad():
            targets_BT = objective.wrong_classes(x_BCHW, torch.arange(len(x_BCHW), device=x_BCHW.device), self.targets)
        record = Record(x_BCHW)
        untargeted = APGD(eps=self.eps, norm=self.norm, steps=self.steps)
        for draw in range(self.targets * self.restarts):
            untargeted.run(objective.towards(targets_BT[:, draw // self.restarts]), x_BCHW, keys_B, draw, record)
        return record.result()


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


def _description(name: str, threat: ThreatModel, steps: int, restarts: int) -> dict[str, Any]:
    return {
        "name": name,
        "norm": threat.norm,
        "eps": threat.radius,
        "steps": steps,
        "step_size": "adaptive",
        "restarts": restarts,
        "keep": "best",
    }


@dataclass
class _Climb(Walkers):
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
    def begin(cls, rows_n: Tensor, clean_nCHW: Tensor, start_nCHW: Tensor, eps: float) -> "_Climb":
        """At the start, before anything has been seen."""
        zero_nCHW, zero_n = torch.zeros_like(clean_nCHW), torch.zeros_like(rows_n)
        lowest_n = clean_nCHW.new_full(rows_n.shape, -torch.inf)
        two_eps_n = torch.full_like(lowest_n, 2 * eps)
        yes_n = torch.ones_like(rows_n, dtype=torch.bool)
        return cls(
            rows_n, clean_nCHW, start_nCHW, start_nCHW, zero_nCHW, lowest_n,
            start_nCHW, zero_nCHW, lowest_n, two_eps_n, zero_n, yes_n, lowest_n,
        )  # fmt: skip

    def move(self, threat: ThreatModel, momentum: float) -> None:
        """One step uphill, with ``1 - momentum`` of the last change."""
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
