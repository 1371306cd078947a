"""Where a text finds itself in an image. B images, N = h x w patches, M = N + 1 tokens with the class token, D embedding width, S side."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from aft.errors import ConfigError

Axis = Literal["channel", "token"]
SMALLEST_RANGE = 1e-6


def text_guided_attention(
    tokens_BND: Tensor, text_BD: Tensor, size: int, axis: Axis = "channel", class_token_BD: Tensor | None = None
) -> Tensor:
    """A map of how well each patch fits a text: ``a_j = <v_j, t>``, scaled to [0, 1] over the patches, enlarged to ``size x size``.

    Args:
        tokens_BND: patch tokens in the joint space, not normalised; N a square number.
        text_BD: unit embedding of each image's class text.
        size: side of the map in pixels, bilinear. A norm of a map grows in proportion to it: 7 x 7 patches drawn at 224 weigh
            about 32 times what they weigh at 7.
        axis: what a norm is taken over. ``channel``: each token has unit length, so that ``a_j`` is a cosine (the paper).
            ``token``: each channel is divided by its norm over all tokens (as released).
        class_token_BD: the class token in the joint space, which counts in the norm of ``token`` (as released); none leaves it out.

    Returns:
        ``[B, S * S]`` in [0, 1]. A constant map has no range to scale by, and comes out as zeros.

    Raises:
        ConfigError: the number of tokens is no square, or the axis is unknown.

    Reference:
        TGA-ZSR, arXiv 2410.21802 (text-guided attention). The released min-max has no guard and gives NaN for a constant map.

    Example:
        >>> import torch
        >>> tokens = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, -1.0]]])
        >>> text_guided_attention(tokens, torch.tensor([[1.0, 0.0]]), size=2).round(decimals=4)
        tensor([[1.0000, 0.0000, 0.7071, 0.0000]])
    """
    side = round(tokens_BND.shape[1] ** 0.5)
    if side * side != tokens_BND.shape[1]:
        raise ConfigError(f"{tokens_BND.shape[1]} patch tokens are no square grid: text-guided attention needs h = w patches.")
    if axis not in ("channel", "token"):
        raise ConfigError(f"axis = {axis!r} is unknown: write channel (the paper) or token (as released).")
    if axis == "channel":
        normed_BND = F.normalize(tokens_BND, dim=2)
    else:
        every_BMD = tokens_BND if class_token_BD is None else torch.cat([class_token_BD[:, None], tokens_BND], 1)
        normed_BND = tokens_BND / torch.linalg.vector_norm(every_BMD, dim=1, keepdim=True).clamp_min(1e-12)
    fit_BN = (normed_BND * text_BD[:, None]).sum(2)
    low_B1, high_B1 = fit_BN.amin(1, keepdim=True), fit_BN.amax(1, keepdim=True)
    scaled_BN = (fit_BN - low_B1) / (high_B1 - low_B1).clamp_min(SMALLEST_RANGE)
    map_B1hw = scaled_BN.view(-1, 1, side, side)
    return F.interpolate(map_B1hw, size=(size, size), mode="bilinear", align_corners=False).flatten(1)


def map_distance(first_BS: Tensor, second_BS: Tensor) -> Tensor:
    """``||A - A'||_2`` of two maps, not squared and not divided by their size.

    Returns:
        ``[B]``.

    Reference:
        TGA-ZSR, arXiv 2410.21802 (``L_AR`` and ``L_AMC`` are its means over the batch).

    Example:
        >>> import torch
        >>> map_distance(torch.ones(1, 4), torch.zeros(1, 4))
        tensor([2.])
    """
    distance_B: Tensor = torch.linalg.vector_norm(first_BS - second_BS, dim=1)
    return distance_B
