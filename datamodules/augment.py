"""Augmentation of a whole batch at once, from draws that depend on (seed, epoch, step) alone.

Shapes: B batch, C channels, H height, W width. Draws are made for the global batch, so that a rank's share is what one process
alone would have given these images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Augment = Literal["none", "flip", "crop_flip"]


@dataclass(frozen=True)
class Draws:
    """What happens to each image: the shift of the crop and the flip after it.

    Args:
        shift_B2: ``int64 [B, 2]``, rows and columns by which the crop lies lower and further right, pixels.
        flip_B: ``bool [B]``, mirrored left to right.
    """

    shift_B2: Tensor
    flip_B: Tensor

    def part(self, start: int, stop: int) -> Draws:
        """The draws of the images ``start`` to ``stop`` of the batch."""
        return Draws(self.shift_B2[start:stop], self.flip_B[start:stop])


def draw(augment: Augment, count: int, padding: int, key: tuple[int, ...]) -> Draws:
    """Random shifts and flips for ``count`` images; the same for the same key.

    Args:
        augment: ``none``, ``flip`` (probability 1/2), or ``crop_flip`` (a shift uniform in ``-padding .. padding``, then the flip).
        count: number of images.
        padding: largest shift, pixels.
        key: not negative integers, such as (seed, epoch, step).
    """
    random = np.random.default_rng(key)
    flip = random.random(count) < 0.5
    shift = random.integers(-padding, padding + 1, (count, 2))
    return Draws(torch.from_numpy(shift * (augment == "crop_flip")), torch.from_numpy(flip & (augment != "none")))


def reflect(place: Tensor, length: int) -> Tensor:
    """Places outside ``0 .. length - 1`` mirrored at the border, the border itself not repeated (``-1`` becomes ``1``)."""
    place = place.abs()
    return torch.where(place >= length, 2 * (length - 1) - place, place)


def apply(images_BCHW: Tensor, draws: Draws) -> Tensor:
    """Shifts (what comes in is the reflection) and mirrors each image; any dtype, no value is changed.

    Returns:
        The new images, shaped as they came.
    """
    if not draws.shift_B2.any() and not draws.flip_B.any():
        return images_BCHW
    B, C, H, W = images_BCHW.shape
    rows_BH = reflect(torch.arange(H) + draws.shift_B2[:, :1], H)
    column_BW = torch.where(draws.flip_B[:, None], torch.arange(W).flip(0), torch.arange(W))
    columns_BW = reflect(column_BW + draws.shift_B2[:, 1:], W)
    flat_BHW = rows_BH[:, :, None] * W + columns_BW[:, None, :]
    return images_BCHW.flatten(2).gather(2, flat_BHW.view(B, 1, -1).expand(-1, C, -1)).view(B, C, H, W)
