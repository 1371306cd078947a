"""AOM-style: a step in embedding space from the image's embedding towards the mean embedding of its noisy copies.

Shapes: n images, C channels, H height, W width, D embedding width.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from aft.attacks.noise import normal
from aft.clip.model import ZeroShotModel, at_least_fp32
from aft.clip.stages import Draw, Gate, Stage, Stages
from aft.defenses.base import Defended, check_gate, embed, length
from aft.defenses.geometry import about, relative_drift, rotate, split
from aft.errors import ConfigError


class AOM(Defended):
    """Anchor-guided one-step move, our reading of it: no formula, noise level or code was published that could be read.

    ``x_i = clip01(x + sigma xi_i)`` with normal ``xi_i``, ``z_i = unit(E(x_i))``, anchor ``mu = unit(mean_i z_i)``;

    - linear: ``z' = unit(z + strength (mu - z))``;
    - geodesic: ``z`` rotated towards ``mu`` by ``strength`` times the angle between them, by 180 degrees at most.

    Strength 0 is the undefended model, 1 the anchor, more goes beyond it.

    Args:
        model: a plain model.
        sigma: standard deviation of the noise, in units of the pixel range.
        samples: noisy copies.
        strength: lambda above.
        path: linear or geodesic.
        gate: act only where the drift ``r = |E(x_1) - E(x)| / |E(x)|`` is on the suspicious side of this; none: always.
        suspicious: that side. Under small noise adversarial images are more stable than clean ones (``below``), under large noise less
            (``above``).

    Raises:
        ConfigError: a setting out of range.

    Reference:
        Tong et al., CVPR 2025 (the idea of noisy anchors). Path, strength and gate are ours.
    """

    name: ClassVar[str] = "aom"

    def __init__(
        self, model: ZeroShotModel, *, sigma: float | str = "8/255", samples: int = 5, strength: float = 1.0,
        path: Literal["linear", "geodesic"] = "linear", gate: float | None = None, suspicious: Literal["above", "below"] = "above",
    ) -> None:  # fmt: skip
        noise = length(sigma, "sigma")
        if noise == 0 or samples < 1:
            raise ConfigError(f"sigma = {sigma}, samples = {samples}: an anchor needs noise above 0 and one noisy copy or more.")
        if not (math.isfinite(strength) and strength >= 0):
            raise ConfigError(f"strength = {strength}: give 0 (undefended), 1 (the anchor) or more.")
        if path not in ("linear", "geodesic") or suspicious not in ("above", "below"):
            raise ConfigError(f"path = {path!r}, suspicious = {suspicious!r}: take linear or geodesic, above or below.")
        check_gate(gate, "gate")
        super().__init__(model, sigma=noise, samples=int(samples), strength=float(strength), path=path, gate=gate, suspicious=suspicious)

    @property
    def forwards_per_image(self) -> int:
        """The image, its noisy copies, and two more for a gate."""
        return 1 + int(self.settings["samples"]) + (0 if self.settings["gate"] is None else 2)

    @property
    def stages(self) -> Stages:
        """After the tower: it embeds the noisy copies."""
        return Stages(embedding=Stage(self._moved, random=True, gate=None if self.settings["gate"] is None else self._gate))

    def _moved(self, z_nD: Tensor, x_nCHW: Tensor, draw: Draw) -> Tensor:
        """A step towards, or beyond, the anchor; as long as before."""
        size_n1, unit_nD = split(at_least_fp32(z_nD))
        total_nD = torch.zeros_like(unit_nD)
        for turn in range(self.settings["samples"]):
            total_nD = total_nD + F.normalize(embed(self.plain, self._noisy(x_nCHW, draw, turn)), dim=-1)
        return size_n1 * step(unit_nD, F.normalize(total_nD, dim=-1), self.settings["strength"], self.settings["path"])

    def _noisy(self, x_nCHW: Tensor, draw: Draw, turn: int) -> Tensor:
        """One noisy copy."""
        noise_nCHW = normal(draw.keys_n, draw.count(turn), x_nCHW.shape[1:]).to(x_nCHW)
        sigma: float = self.settings["sigma"]
        return (x_nCHW + sigma * noise_nCHW).clamp(0, 1)

    def _gate(self, x_nCHW: Tensor, draw: Draw | None) -> Gate:
        """The drift of the first noisy copy, on the suspicious side of the threshold."""
        assert draw is not None
        sign = 1.0 if self.settings["suspicious"] == "above" else -1.0
        drift_n = relative_drift(embed(self.plain, x_nCHW), embed(self.plain, self._noisy(x_nCHW, draw, 0)))
        return Gate(sign * drift_n, sign * self.settings["gate"])


def step(unit_nD: Tensor, anchor_nD: Tensor, strength: float, path: str = "linear") -> Tensor:
    """From unit vectors towards unit anchors, and beyond for a strength above 1.

    Example:
        >>> import torch
        >>> step(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 2.0)
        tensor([[-0.4472,  0.8944]])
    """
    if path == "linear":
        return F.normalize(unit_nD + strength * (anchor_nD - unit_nD), dim=-1)
    theta_n, _ = about(unit_nD, anchor_nD)
    return rotate(unit_nD, anchor_nD, (strength * theta_n).clamp(max=torch.pi))
