"""What happens to class texts after the text tower: nothing, LAAT's expansion, or a small learned residual (TIMA).

A transformation is fitted (or learned) on the training classes, is part of the model, and lies in its checkpoint: new classes go through
the same map wherever the model is evaluated. Shapes: K classes, D embedding width, H hidden units.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aft.errors import ConfigError, WeightsError, unknown_name

TransformName = Literal["identity", "expansion", "residual"]
SMALLEST_ANGLE = 1e-4


@dataclass(frozen=True)
class TextTransformSpec:
    """Which transformation class texts go through.

    Args:
        name: ``identity``; ``expansion`` spreads them about their mean direction (LAAT); ``residual`` is a small network that learns
            (TIMA).
        quantile: of the training classes' angles to their mean, the one that is stretched to 90 degrees. 1 is the largest (the paper):
            one odd class name then decides for all; 0.9 lets a tenth of the classes pass 90 degrees.
        hidden: units of the residual network.

    Raises:
        ConfigError: an unknown name, a quantile outside (0, 1], or no hidden unit.
    """

    name: TransformName = "identity"
    quantile: float = 1.0
    hidden: int = 64

    def __post_init__(self) -> None:
        if self.name not in TRANSFORMS:
            raise ConfigError(unknown_name("text_transform", str(self.name), TRANSFORMS))
        if not 0 < self.quantile <= 1:
            raise ConfigError(f"quantile = {self.quantile} is outside (0, 1]: 1 takes the largest angle, 0.9 leaves a tenth beyond it.")
        if self.hidden < 1:
            raise ConfigError(f"hidden = {self.hidden}: the residual network needs one unit or more.")


class TextTransform(nn.Module):
    """The identity, and what all transformations share: unit vectors in, unit vectors out, one row a text."""

    name: ClassVar[str] = "identity"

    @property
    def idle(self) -> bool:
        """Whether it leaves every text as it is, so that a layout without a place for it holds the whole model."""
        return True

    def fit(self, text_KD: Tensor) -> None:
        """Looks at the training classes' texts, once; a transformation that was fitted before stays as it is."""

    def forward(self, text_KD: Tensor) -> Tensor:
        """The transformed unit vectors, ``[K, D]``."""
        return text_KD


class Expansion(TextTransform):
    """Stretches texts away from their mean direction until the farthest training class is orthogonal to it.

    ``t' = cos(g a) m + sin(g a) p`` with ``a`` the angle between ``t`` and ``m``, ``p`` the unit part of ``t`` orthogonal to ``m``, and the
    gain ``g = (pi / 2) / a_max``. Mean direction and gain come from the training classes; an angle is never stretched past 180 degrees.

    Args:
        width: D.
        quantile: of the angles, in place of the largest.

    Reference:
        LAAT, arXiv 2301.13096 (expansion). The released code rotates with D - 1 Givens rotations; it has no guard for new classes far
        from the mean, which fold back from 180 degrees on.
    """

    name: ClassVar[str] = "expansion"

    def __init__(self, width: int, quantile: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("mean_D", torch.zeros(width))
        self.register_buffer("gain", torch.zeros(()))
        self.register_buffer("share", torch.tensor(quantile))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """What was written before quantiles were kept has none: the one at hand stays."""
        super()._load_from_state_dict({f"{prefix}share": self.get_buffer("share"), **state_dict}, prefix, *rest)

    @property
    def quantile(self) -> float:
        """Of the training classes' angles, the one that is stretched to 90 degrees; to seven digits."""
        return round(float(self.get_buffer("share")), 7)

    @property
    def idle(self) -> bool:
        """With a gain of 1 alone: no other angle-stretching is linear, let alone the identity."""
        return float(self.get_buffer("gain")) == 1

    def fit(self, text_KD: Tensor) -> None:
        """Takes mean direction and gain from the training classes.

        Raises:
            ConfigError: one class, or texts that are all alike: there is no angle to stretch.
        """
        if float(self.get_buffer("gain")) > 0:
            return
        if len(text_KD) < 2:
            raise ConfigError(f"text_transform = expansion was fitted on {len(text_KD)} class: it needs two or more; use identity.")
        with torch.no_grad():
            mean_D = F.normalize(text_KD.double().mean(0), dim=0)
            angle_K, _ = _about(mean_D, text_KD.double())
            reach = float(angle_K.quantile(self.quantile))
            if reach < SMALLEST_ANGLE:
                raise ConfigError(f"text_transform = expansion: all {len(text_KD)} class texts are alike; check names and templates.")
            self.get_buffer("mean_D").copy_(mean_D)
            self.get_buffer("gain").fill_(math.pi / 2 / reach)

    def forward(self, text_KD: Tensor) -> Tensor:
        """The expanded unit vectors; a vector equal to the mean direction comes back as it is.

        Raises:
            ConfigError: it was not fitted.
        """
        gain, mean_D = self.get_buffer("gain").double(), self.get_buffer("mean_D").double()
        if not float(gain) > 0:
            raise ConfigError("text_transform = expansion was not fitted yet: fit it on the training classes, or load a checkpoint.")
        angle_K, azimuth_KD = _about(mean_D, text_KD.double())
        wide_K = (gain * angle_K).clamp(max=math.pi)
        if folded := int((gain * angle_K > math.pi).sum()):
            warnings.warn(f"{folded} of {len(text_KD)} class texts would turn past 180 degrees and stay there, all alike: expansion cannot "
                          "tell them apart.", stacklevel=2)  # fmt: skip
        beyond = int((gain * angle_K > math.pi / 2 + 1e-3).sum())
        if beyond and self.quantile == 1:
            warnings.warn(f"{beyond} of {len(text_KD)} class texts lie farther from the mean direction than any training class: expansion "
                          "turns them past 90 degrees.", stacklevel=2)  # fmt: skip
        return (wide_K.cos()[:, None] * mean_D + wide_K.sin()[:, None] * azimuth_KD).to(text_KD.dtype)


def _about(mean_D: Tensor, text_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Angle to the mean direction, ``[K]`` in [0, pi], and the unit part orthogonal to it, ``[K, D]`` (zero where there is none)."""
    unit_KD = F.normalize(text_KD, dim=1)
    along_K = (unit_KD @ mean_D).clamp(-1, 1)
    across_KD = unit_KD - along_K[:, None] * mean_D
    size_K = torch.linalg.vector_norm(across_KD, dim=1)
    return torch.atan2(size_K, along_K), across_KD / size_K.clamp_min(1e-12)[:, None]


class Residual(TextTransform):
    """A small learned map ``t' = unit(t + B gelu(A t))``, the identity at first (``B = 0``): so tuned texts exist for new classes too.

    Args:
        width: D.
        hidden: H.
    """

    name: ClassVar[str] = "residual"

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    @property
    def idle(self) -> bool:
        """As long as nothing was learned."""
        return not bool(self.up.weight.any() or self.up.bias.any())

    def forward(self, text_KD: Tensor) -> Tensor:
        """The tuned unit vectors."""
        moved_KD: Tensor = self.up(F.gelu(self.down(text_KD)))
        return F.normalize(text_KD + moved_KD, dim=1)


TRANSFORMS: dict[str, type[TextTransform]] = {kind.name: kind for kind in (TextTransform, Expansion, Residual)}


def make_transform(spec: TextTransformSpec, width: int, seed: int = 0) -> TextTransform:
    """A new transformation of texts of this width; a residual's first weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if spec.name == "expansion":
            return Expansion(width, spec.quantile)
        return Residual(width, spec.hidden) if spec.name == "residual" else TextTransform()


def stored_transform(name: str, state: Mapping[str, Tensor]) -> TextTransform:
    """The transformation of a checkpoint, from its name and its tensors.

    Raises:
        WeightsError: the checkpoint names one that is unknown, or its tensors are not there.
    """
    if name not in TRANSFORMS:
        raise WeightsError(unknown_name("text_transform of the checkpoint", name, TRANSFORMS))
    try:
        if name == "expansion":
            made: TextTransform = Expansion(len(state["mean_D"]))
        elif name == "residual":
            made = Residual(state["down.weight"].shape[1], state["down.weight"].shape[0])
        else:
            made = TextTransform()
        made.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise WeightsError(f"the checkpoint's text_transform {name!r} does not fit its tensors: {error}") from error
    return made.requires_grad_(False)
