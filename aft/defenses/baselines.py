"""What a newer defence must beat: random noise, a low-pass filter, an ensemble of views.

Shapes: n images, C channels, H height, W width, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as images

from aft.attacks.noise import normal, uniform
from aft.clip.model import ZeroShotModel, at_least_fp32
from aft.clip.stages import Draw, Stage, Stages
from aft.defenses.base import Defended, embed, length
from aft.defenses.geometry import split
from aft.errors import ConfigError, InputError

Distribution = Literal["uniform", "normal"]


class RandomNoise(Defended):
    """Random noise alone: ``clip01(x + xi)`` with ``xi`` uniform in [-scale, scale], or normal with standard deviation ``scale``.

    With the uniform noise of 4/255 it is what TTC does where its gate is shut.

    Args:
        model: a plain model.
        scale: in units of the pixel range.
        distribution: of the noise.

    Raises:
        ConfigError: a scale outside [0, 1], or another distribution.
    """

    name: ClassVar[str] = "noise"

    def __init__(self, model: ZeroShotModel, *, scale: float | str = "4/255", distribution: Distribution = "uniform") -> None:
        if distribution not in ("uniform", "normal"):
            raise ConfigError(f"distribution = {distribution!r}: take uniform or normal.")
        super().__init__(model, scale=length(scale, "scale"), distribution=distribution)

    @property
    def stages(self) -> Stages:
        """Before the tower."""
        return Stages(pixels=Stage(self._noised, random=True))

    def _noised(self, x_nCHW: Tensor, draw: Draw) -> Tensor:
        """One draw of noise."""
        if self.settings["distribution"] == "uniform":
            unit_nCHW = 2 * uniform(draw.keys_n, draw.count(), x_nCHW.shape[1:]) - 1
        else:
            unit_nCHW = normal(draw.keys_n, draw.count(), x_nCHW.shape[1:])
        scale: float = self.settings["scale"]
        return (x_nCHW + scale * unit_nCHW.to(x_nCHW)).clamp(0, 1)


class LowPass(Defended):
    """A Gaussian blur of the image as it comes, before any resize. Differentiable: an attack through it is exact.

    Args:
        model: a plain model.
        sigma: standard deviation in pixels of the received image; 0 leaves it as it is.

    Raises:
        ConfigError: sigma is not a number of 0 or more.
        InputError: on use, an image smaller than the blur's window of ``2 ceil(3 sigma) + 1`` pixels.
    """

    name: ClassVar[str] = "low_pass"

    def __init__(self, model: ZeroShotModel, *, sigma: float = 0.75) -> None:
        if not (math.isfinite(sigma) and sigma >= 0):
            raise ConfigError(f"sigma = {sigma}: give the blur's standard deviation in pixels, 0 or more.")
        super().__init__(model, sigma=float(sigma))

    @property
    def stages(self) -> Stages:
        """Before the tower."""
        return Stages(pixels=Stage(self._blurred))

    def _blurred(self, x_nCHW: Tensor, draw: Draw | None) -> Tensor:
        """The low frequencies."""
        sigma, side = self.settings["sigma"], min(x_nCHW.shape[-2:])
        if sigma == 0:
            return x_nCHW
        reach = math.ceil(3 * sigma)
        if reach >= side:
            raise InputError(f"low_pass with sigma = {sigma} looks {reach} pixels far, the images are {side} pixels: take a smaller sigma.")
        blurred: Tensor = images.gaussian_blur(x_nCHW, [2 * reach + 1] * 2, [sigma] * 2)
        return blurred.clamp(0, 1)


class ViewEnsemble(Defended):
    """Test-time ensemble: the mean over flips and crops of unit embeddings, so of logits, which are linear in them.

    The views are fixed: the image, and crops of ``crop`` of its side at the four corners and in the middle, each also flipped. Their mean
    embedding is normalised again, which scales an image's logits but leaves their order.

    Args:
        model: a plain model.
        crop: side of the crops as a share of the image's; 1: no crops.
        flip: flipped views too.

    Raises:
        ConfigError: a crop outside (0, 1], or one view alone.

    Reference:
        Pérez et al., arXiv 2107.14110 (TTE); its choice of views was not read, this one is ours.
    """

    name: ClassVar[str] = "tte"

    def __init__(self, model: ZeroShotModel, *, crop: float = 0.875, flip: bool = True) -> None:
        if not 0 < crop <= 1:
            raise ConfigError(f"crop = {crop} is outside (0, 1]: it is a share of the image's side.")
        if crop == 1 and not flip:
            raise ConfigError("crop = 1 without flip leaves one view: that is the undefended model; take crops or flips.")
        super().__init__(model, crop=float(crop), flip=bool(flip))

    @property
    def forwards_per_image(self) -> int:
        """One a view."""
        return (1 if self.settings["crop"] == 1 else 6) * (2 if self.settings["flip"] else 1)

    @property
    def stages(self) -> Stages:
        """After the tower: it embeds the other views."""
        return Stages(embedding=Stage(self._mean))

    def _mean(self, z_nD: Tensor, x_nCHW: Tensor, draw: Draw | None) -> Tensor:
        """The mean of unit embeddings, as long as that of the image itself."""
        size_n1, total_nD = split(at_least_fp32(z_nD))
        for view_nCHW in self._others(x_nCHW):
            total_nD = total_nD + F.normalize(embed(self.plain, view_nCHW), dim=-1)
        return size_n1 * F.normalize(total_nD, dim=-1)

    def _others(self, x_nCHW: Tensor) -> Iterator[Tensor]:
        """Every view but the image itself."""
        height, width = x_nCHW.shape[-2:]
        rows, columns = (max(1, round(self.settings["crop"] * side)) for side in (height, width))
        places = [] if self.settings["crop"] == 1 else [
            (top, left) for top in (0, height - rows) for left in (0, width - columns)
        ] + [((height - rows) // 2, (width - columns) // 2)]  # fmt: skip
        crops = [x_nCHW[..., top : top + rows, left : left + columns] for top, left in places]
        yield from crops
        if self.settings["flip"]:
            yield from (view_nCHW.flip(-1) for view_nCHW in [x_nCHW, *crops])
