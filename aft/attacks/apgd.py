"""Auto-PGD: projected gradient ascent that halves its own step size; untargeted on any objective, and targeted.

Shapes: B images, C channels, H rows, W columns; n of them are still under attack; T targets an image.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aft.attacks.base import Adversarial, Attack, Objective, Targetable
from aft.attacks.climb import Climb, SparseClimb, checkpoints, sparse_checkpoints
from aft.attacks.pgd import need_at_least_one
from aft.attacks.search import Record, value_and_gradient
from aft.attacks.threat_model import Norm, ThreatModel
from aft.errors import InputError


@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Auto-PGD: ``z = P(x_k + a s(g_k))``, ``x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}))``, with a step size of its own.

    Each sample starts with ``a = 2 eps``. At the checkpoints ``w_j = ceil(p_j steps)`` (:func:`checkpoints`) it halves ``a`` and goes on
    from its best point where fewer than 0.75 of the last window's steps raised the loss, or where neither ``a`` nor the best loss has
    changed since the last checkpoint. Takes ``steps + 1`` forward passes a restart and returns the best point.

    In L1 the steps are sparse, without momentum, and the schedule is another one (:class:`aft.attacks.climb.SparseClimb`).

    Args:
        eps: radius in units of the pixel range, such as ``4/255``.
        norm: ``linf``, ``l2`` or ``l1``.
        steps: gradient steps in a run.
        restarts: runs from different random starts.
        drop_broken: spend no further work on a sample once it is broken; its verdict is the same.

    Raises:
        ConfigError: a setting is out of range.

    Reference:
        Croce and Hein, arXiv 2003.01690; for L1 arXiv 2103.01208 (without its first runs at larger radii). Starts are uniform in the ball
        (released code: stretched to touch its surface; for L1 the projection of a normal point).
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
        kind, schedule = (SparseClimb, sparse_checkpoints) if self.norm == "l1" else (Climb, checkpoints)
        windows = dict(schedule(self.steps))
        start_nCHW = self.threat.random_start(x_BCHW[rows_n], keys_B[rows_n], draw)
        climb = kind.begin(rows_n, x_BCHW[rows_n], start_nCHW, self.threat.radius)
        for step in range(self.steps + 1):
            if step:
                climb.move(self.threat, first=step == 1)
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
        norm: ``linf``, ``l2`` or ``l1``.
        steps: gradient steps in a run.
        targets: T.
        restarts: runs for each target.
        drop_broken: spend no further work on a sample once it is broken; its verdict is the same.

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
    drop_broken: bool = True

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
        untargeted = APGD(eps=self.eps, norm=self.norm, steps=self.steps, drop_broken=self.drop_broken)
        for draw in range(self.targets * self.restarts):
            untargeted.run(objective.towards(targets_BT[:, draw // self.restarts]), x_BCHW, keys_B, draw, record)
        return record.result()


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
