"""Defences made for tests: any stages around a model, under a name, or around a linear map; and a few simple ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from aft.attacks.noise import normal
from aft.clip.model import Encoding, ZeroShotModel
from aft.clip.stages import Draw, Gate, Stage, Stages, encode_in_stages


class LinearTower(nn.Module):
    """A linear map of images of 2 x 2 pixels that is its own undefended model."""

    stages = Stages()

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12 * 5, dtype=torch.float64).reshape(12, 5).sin())

    @property
    def undefended(self) -> LinearTower:
        """Itself."""
        return self

    def encode(self, images: Tensor) -> Encoding:
        """A matrix product."""
        return Encoding(images.flatten(1) @ self.weight)


@dataclass
class Around:
    """Stages around a linear tower, and no more of a model than that."""

    stages: Stages
    undefended: LinearTower


class Made(ZeroShotModel):
    """A model behind given stages."""

    def __init__(self, model: ZeroShotModel, stages: Stages, name: str = "made", **settings: Any) -> None:
        super().__init__(model.clip, model.tokenizer, model.record, model.text_transform)
        self.plain, self.given = model, stages
        self.defense_told = {"name": name, "settings": settings}
        self.training = model.training

    @property
    def stages(self) -> Stages:
        """Those given."""
        return self.given

    @property
    def undefended(self) -> ZeroShotModel:
        """The wrapped one."""
        return self.plain

    @property
    def defense(self) -> dict[str, Any]:
        """The name and settings given."""
        return self.defense_told

    def encode(self, images_BCHW: Tensor, tokens: bool = False, draw: Draw | None = None) -> Encoding:
        """Through the stages."""
        return encode_in_stages(self, images_BCHW, draw)


def noisy(sigma: float) -> Stage:
    """Gaussian noise on pixels."""
    return Stage(lambda x, draw: (x + sigma * normal(draw.keys_n, draw.count(), x.shape[1:]).to(x)).clamp(0, 1), random=True)


def blurred() -> Stage:
    """A mean over 3 x 3 pixels: differentiable and deterministic."""
    return Stage(lambda x, draw: functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1))


def grey_levels(levels: int) -> Stage:
    """Rounding: no gradient."""
    return Stage(lambda x, draw: (x * levels).round() / levels, differentiable=False)


def roughness(x_nCHW: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels, ``[n]``: an attack raises it."""
    return (x_nCHW[..., 1:] - x_nCHW[..., :-1]).square().flatten(1).mean(1)


def gated_blur(threshold: float, sigma: float = 0.0) -> Stage:
    """Blurs images that are rough; with ``sigma`` the roughness is that of a noisy copy, on one draw."""
    def gate(x: Tensor, draw: Draw | None) -> Gate:
        """Roughness."""
        seen = x if draw is None or not sigma else x + sigma * normal(draw.keys_n, draw.count(), x.shape[1:]).to(x)
        return Gate(roughness(seen), threshold)

    return Stage(blurred().run, gate=gate, random=sigma > 0)


def defended(model: ZeroShotModel, name: str = "made", **stages: Stage) -> Made:
    """A model behind ``pixels=`` or ``embedding=``, or both."""
    return Made(model, Stages(**stages), name)


def keys(count: int) -> Tensor:
    """Plain keys."""
    return torch.arange(count) * 1_000_003
