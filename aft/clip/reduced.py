"""A tower that sees less for a while: images of fewer pixels, and of their patches only some. Training steps get cheaper by it.

Shapes: B images, C channels, H height, W width, N patches, M kept patches, D tower width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from aft.clip.towers import tower_name
from aft.errors import ConfigError


def patches_at(visual: nn.Module, side: int | None = None) -> int:
    """How many patches a tower makes of an image of this side in pixels; none: of its own.

    Raises:
        ConfigError: the tower cannot see less (no ViT of open_clip, or one that drops patches by itself), or the side does not fit it.
    """
    if not isinstance(visual, VisionTransformer) or not isinstance(visual.patch_dropout, nn.Identity):
        raise ConfigError(
            f"image tower {tower_name(visual)} cannot see fewer pixels or patches for a while: take a ViT of open_clip without "
            "patch_dropout of its own, or leave drop_patches and resolution out of the phases."
        )
    patch, own = visual.patch_size[0], visual.image_size[0]
    side = own if side is None else side
    if side % patch or not patch <= side <= own:
        raise ConfigError(
            f"resolution = {side}: the tower's patches are {patch} px and its images {own} px, so take one of "
            f"{', '.join(str(s) for s in range(patch, own + 1, patch))}."
        )
    return int(side // patch) ** 2


def positions_at(positions_ND: Tensor, grid: int) -> Tensor:
    """Position embeddings for a grid of another size: bicubic and antialiased, as weights of another size are loaded; differentiable.

    Args:
        positions_ND: the class token's first, then those of a square grid, row by row.
        grid: patches an axis.

    Returns:
        ``[grid * grid + 1, D]``.
    """
    own = math.isqrt(len(positions_ND) - 1)
    map_1DGG = positions_ND[1:].T.reshape(1, -1, own, own)
    smaller_1DGG = F.interpolate(map_1DGG, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions_ND[:1], smaller_1DGG[0].flatten(1).T])


@contextmanager
def reduced(visual: nn.Module, side: int | None = None, kept_M: Tensor | None = None) -> Iterator[None]:
    """While the context is open, every forward of the tower resizes its pixels to ``side`` and reads the patches ``kept_M`` alone.

    The resize is part of the graph, so pixels keep their size for whoever attacks them; the position embedding is interpolated and
    learns through it. The class token always stays. Weights, their names and their order are untouched. A compiled tower runs
    uncompiled here: a graph that was made with these hooks, or without them, would be used again where they are not, or are.

    Args:
        visual: a ViT of open_clip.
        side: of the square that it sees, pixels; none: its own.
        kept_M: ``int64 [M]``, places on the grid at this side; none: all.

    Raises:
        ConfigError: see :func:`patches_at`.
    """
    patches_at(visual, side)
    assert isinstance(visual, VisionTransformer)
    handles = []
    compiled, visual._compiled_call_impl = visual._compiled_call_impl, None
    own = visual.positional_embedding
    if side is not None and side != visual.image_size[0]:
        grid = side // visual.patch_size[0]

        def shrink(tower: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            """Before the forward: smaller pixels, and in the parameter's place its interpolation."""
            tower._parameters["positional_embedding"] = positions_at(own, grid)  # type: ignore[assignment]  # a tensor with a graph
            return (F.interpolate(inputs[0], size=(side, side), mode="bicubic", antialias=True, align_corners=False),)

        def restore(tower: nn.Module, inputs: object, output: object) -> None:
            """After the forward, also where it failed."""
            tower._parameters["positional_embedding"] = own

        handles = [visual.register_forward_pre_hook(shrink), visual.register_forward_hook(restore, always_call=True)]
    if kept_M is not None:
        tokens_M = torch.cat([kept_M.new_zeros(1), kept_M + 1])

        def keep(module: nn.Module, inputs: object, tokens_BND: Tensor) -> Tensor:
            """The class token and the kept patches."""
            return tokens_BND.index_select(1, tokens_M.to(tokens_BND.device))

        handles.append(visual.patch_dropout.register_forward_hook(keep))
    try:
        yield
    finally:
        visual._compiled_call_impl = compiled
        for handle in handles:
            handle.remove()
