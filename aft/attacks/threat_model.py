"""Threat models: which images an attacker may show, and how one step goes uphill under that norm.

The ball and the box are kept to the last bit: for ``x' = project(...)`` and images of one dtype,

- L-inf: ``|x' - x| <= eps`` exactly (as real numbers, hence also when the difference is rounded, and against eps rounded to the dtype);
- L2: ``||x' - x|| <= eps``, the norm taken in float64 of the points as stored;
- ``0 <= x' <= 1`` exactly.

Shapes: B images, C channels, H rows, W columns; n of them; d = C * H * W. eps and steps are in units of the pixel range [0, 1].
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from aft.attacks import noise
from aft.errors import ConfigError, unknown_name

Norm = Literal["linf", "l2"]
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

    @abstractmethod
    def check(self, x_BCHW: Tensor) -> None:
        """Raises :class:`ConfigError` where the radius makes no sense for images of this size."""

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

    def check(self, x_BCHW: Tensor) -> None:
        """Nothing: the limit, 1, holds for every size."""

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

    def check(self, x_BCHW: Tensor) -> None:
        """Raises :class:`ConfigError` for an ``eps`` beyond ``sqrt(d)``, the diagonal of the box."""
        values = math.prod(x_BCHW.shape[1:])
        if self.radius > math.sqrt(values):
            raise ConfigError(
                f"eps = {self.eps} is outside [0, {math.sqrt(values):.4g}] for L2 on {values} pixel values: it is in units of the "
                f"pixel range, so for {self.radius:g} grey levels write {self.radius:g}/255."
            )

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


def threat_model(norm: str, eps: float | str) -> ThreatModel:
    """The threat model of that name.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        eps: radius in units of the pixel range.

    Raises:
        ConfigError: unknown norm, or an ``eps`` that it does not allow.
    """
    models: dict[str, type[Linf] | type[L2]] = {"linf": Linf, "l2": L2}
    if norm not in models:
        raise ConfigError(unknown_name("norm", str(norm), models))
    return models[norm](eps=eps)


def _at_most(value: float, dtype: torch.dtype) -> float:
    """The largest number of ``dtype`` that is not above ``value``."""
    near = torch.tensor(value, dtype=dtype)
    return float(near if float(near) <= value else torch.nextafter(near, torch.zeros_like(near)))


def _shifted(x: Tensor, shift: float) -> Tensor:
    """``x + shift`` rounded towards ``x``: what the sum lost to rounding is known exactly, and decides whether to go one number back."""
    moved = x + shift
    came = moved - x
    lost = (x - (moved - came)) + (shift - came)
    return torch.where(lost * shift < 0, torch.nextafter(moved, x), moved)
