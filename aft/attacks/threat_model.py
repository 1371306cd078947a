"""Threat models: which images an attacker may show, and how one step goes uphill under that norm.

The ball and the box are kept to the last bit: for ``x' = project(...)`` and images of one dtype,

- L-inf: ``|x' - x| <= eps`` exactly (as real numbers, hence also when the difference is rounded, and against eps rounded to the dtype);
- L2 and L1: ``||x' - x|| <= eps``, the norm taken in float64 of the points as stored;
- ``0 <= x' <= 1`` exactly.

Shapes: B images, C channels, H rows, W columns; n of them; d = C * H * W. eps and steps are in units of the pixel range [0, 1].
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from aft.attacks import noise
from aft.errors import ConfigError, unknown_name

Norm = Literal["linf", "l2", "l1"]
#: The order of each norm, as ``torch.linalg.vector_norm`` takes it.
ORDERS: dict[str, float] = {"linf": math.inf, "l2": 2, "l1": 1}
Projection = Callable[[Tensor], Tensor]


def pixel_fraction(value: float | str, name: str = "eps") -> float:
    """Reads a length in units of the pixel range, as a number or as the fraction that configurations write.

    Args:
        value: a number, or a text such as ``"4/255"`` or ``"0.5"``.
        name: the setting's name, for the error.

    Raises:
        ConfigError: not a number, not finite, or negative.

    Example:
        >>> pixel_fraction("4/255") == 4 / 255
        True
    """
    try:
        above, _, below = str(value).partition("/")
        number = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ConfigError(f"{name} = {value!r} is not a number: write a number or a fraction of the pixel range, such as 4/255.")
    if number < 0:
        raise ConfigError(f"{name} = {value} is negative: it is a length in units of the pixel range, so write it without the sign.")
    return number


def radius_text(norm: str, eps: float) -> str:
    """The radius as configurations write it, with the norm where it is not L-inf.

    Example:
        >>> radius_text("linf", 2 / 255), radius_text("l1", 12.0)
        ('2/255', '12 l1')
    """
    return f"{eps * 255:.4g}/255" if norm == "linf" else f"{eps:.4g} {norm}"


@dataclass(frozen=True, kw_only=True)
class ThreatModel(ABC):
    """A ball of radius ``eps`` around each clean image, cut with the pixel box [0, 1].

    Args:
        eps: radius in units of the pixel range, a number or a text such as ``"4/255"``.

    Raises:
        ConfigError: ``eps`` is not a number, negative, or larger than the box.
    """

    norm: ClassVar[Norm]
    eps: float | str

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", pixel_fraction(self.eps))

    @property
    def radius(self) -> float:
        """``eps`` as a number."""
        return pixel_fraction(self.eps)

    @classmethod
    @abstractmethod
    def largest(cls, values: int) -> float:
        """The largest radius that means something for so many pixel values: beyond it the ball holds the whole box."""

    def check(self, x_BCHW: Tensor) -> None:
        """Raises :class:`ConfigError` where the radius makes no sense for images of this size."""
        values = math.prod(x_BCHW.shape[1:])
        largest = self.largest(values)
        if self.radius > largest:
            raise ConfigError(
                f"eps = {self.eps} is outside [0, {largest:.4g}] for {self.norm.upper()} on {values} pixel values: it is in units of the "
                f"pixel range, so for {self.radius:g} grey levels write {self.radius:g}/255."
            )

    @abstractmethod
    def random_start(self, x_BCHW: Tensor, keys_B: Tensor, draw: int) -> Tensor:
        """A point uniform in the ball (then clamped to the box), by counted noise ``(key, draw)``; shape and dtype of ``x_BCHW``."""

    @abstractmethod
    def steepest_step(self, gradient_BCHW: Tensor) -> Tensor:
        """The step of length 1 in this norm that climbs most; zero where an image's gradient is zero."""

    @abstractmethod
    def around(self, x_BCHW: Tensor) -> Projection:
        """The projection on the ball around ``x_BCHW`` and the box, with its bounds computed once."""

    def project(self, adversarial_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
        """``adversarial_BCHW`` moved into the ball around ``x_BCHW``, then into [0, 1]."""
        return self.around(x_BCHW)(adversarial_BCHW)


class Linf(ThreatModel):
    """Each pixel value moves by at most ``eps``: ``max |x' - x| <= eps``, with ``eps`` in [0, 1].

    Example:
        >>> import torch
        >>> x = torch.tensor([0.0, 0.5])
        >>> Linf(eps=0.25).project(torch.tensor([-1.0, 1.0]), x)
        tensor([0.0000, 0.7500])
    """

    norm = "linf"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.radius > 1:
            raise ConfigError(
                f"eps = {self.eps} is outside [0, 1] for L-inf: it is in units of the pixel range, "
                f"so for {self.radius:g} grey levels write {self.radius:g}/255."
            )

    @classmethod
    def largest(cls, values: int) -> float:
        """1, the side of the box."""
        return 1.0

    def random_start(self, x_BCHW: Tensor, keys_B: Tensor, draw: int) -> Tensor:
        """``x + eps (2u - 1)`` with ``u`` uniform in [0, 1), projected."""
        shift_BCHW = noise.uniform(keys_B, draw, x_BCHW.shape[1:]).to(x_BCHW.dtype).mul_(2).sub_(1)
        return self.project(x_BCHW + self.radius * shift_BCHW, x_BCHW)

    def steepest_step(self, gradient_BCHW: Tensor) -> Tensor:
        """``sign(g)``."""
        return gradient_BCHW.sign()

    def around(self, x_BCHW: Tensor) -> Projection:
        """Clamps between the bounds ``max(x - eps, 0)`` and ``min(x + eps, 1)``, each rounded towards ``x``."""
        eps = _at_most(self.radius, x_BCHW.dtype)
        low_BCHW, high_BCHW = _shifted(x_BCHW, -eps).clamp_(min=0), _shifted(x_BCHW, eps).clamp_(max=1)
        return lambda adversarial_BCHW: torch.clamp(adversarial_BCHW, low_BCHW, high_BCHW)


class L2(ThreatModel):
    """The Euclidean length of the change is at most ``eps``: ``||x' - x|| <= eps``, with ``eps`` in [0, sqrt(d)].

    The clamp to the box comes after the projection; the clean image is in the box, so the clamp only shortens the change.
    """

    norm = "l2"

    @classmethod
    def largest(cls, values: int) -> float:
        """``sqrt(d)``, the diagonal of the box."""
        return math.sqrt(values)

    def random_start(self, x_BCHW: Tensor, keys_B: Tensor, draw: int) -> Tensor:
        """``x + eps v`` with ``v`` uniform in the unit ball: the first ``d`` of ``d + 2`` coordinates of a point uniform on the sphere."""
        direction_BD = noise.normal(keys_B, draw, (x_BCHW[0].numel() + 2,)).double()
        direction_BD /= torch.linalg.vector_norm(direction_BD, dim=1, keepdim=True)
        shift_BCHW = direction_BD[:, :-2].reshape(x_BCHW.shape).to(x_BCHW.dtype)
        return self.project(x_BCHW + self.radius * shift_BCHW, x_BCHW)

    def steepest_step(self, gradient_BCHW: Tensor) -> Tensor:
        """``g / ||g||`` an image; scaled by its largest entry first, so that a tiny gradient neither underflows nor counts as zero."""
        largest_B111 = torch.linalg.vector_norm(gradient_BCHW, ord=torch.inf, dim=(1, 2, 3), keepdim=True)
        scaled_BCHW = gradient_BCHW / torch.where(largest_B111 > 0, largest_B111, 1)
        length_B111 = torch.linalg.vector_norm(scaled_BCHW, dim=(1, 2, 3), keepdim=True)
        return scaled_BCHW / torch.where(length_B111 > 0, length_B111, 1)

    def around(self, x_BCHW: Tensor) -> Projection:
        """Shortens the change to ``eps`` less what rounding can add (one part in a million, half a last bit a pixel)."""
        rounding = math.sqrt(x_BCHW[0].numel()) * torch.finfo(x_BCHW.dtype).eps / 4
        radius = max(self.radius * (1 - 1e-6) - rounding, 0.0)

        def project(adversarial_BCHW: Tensor) -> Tensor:
            """Into the ball and the box."""
            change_BCHW = adversarial_BCHW - x_BCHW
            length_B111 = torch.linalg.vector_norm(change_BCHW, dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
            factor_B111 = torch.where(length_B111 > radius, radius / length_B111, 1.0).to(x_BCHW.dtype)
            return (x_BCHW + change_BCHW * factor_B111).clamp_(0, 1)

        return project


#: Of a gradient's entries, the largest ones that a step of PGD in L1 moves: as SLIDE does.
SPARSE = 0.01


class L1(ThreatModel):
    """The pixel changes add up to at most ``eps``: ``sum |x' - x| <= eps``, with ``eps`` in (0, d].

    The projection is the nearest point of the ball *and* the box at once: clamping to the box afterwards, as for L2, would waste the part
    of the radius that lies outside the box, where most of a sparse step lies.

    Reference:
        Croce and Hein, arXiv 2103.01208 (projection on the intersection); Tramèr and Boneh, arXiv 1904.13000 (SLIDE: the sparse step; the
        share of 1 % is from memory).

    Example:
        >>> import torch
        >>> x = torch.tensor([[[[0.5, 0.5, 0.9]]]])
        >>> L1(eps=0.3).project(torch.tensor([[[[0.8, 0.5, 1.9]]]]), x)
        tensor([[[[0.7000, 0.5000, 1.0000]]]])
    """

    norm = "l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.radius == 0:
            raise ConfigError(
                f"eps = {self.eps} is no radius for L1: give the positive sum of all pixel changes, such as 12 for images of 32 x 32; "
                "for the clean accuracy take the protocol clean."
            )

    @classmethod
    def largest(cls, values: int) -> float:
        """``d``, the way from one corner of the box to the opposite one."""
        return float(values)

    def random_start(self, x_BCHW: Tensor, keys_B: Tensor, draw: int) -> Tensor:
        """``x + eps v`` with ``v`` uniform in the unit ball: ``d`` of ``d + 1`` exponential numbers over their sum, with random signs."""
        values = x_BCHW[0].numel()
        drawn_BE = noise.uniform(keys_B, draw, (2 * values + 1,)).double()
        exponential_BE = -torch.log1p(-drawn_BE[:, : values + 1])
        size_BP = exponential_BE[:, :-1] / exponential_BE.sum(1, keepdim=True).clamp_min(1e-30)
        change_BP = torch.where(drawn_BE[:, values + 1 :] < 0.5, size_BP, -size_BP)
        return self.project(x_BCHW + self.radius * change_BP.reshape(x_BCHW.shape).to(x_BCHW.dtype), x_BCHW)

    def steepest_step(self, gradient_BCHW: Tensor) -> Tensor:
        """Equal steps along the signs of the largest hundredth of the entries, one at least, that add up to 1.

        The steepest step of all moves one entry alone; it reaches the edge of the box at once, and a walk of few steps then stays too
        sparse.
        """
        return sparse_signs(gradient_BCHW, torch.full_like(gradient_BCHW[:, 0, 0, 0], SPARSE))

    def around(self, x_BCHW: Tensor) -> Projection:
        """The nearest point, in float64 with one part in a billion to spare, then rounded towards ``x``."""
        clean_BP = x_BCHW.double().flatten(1)
        radius = self.radius * (1 - 1e-9)

        def project(adversarial_BCHW: Tensor) -> Tensor:
            """Into the ball and the box."""
            change_BP = adversarial_BCHW.double().flatten(1) - clean_BP
            room_BP = torch.where(change_BP > 0, 1 - clean_BP, clean_BP)
            fits_B = torch.minimum(change_BP.abs(), room_BP).sum(1) <= radius
            size_BP = nearest_sizes(change_BP.abs(), room_BP, radius)
            shift_BCHW = _towards_zero(size_BP, x_BCHW.dtype).copysign(change_BP.to(x_BCHW.dtype)).reshape(x_BCHW.shape)
            moved_BCHW = torch.where(fits_B[:, None, None, None], adversarial_BCHW, _shifted(x_BCHW, shift_BCHW))
            return moved_BCHW.clamp_(0, 1)

        return project


def sparse_signs(gradient_BCHW: Tensor, share_B: Tensor) -> Tensor:
    """The signs of each image's largest entries, divided by their number, and zero elsewhere: a step of length 1 in L1.

    Args:
        gradient_BCHW: entries that are zero have no sign.
        share_B: of the entries, how many; one at least. Of equal entries the first ones count.
    """
    size_BP = gradient_BCHW.abs().flatten(1)
    count_B = (share_B * size_BP.shape[1]).ceil().long().clamp(1, size_BP.shape[1])
    order_BP = size_BP.argsort(dim=1, descending=True, stable=True)
    chosen_BP = torch.arange(size_BP.shape[1], device=size_BP.device) < count_B[:, None]
    signs_BP = gradient_BCHW.flatten(1).sign() * torch.zeros_like(size_BP).scatter(1, order_BP, chosen_BP.to(size_BP))
    return (signs_BP / signs_BP.abs().sum(1, keepdim=True).clamp_min(1)).reshape(gradient_BCHW.shape)


def nearest_sizes(size_BP: Tensor, room_BP: Tensor, radius: float) -> Tensor:
    """The nearest point to ``size`` among those with ``0 <= s <= room`` and ``sum s <= radius``: ``s = clamp(size - t, 0, room)``.

    ``t`` is 0 where that fits; else the sum, which is piecewise linear in ``t`` with corners at ``size`` and at ``size - room``, is solved
    in the piece where it crosses the radius.

    Args:
        size_BP: 0 or more, float64.
        room_BP: 0 or more.
        radius: above 0.
    """
    corner_BQ, order_BQ = torch.cat([size_BP, size_BP - room_BP], 1).sort(1, descending=True)
    slope_BQ = torch.where(order_BQ < size_BP.shape[1], 1.0, -1.0).to(size_BP).cumsum(1)  # of the sum below each corner, as t falls
    rise_BQ = slope_BQ[:, :-1] * (corner_BQ[:, :-1] - corner_BQ[:, 1:])
    sum_BQ = torch.nn.functional.pad(rise_BQ.cumsum(1), (1, 0))
    after_B1 = torch.searchsorted(sum_BQ, torch.full_like(sum_BQ[:, :1], radius)).clamp(1, sum_BQ.shape[1] - 1)
    missing_B1 = radius - sum_BQ.gather(1, after_B1 - 1)
    threshold_B1 = corner_BQ.gather(1, after_B1 - 1) - missing_B1 / slope_BQ.gather(1, after_B1 - 1).clamp_min(1)
    return torch.minimum((size_BP - threshold_B1.clamp_min(0)).clamp_min(0), room_BP)


def threat_model(norm: str, eps: float | str) -> ThreatModel:
    """The threat model of that name.

    Args:
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        eps: radius in units of the pixel range.

    Raises:
        ConfigError: unknown norm, or an ``eps`` that it does not allow.
    """
    models: dict[str, type[Linf | L2 | L1]] = {"linf": Linf, "l2": L2, "l1": L1}
    if norm not in models:
        raise ConfigError(unknown_name("norm", str(norm), models))
    return models[norm](eps=eps)


@cache
def _at_most(value: float, dtype: torch.dtype) -> float:
    """The largest number of ``dtype`` that is not above ``value``."""
    near = torch.tensor(value, dtype=dtype)
    return float(near if float(near) <= value else torch.nextafter(near, torch.zeros_like(near)))


def _towards_zero(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of 0 or more, rounded down to ``dtype``."""
    near = value.to(dtype)
    return torch.where(near.to(value.dtype) > value, torch.nextafter(near, torch.zeros_like(near)), near)


def _shifted(x: Tensor, shift: float | Tensor) -> Tensor:
    """``x + shift`` rounded towards ``x``: what the sum lost to rounding is known exactly, and decides whether to go one number back."""
    moved = x + shift
    came = moved - x
    lost = (x - (moved - came)) + (shift - came)
    beyond = ((lost < 0) & (shift > 0)) | ((lost > 0) & (shift < 0))
    return torch.where(beyond, torch.nextafter(moved, x), moved)
