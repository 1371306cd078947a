"""Projected gradient descent on images, and its one-step form.

Shapes: B images, C channels, H rows, W columns; n of them are still under attack.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from aft.attacks.base import Adversarial, Attack, Objective
from aft.attacks.search import Evaluation, Record, Walkers, per_image, value, value_and_gradient
from aft.attacks.threat_model import Norm, pixel_fraction
from aft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient descent: ``x <- P(x + a s(v))``, ``v <- m v + g / mean|g|``, from a random start.

    ``g`` is the gradient of the loss by the image, ``s`` the norm's step (``sign``, ``v / ||v||``, for L1 a sparse sign), ``P`` the
    projection on ball and box, ``a`` the step size and ``m`` the momentum. An image whose loss stops being finite goes back to its last
    good iterate (at first, the clean image) and stays there.

    Args:
        eps: radius in units of the pixel range, such as ``4/255``.
        step_size: ``a`` in units of the pixel range, such as ``1/255``; give this or ``relative_step_size``.
        relative_step_size: ``a`` as a share of eps, such as 0.25.
        steps: gradient steps in a run.
        norm: ``linf``, ``l2`` or ``l1``.
        restarts: runs from different starts; more than one needs ``keep="best"`` and a random start.
        momentum: ``m``, 0 or more; 0 is plain PGD.
        random_start: start uniform in the ball; otherwise at the clean image.
        keep: ``last`` returns the last iterate after exactly ``steps`` forward passes (training); ``best`` returns a broken iterate before
            any other and then the one with the highest loss, after ``steps + 1`` (evaluation).
        drop_broken: with ``keep="best"``, spend no further work on a sample once it is broken; its verdict is the same.

    Raises:
        ConfigError: a setting is out of range, or two contradict each other.

    Reference:
        Madry et al., arXiv 1706.06083; momentum as in MI-FGSM, arXiv 1710.06081 (RobustVLM's released loop adds signs instead, which for
        L-inf is the same as no momentum).

    Example:
        >>> PGD(eps="4/255", step_size="1/255", steps=10).describe()["keep"]
        'last'
    """

    name: ClassVar[str] = "pgd"

    eps: float | str
    steps: int
    step_size: float | str | None = None
    relative_step_size: float | None = None
    norm: Norm = "linf"
    restarts: int = 1
    momentum: float = 0.0
    random_start: bool = True
    keep: Literal["last", "best"] = "last"
    drop_broken: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", self.threat.radius)
        if (self.step_size is None) == (self.relative_step_size is None):
            raise ConfigError(
                f"step_size = {self.step_size} and relative_step_size = {self.relative_step_size}: give exactly one of the two, "
                "in units of the pixel range or as a share of eps."
            )
        for setting in ("step_size", "relative_step_size", "momentum"):
            if (given := getattr(self, setting)) is not None:
                object.__setattr__(self, setting, pixel_fraction(given, setting))
        need_at_least_one(steps=self.steps, restarts=self.restarts)
        if self.keep not in ("last", "best"):
            raise ConfigError(f"keep = {self.keep!r} is unknown: write last (training) or best (evaluation).")
        if self.restarts > 1 and not (self.keep == "best" and self.random_start):
            raise ConfigError(f"restarts = {self.restarts} needs keep = best and random_start = true: otherwise all but one are wasted.")

    @property
    def absolute_step_size(self) -> float:
        """The step size in units of the pixel range, whichever way it was given."""
        if self.step_size is None:
            return self.threat.radius * pixel_fraction(self.relative_step_size or 0.0)
        return pixel_fraction(self.step_size, "step_size")

    def describe(self) -> dict[str, Any]:
        """The settings as a plain dictionary, for result cards."""
        return {
            "name": self.name,
            "norm": self.norm,
            "eps": self.threat.radius,
            "steps": self.steps,
            "step_size": self.absolute_step_size,
            "restarts": self.restarts,
            "momentum": self.momentum,
            "random_start": self.random_start,
            "keep": self.keep,
        }

    def search(self, objective: Objective, x_BCHW: Tensor, keys_B: Tensor) -> Adversarial:
        """Runs every restart on the samples that are not broken; see :class:`PGD`."""
        return self._search(objective, x_BCHW, keys_B, None)

    def search_from(self, objective: Objective, x_BCHW: Tensor, keys_B: Tensor, start_BCHW: Tensor) -> Adversarial:
        """The same, with the first run from ``start_BCHW`` (inside ball and box); the other restarts are random."""
        return self._search(objective, x_BCHW, keys_B, start_BCHW)

    def _search(self, objective: Objective, x_BCHW: Tensor, keys_B: Tensor, start_BCHW: Tensor | None) -> Adversarial:
        record = Record(x_BCHW, best=self.keep == "best")
        rows_n = torch.arange(len(x_BCHW), device=x_BCHW.device)
        for draw in range(self.restarts):
            if draw and self.drop_broken:
                rows_n = record.open_rows()
            if not len(rows_n):
                break
            end_nCHW = self._run(objective, x_BCHW[rows_n], keys_B[rows_n], rows_n, draw, record, None if draw else start_BCHW)
        return record.result() if self.keep == "best" else record.result(end_nCHW)

    def start(self, x_nCHW: Tensor, keys_n: Tensor, draw: int = 0) -> Tensor:
        """Where a run begins when no point is given: uniform in the ball, or at the clean image."""
        return self.threat.random_start(x_nCHW, keys_n, draw) if self.random_start else x_nCHW

    def climb(self, x_nCHW: Tensor, gradient_nCHW: Tensor, clean_nCHW: Tensor) -> Tensor:
        """One step without momentum along a gradient that is known already, ``P(x + a s(g))``; not finite entries count as zero."""
        uphill_nCHW = self.threat.steepest_step(gradient_nCHW.nan_to_num(0, 0, 0))
        return self.threat.project(x_nCHW + self.absolute_step_size * uphill_nCHW, clean_nCHW)

    def _run(
        self, objective: Objective, x_nCHW: Tensor, keys_n: Tensor, rows_n: Tensor, draw: int, record: Record, start_nCHW: Tensor | None
    ) -> Tensor:
        """One run: ``steps`` times look, drop what is broken, go uphill; returns the points of those that are left."""
        start_nCHW = self.start(x_nCHW, keys_n, draw) if start_nCHW is None else start_nCHW
        walk = _Walk(rows_n, x_nCHW, start_nCHW, x_nCHW, torch.zeros_like(start_nCHW), torch.ones_like(rows_n, dtype=torch.bool))
        project = self.threat.around(x_nCHW)
        for _ in range(self.steps):
            seen, gradient_nCHW = value_and_gradient(objective, walk.point_nCHW, walk.rows_n)
            record.update(walk.rows_n, walk.point_nCHW, seen)
            walk.look(seen, gradient_nCHW, self.momentum)
            if self.keep == "best" and self.drop_broken:
                walk, before = walk.only(~record.broken_B[walk.rows_n]), walk
                project = project if walk is before else self.threat.around(walk.clean_nCHW)
            if not len(walk.rows_n):
                return walk.point_nCHW
            uphill_nCHW = project(walk.point_nCHW + self.absolute_step_size * self.threat.steepest_step(walk.velocity_nCHW))
            walk.point_nCHW = torch.where(per_image(walk.sound_n), uphill_nCHW, walk.good_nCHW)
        if self.keep == "best":
            record.update(walk.rows_n, walk.point_nCHW, value(objective, walk.point_nCHW, walk.rows_n))
        return walk.point_nCHW


@dataclass
class _Walk(Walkers):
    """PGD under way: where a sample is, the last point with a finite loss, and whether all losses were (``sound_n``)."""

    clean_nCHW: Tensor
    point_nCHW: Tensor
    good_nCHW: Tensor
    velocity_nCHW: Tensor
    sound_n: Tensor

    def look(self, seen: Evaluation, gradient_nCHW: Tensor, momentum: float) -> None:
        """Takes in the loss and the gradient at ``point_nCHW``."""
        self.sound_n = self.sound_n & seen.loss_n.isfinite()
        self.good_nCHW = torch.where(per_image(self.sound_n), self.point_nCHW, self.good_nCHW)
        if momentum:
            size_n111 = gradient_nCHW.abs().mean(dim=(1, 2, 3), keepdim=True)
            gradient_nCHW = momentum * self.velocity_nCHW + gradient_nCHW / torch.where(size_n111 > 0, size_n111, 1)
        self.velocity_nCHW = gradient_nCHW


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """Fast gradient sign method: one step of length eps, ``x <- P(x + eps s(g))``; returned without another forward pass.

    Args:
        eps: radius in units of the pixel range, such as ``4/255``.
        norm: ``linf`` (the sign), ``l2`` (the fast gradient method), or ``l1`` (a sparse sign).
        random_start: start uniform in the ball; otherwise at the clean image.
        keep: ``last`` or ``best``, as in :class:`PGD`.

    Reference:
        Goodfellow et al., arXiv 1412.6572; with a random start, Wong et al., arXiv 2001.03994 (whose step is 1.25 eps: that is a
        :class:`PGD` with ``steps=1, relative_step_size=1.25``).
    """

    name: ClassVar[str] = "fgsm"

    eps: float | str
    norm: Norm = "linf"
    random_start: bool = False
    keep: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", self._pgd.threat.radius)

    @property
    def _pgd(self) -> PGD:
        return PGD(eps=self.eps, relative_step_size=1.0, steps=1, norm=self.norm, random_start=self.random_start, keep=self.keep)

    def describe(self) -> dict[str, Any]:
        """The settings as a plain dictionary, for result cards."""
        return {**self._pgd.describe(), "name": self.name}

    def search(self, objective: Objective, x_BCHW: Tensor, keys_B: Tensor) -> Adversarial:
        """One step of :class:`PGD`."""
        return self._pgd.search(objective, x_BCHW, keys_B)

    def search_from(self, objective: Objective, x_BCHW: Tensor, keys_B: Tensor, start_BCHW: Tensor) -> Adversarial:
        """The same from given points."""
        return self._pgd.search_from(objective, x_BCHW, keys_B, start_BCHW)


def need_at_least_one(**counts: int) -> None:
    """Raises :class:`ConfigError` for a count that is not an integer of 1 or more."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"{name} = {count!r} is not a whole number of 1 or more: write how many there shall be.")
