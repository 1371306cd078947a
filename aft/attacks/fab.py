"""FAB: fast adaptive boundary attack, which looks for the nearest adversarial image; here aimed at one wrong class after the other.

Shapes: B images, C channels, H rows, W columns, P = C * H * W; n of them are still under attack; T targets an image.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aft.attacks.base import Adversarial, Attack, Objective, Targetable
from aft.attacks.pgd import need_at_least_one
from aft.attacks.search import Evaluation, Record, Walkers, per_image, value, value_and_gradient
from aft.attacks.threat_model import Norm
from aft.errors import ConfigError, InputError

#: How far beyond the boundary a step goes; the largest weight of the clean image; how much of the way is kept once the image is broken.
OVERSHOOT, LARGEST_PULL, KEPT = 1.05, 0.1, 0.9


@dataclass(frozen=True, kw_only=True)
class FABTargeted(Attack):
    """Targeted FAB: steps to the linearised boundary between the right class and a wrong one, drawn to the clean image.

    With ``f = z_t - z_y`` and its gradient ``g`` at the point ``x``, the plane ``f(x) + <g, u - x> = 0`` stands for the boundary.
    ``d1`` and ``d2`` are the shortest ways in the box from ``x`` and from the clean image ``x0`` to it (:func:`shortest_way`);
    ``x <- clip((1 - a) (x + 1.05 d1) + a (x0 + 1.05 d2))`` with ``a = min(|d1| / (|d1| + |d2|), 0.1)``. A broken point beyond ``eps`` goes
    back to ``x0 + 0.9 (x - x0)``. A sample ends once it is broken within ``eps``; of the others the nearest broken point is cut to the ball
    and judged. Takes one forward pass for the clean logits and, for each target, two a step (one with a gradient), and one at the end.

    Args:
        eps: radius in units of the pixel range, such as ``4/255``.
        norm: ``linf`` or ``l2``.
        steps: steps towards each target.
        targets: T, the most likely wrong classes of the clean image in turn.

    Raises:
        ConfigError: a setting is out of range, or another norm.
        InputError: too few classes, or an objective that cannot be aimed (see :class:`aft.attacks.base.Targetable`).

    Reference:
        Croce and Hein, arXiv 1907.02044; targeted as in AutoAttack (arXiv 2003.01690).
    """

    name: ClassVar[str] = "fab_targeted"

    eps: float | str
    norm: Norm = "linf"
    steps: int = 100
    targets: int = 9

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", self.threat.radius)
        need_at_least_one(steps=self.steps, targets=self.targets)
        if self.norm == "l1":
            raise ConfigError("norm = 'l1': FAB is here for linf and l2; use PGD and APGD for l1.")

    def describe(self) -> dict[str, Any]:
        """The settings as a plain dictionary, for result cards."""
        return {"name": self.name, "norm": self.norm, "eps": self.threat.radius, "steps": self.steps, "step_size": "adaptive",
                "restarts": 1, "keep": "best", "targets": self.targets}  # fmt: skip

    def search(self, objective: Objective, x_BCHW: Tensor, keys_B: Tensor) -> Adversarial:
        """Every target in turn, on the samples that are not broken within ``eps``; see :class:`FABTargeted`."""
        if not isinstance(objective, Targetable):
            raise InputError(f"{type(objective).__name__} cannot be aimed: a targeted attack needs its methods wrong_classes and towards.")
        rows_B = torch.arange(len(x_BCHW), device=x_BCHW.device)
        with torch.no_grad():
            targets_BT = objective.wrong_classes(x_BCHW, rows_B, self.targets)
        record = Record(x_BCHW)
        for targets_B in targets_BT.T:
            self._run(objective.towards(targets_B, "margin_targeted"), x_BCHW, record)
        return record.result()

    def _run(self, objective: Objective, x_BCHW: Tensor, record: Record) -> None:
        rows_n = record.open_rows()
        walk = _Walk(rows_n, x_BCHW[rows_n], x_BCHW[rows_n], x_BCHW[rows_n], x_BCHW.new_full(rows_n.shape, torch.inf))
        for _ in range(self.steps):
            if not len(walk.rows_n):
                return
            seen, gradient_nCHW = value_and_gradient(objective, walk.point_nCHW, walk.rows_n)
            self._note(walk, seen, record)
            walk.point_nCHW = self._step(walk, seen.loss_n, gradient_nCHW)
            ahead = value(objective, walk.point_nCHW, walk.rows_n)
            self._note(walk, ahead, record)
            if ahead.broken_n is not None:
                back_nCHW = walk.clean_nCHW.lerp(walk.point_nCHW, KEPT)
                walk.point_nCHW = torch.where(per_image(ahead.broken_n), back_nCHW, walk.point_nCHW)
            walk = walk.only(~record.broken_B[walk.rows_n])
        self._finish(objective, walk, record)

    def _note(self, walk: "_Walk", seen: Evaluation, record: Record) -> None:
        """Tells the record of the points within the ball, and keeps the nearest of the broken ones beyond it."""
        within_n = (self.threat.project(walk.point_nCHW, walk.clean_nCHW) == walk.point_nCHW).flatten(1).all(1)
        broken_n = None if seen.broken_n is None else seen.broken_n[within_n]
        chosen = Evaluation(seen.loss_n[within_n], broken_n, seen.finite_n[within_n])
        record.update(walk.rows_n[within_n], walk.point_nCHW[within_n], chosen)
        if seen.broken_n is not None:
            length_n = _length(walk.point_nCHW - walk.clean_nCHW, self.norm)
            nearer_n = seen.broken_n & (length_n < walk.length_n)
            walk.length_n = torch.where(nearer_n, length_n, walk.length_n)
            walk.nearest_nCHW = torch.where(per_image(nearer_n), walk.point_nCHW, walk.nearest_nCHW)

    def _step(self, walk: "_Walk", loss_n: Tensor, gradient_nCHW: Tensor) -> Tensor:
        """One step; where the gradient is zero there is no plane, and the point stays."""
        missing_n = -loss_n
        missing_clean_n = missing_n + (gradient_nCHW * (walk.point_nCHW - walk.clean_nCHW)).flatten(1).sum(1)
        way_nCHW = shortest_way(walk.point_nCHW, gradient_nCHW, missing_n, self.norm)
        clean_way_nCHW = shortest_way(walk.clean_nCHW, gradient_nCHW, missing_clean_n, self.norm)
        length_n, clean_length_n = (_length(way, self.norm).clamp_min(1e-8) for way in (way_nCHW, clean_way_nCHW))
        pull_n = per_image((length_n / (length_n + clean_length_n)).clamp_max(LARGEST_PULL))
        ahead_nCHW = walk.point_nCHW + OVERSHOOT * way_nCHW
        moved_nCHW = (ahead_nCHW.lerp(walk.clean_nCHW + OVERSHOOT * clean_way_nCHW, pull_n)).clamp(0, 1)
        flat_n = (gradient_nCHW == 0).flatten(1).all(1)
        return torch.where(per_image(flat_n), walk.point_nCHW, moved_nCHW)

    def _finish(self, objective: Objective, walk: "_Walk", record: Record) -> None:
        """The nearest broken point beyond the ball may stay broken when it is cut to it."""
        if not len(walk.rows_n):
            return
        cut_nCHW = self.threat.project(walk.nearest_nCHW, walk.clean_nCHW)
        record.update(walk.rows_n, cut_nCHW, value(objective, cut_nCHW, walk.rows_n))


@dataclass
class _Walk(Walkers):
    """FAB under way: the point, and the nearest broken point with its distance."""

    clean_nCHW: Tensor
    point_nCHW: Tensor
    nearest_nCHW: Tensor
    length_n: Tensor


def shortest_way(x_nCHW: Tensor, normal_nCHW: Tensor, missing_n: Tensor, norm: Norm) -> Tensor:
    """The shortest ``d`` with ``<g, d> = m`` and ``x + d`` in [0, 1]; as far as the box allows where it does not reach.

    Every value moves in the direction that helps, by ``min(t v, room)`` with ``v = 1`` for L-inf and ``v = |g|`` for L2, where ``t`` solves
    ``sum |g| min(t v, room) = |m|``: piecewise linear in ``t``, so its solution lies in one of P pieces.

    Args:
        x_nCHW: points in the box.
        normal_nCHW: ``g``.
        missing_n: ``m``.
        norm: in which the way is shortest.

    Returns:
        ``d``, ``[n, C, H, W]``.

    Reference:
        Croce and Hein, arXiv 1907.02044 (projections on a hyperplane and the box).

    Example:
        >>> import torch
        >>> shortest_way(torch.full((1, 1, 1, 2), 0.5), torch.tensor([[[[3.0, -1.0]]]]), torch.tensor([0.8]), "linf")
        tensor([[[[ 0.2000, -0.2000]]]])
    """
    x_nP, normal_nP = x_nCHW.flatten(1), normal_nCHW.flatten(1)
    direction_nP = (missing_n.sign()[:, None] * normal_nP).sign()
    weight_nP = normal_nP.abs()
    room_nP = torch.where(direction_nP > 0, 1 - x_nP, x_nP) * direction_nP.abs()
    speed_nP = torch.ones_like(weight_nP) if norm == "linf" else weight_nP
    full_nP, order_nP = torch.where(direction_nP != 0, room_nP / speed_nP, 0).sort(1)  # t at which each value has reached the box
    gain_nP = (weight_nP * speed_nP).gather(1, order_nP)
    filled_nP = (weight_nP * room_nP).gather(1, order_nP).cumsum(1)
    slope_nP = gain_nP.flip(1).cumsum(1).flip(1)  # of this value and all later ones
    before_nP = torch.nn.functional.pad(filled_nP, (1, 0))[:, :-1]
    reached_nP = before_nP + slope_nP * full_nP
    wanted_n1 = missing_n.abs()[:, None]
    piece_n1 = torch.searchsorted(reached_nP.contiguous(), wanted_n1).clamp_max(x_nP.shape[1] - 1)
    rest_n1 = wanted_n1 - before_nP.gather(1, piece_n1)
    t_n1 = rest_n1 / slope_nP.gather(1, piece_n1).clamp_min(torch.finfo(x_nP.dtype).tiny)
    return (direction_nP * torch.minimum(t_n1.clamp_min(0) * speed_nP, room_nP)).reshape(x_nCHW.shape)


def _length(change_nCHW: Tensor, norm: Norm) -> Tensor:
    """Its length in that norm, ``[n]``."""
    length_n: Tensor = torch.linalg.vector_norm(change_nCHW, ord=torch.inf if norm == "linf" else 2, dim=(1, 2, 3))
    return length_n
