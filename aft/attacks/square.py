"""Square attack: random search that needs no gradient, only losses.

Shapes: B images, C channels, H rows, W columns; n of them are still under attack.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aft.attacks import noise
from aft.attacks.base import Adversarial, Attack, Objective, check_input
from aft.attacks.guards import undisturbed
from aft.attacks.pgd import need_at_least_one
from aft.attacks.search import Record, Walkers, per_image, value
from aft.attacks.threat_model import Norm
from aft.errors import ConfigError

#: Where the share of the window is halved, as counted over 10,000 steps.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Square attack: repaints a random square of ``+-eps`` and keeps it where the loss has risen.

    It starts at vertical stripes of ``+-eps``. At each step a window of side ``round(sqrt(p H W))`` at a random place is moved by
    ``+-2 eps`` (one sign a channel) and cut to the ball; ``p`` is halved at fixed steps. Takes ``steps + 1`` forward passes, no gradient.

    Args:
        eps: radius in units of the pixel range, such as ``4/255``.
        norm: ``linf``.
        steps: windows tried.
        share: ``p`` at the start, the share of the image that a window covers.

    Raises:
        ConfigError: a setting is out of range, or another norm.

    Reference:
        Andriushchenko et al., arXiv 1912.00049 (the L-inf attack); ``share`` 0.8 as in AutoAttack (arXiv 2003.01690).
    """

    name: ClassVar[str] = "square"

    eps: float | str
    norm: Norm = "linf"
    steps: int = 5000
    share: float = 0.8

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", self.threat.radius)
        need_at_least_one(steps=self.steps)
        if self.norm != "linf":
            raise ConfigError(f"norm = {self.norm!r}: the Square attack is here for linf; use APGD for the others, and FAB for l2.")
        if not 0 < self.share <= 1:
            raise ConfigError(f"share = {self.share} is outside (0, 1]: it is the share of the image that the first windows cover.")

    def describe(self) -> dict[str, Any]:
        """The settings as a plain dictionary, for result cards."""
        return {"name": self.name, "norm": self.norm, "eps": self.threat.radius, "steps": self.steps, "step_size": "adaptive",
                "restarts": 1, "keep": "best", "share": self.share}  # fmt: skip

    def side(self, step: int, size: tuple[int, int]) -> int:
        """Side of the window at ``step`` (from 0) on images of ``size`` (H, W), in pixels: 1 or more, and it fits in."""
        counted = step * 10_000 // self.steps
        share = self.share / 2 ** sum(counted > at for at in HALVINGS)
        return max(1, min(*size, round(math.sqrt(share * size[0] * size[1]))))

    def search(self, objective: Objective, x_BCHW: Tensor, keys_B: Tensor) -> Adversarial:
        """Random search on the samples that are not broken; see :class:`Square`."""
        stripes_BC1W = _signs(noise.uniform(keys_B, 0, (x_BCHW.shape[1], 1, x_BCHW.shape[3])))
        return self._hunted(objective, x_BCHW, keys_B, self.threat.project(x_BCHW + self.threat.radius * stripes_BC1W.to(x_BCHW), x_BCHW))

    def going_on(self, objective: Objective, x_BCHW: Tensor, keys_B: Tensor, start_BCHW: Tensor) -> Adversarial:
        """The search from points that another attack has found, in the place of stripes.

        Args:
            objective, x_BCHW, keys_B: as of every attack.
            start_BCHW: images in the ball around ``x_BCHW``.
        """
        check_input(x_BCHW, keys_B)
        with undisturbed(objective.modules):
            return self._hunted(objective, x_BCHW, keys_B, self.threat.project(start_BCHW, x_BCHW))

    def _hunted(self, objective: Objective, x_BCHW: Tensor, keys_B: Tensor, start_BCHW: Tensor) -> Adversarial:
        record, size = Record(x_BCHW), x_BCHW.shape[2:]
        hunt = _Hunt(torch.arange(len(x_BCHW), device=x_BCHW.device), keys_B, x_BCHW, start_BCHW, x_BCHW.new_zeros(len(x_BCHW)))
        seen = value(objective, start_BCHW, hunt.rows_n)
        record.update(hunt.rows_n, start_BCHW, seen)
        hunt.loss_n = seen.loss_n.nan_to_num(-torch.inf).to(x_BCHW)
        for step in range(self.steps):
            hunt = hunt.only(~record.broken_B[hunt.rows_n])
            if not len(hunt.rows_n):
                break
            shift_nCHW = self._window(hunt, step, (size[0], size[1]))
            tried_nCHW = self.threat.project(hunt.point_nCHW + shift_nCHW, hunt.clean_nCHW)
            seen = value(objective, tried_nCHW, hunt.rows_n)
            record.update(hunt.rows_n, tried_nCHW, seen)
            better_n = seen.loss_n > hunt.loss_n
            hunt.loss_n = torch.where(better_n, seen.loss_n.to(hunt.loss_n), hunt.loss_n)
            hunt.point_nCHW = torch.where(per_image(better_n), tried_nCHW, hunt.point_nCHW)
        return record.result()

    def _window(self, hunt: "_Hunt", step: int, size: tuple[int, int]) -> Tensor:
        """A square of ``+-2 eps``, one sign a channel, at a random place; zero elsewhere, ``[n, C, H, W]``."""
        side, (height, width) = self.side(step, size), size
        channels = hunt.clean_nCHW.shape[1]
        drawn_n = noise.uniform(hunt.keys_n, step + 1, (2 + channels,))
        top_n1 = (drawn_n[:, :1] * (height - side + 1)).long()
        left_n1 = (drawn_n[:, 1:2] * (width - side + 1)).long()
        rows_nH = _between(torch.arange(height, device=top_n1.device), top_n1, side)
        columns_nW = _between(torch.arange(width, device=left_n1.device), left_n1, side)
        inside_n1HW = (rows_nH[:, :, None] & columns_nW[:, None, :])[:, None]
        signs_nC11 = _signs(drawn_n[:, 2:])[:, :, None, None].to(hunt.clean_nCHW)
        return 2 * self.threat.radius * signs_nC11 * inside_n1HW


@dataclass
class _Hunt(Walkers):
    """Random search under way: the best point and its loss."""

    keys_n: Tensor
    clean_nCHW: Tensor
    point_nCHW: Tensor
    loss_n: Tensor


def _signs(uniform: Tensor) -> Tensor:
    """-1 or 1, each half of the time."""
    return (uniform < 0.5).float() * 2 - 1


def _between(places: Tensor, first_n1: Tensor, count: int) -> Tensor:
    """Which of the places are among the ``count`` from ``first`` on, bool ``[n, places]``."""
    return (places >= first_n1) & (places < first_n1 + count)
