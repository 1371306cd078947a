"""Patch embedding as one matrix product. B images, C channels, p pixels a side of a patch, G and H patches an axis, W width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from aft.clip.reclass import reclass


class PatchEmbedding(nn.Conv2d):
    """A convolution whose kernels lie side by side, as a product on a CPU: ``patches [B G H, C p p] @ weight [C p p, W]``.

    Its gradient by the pixels, which every step of an attack takes, is a product as well; torch's own of such a convolution took 4 to 11
    times as long on a CPU, a fifth of an attack on ViT-B/32. The mathematics is the same; so are parameters and their names. Images that
    are no whole number of patches, and other devices, where nothing was measured, go the old way.

    See :func:`embed_by_product`; a module is never built as this class.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Conv2d``; ``[B, C, G p, H p]`` to ``[B, W, G, H]``."""
        patch = self.kernel_size[0]
        if input.device.type != "cpu" or input.ndim != 4 or input.shape[2] % patch or input.shape[3] % patch:
            return super().forward(input)
        images, channels, high, wide = input.shape
        cut_BCGpHp = input.reshape(images, channels, high // patch, patch, wide // patch, patch)
        patches_BGHP = cut_BCGpHp.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches_BGHP, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def embed_by_product(tower: nn.Module) -> None:
    """Makes the convolution that cuts a tower's pixels into patches a :class:`PatchEmbedding`, in place; parameters stay where they are."""
    reclass(tower, nn.Conv2d, PatchEmbedding, cuts_pixels)


def embed_by_convolution(tower: nn.Module) -> None:
    """Takes :func:`embed_by_product` back, in place: what it is compared with."""
    reclass(tower, PatchEmbedding, nn.Conv2d)


def cuts_pixels(convolution: nn.Conv2d) -> bool:
    """Square kernels of three colours, side by side, no padding, none left out."""
    side, other = convolution.kernel_size
    beside = convolution.stride == (side, other) and side == other > 1 and convolution.dilation == (1, 1)
    return beside and convolution.padding in ((0, 0), "valid") and (convolution.in_channels, convolution.groups) == (3, 1)
