"""Other input sizes for the same ViT: larger patches on the same grid (``enlarge``), or a larger grid of the same patches (``regrid``)."""

from __future__ import annotations

import copy
import warnings

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from aft.errors import ConfigError, WeightsError

REACH = 2  # pixels beside it that bicubic interpolation reads


def enlarging_matrix(side: int, factor: int) -> Tensor:
    """One axis of ``ZeroShotModel.pixels``'s resize, for a patch inside an image: ``[factor * side, side + 2 * REACH]``, float64.

    Row r gives pixel r of the enlarged patch from the patch's own pixels and the ``REACH`` pixels on either side of it.
    """
    room = REACH + side  # enough on each side that no border of the image is near
    whole = side + 2 * room
    eye = torch.eye(whole, dtype=torch.float64).view(whole, 1, 1, whole)
    size = (1, factor * whole)
    rows = F.interpolate(eye, size=size, mode="bicubic", antialias=True, align_corners=False)[:, 0, 0].T
    return rows[factor * room : factor * (room + side), side:-side]


def enlarge_kernel(kernel_OCpp: Tensor, factor: int) -> Tensor:
    """A patch embedding that says of the enlarged image what the given one says of the image.

    ``W' = argmin |U^T W' - P W|``, of least norm: ``U`` enlarges a patch and the ``REACH`` pixels around it into the pixels of the
    enlarged patch, ``P W`` is ``W`` with zeros around it. This is the least mean squared token error over images of independent pixels
    of equal variance. It would be exact if ``U`` had full column rank; it lacks two dimensions an axis (the outermost pixels hardly
    count), so a small residual stays: 0.5 % of ``|W|`` for MiniCLIP-32, twofold. At the image's border the resize has other weights,
    and tokens there are a little farther off. An enlarged patch taken for itself (no neighbours) has four times the token error.

    Args:
        kernel_OCpp: ``[O, C, p, p]``.
        factor: 2 or more.

    Returns:
        ``[O, C, factor * p, factor * p]``, of the same dtype; solved in float64.
    """
    inverse = torch.linalg.pinv(enlarging_matrix(kernel_OCpp.shape[-1], factor))
    padded = F.pad(kernel_OCpp.detach().double(), (REACH,) * 4)
    return torch.einsum("ocij,ia,jb->ocab", padded, inverse, inverse).to(kernel_OCpp.dtype)


def enlarge(clip: nn.Module, factor: int) -> nn.Module:
    """A copy of a CLIP for images ``factor`` times as large: larger patches on the same grid, everything else the same weights.

    An image enlarged by our own resize (bicubic, antialiased) gives nearly the same tokens; see ``enlarge_kernel``.

    Raises:
        ConfigError: the factor is no whole number from 2 on.
        WeightsError: the image tower is no ViT of open_clip.
    """
    if not isinstance(factor, int) or factor < 2:
        raise ConfigError(f"factor = {factor}: images can be enlarged by a whole number, 2 or more.")
    larger = copy.deepcopy(clip)
    visual = vision_transformer(larger, "enlarging its patches")
    old = visual.conv1
    patch = tuple(factor * side for side in old.kernel_size)
    visual.conv1 = nn.Conv2d(old.in_channels, old.out_channels, patch, patch, bias=old.bias is not None)
    visual.conv1.weight = nn.Parameter(enlarge_kernel(old.weight, factor), old.weight.requires_grad)
    visual.conv1.bias = old.bias
    visual.patch_size = patch
    visual.image_size = tuple(factor * side for side in visual.image_size)
    return larger


def regrid(clip: nn.Module, side: int) -> None:
    """Sets a CLIP to square images of another side, in place; its position embedding is interpolated with a warning.

    Raises:
        WeightsError: the image tower is no ViT of open_clip, or the side is no multiple of its patch size.
    """
    visual = vision_transformer(clip, "image_size")
    patch, before = visual.patch_size[0], visual.image_size[0]
    if side % patch or side < patch:
        raise WeightsError(f"image_size = {side} is no multiple of the patch size {patch}: take {max(side // patch, 1) * patch}.")
    warnings.warn(
        f"the position embedding is interpolated from images of {before} px to {side} px (grid {before // patch} to {side // patch}): "
        "the model was not trained at this size; fine-tune it, or measure it, before you trust it."
    )
    old = visual.positional_embedding
    visual.image_size, visual.grid_size = (side, side), (side // patch, side // patch)
    state = {"visual.positional_embedding": old.detach()}
    open_clip.model.resize_pos_embed(state, clip)
    visual.positional_embedding = nn.Parameter(state["visual.positional_embedding"].clone(), old.requires_grad)


def vision_transformer(clip: nn.Module, what: str) -> VisionTransformer:
    """The image tower of a CLIP, which ``what`` needs to be a ViT of open_clip.

    Raises:
        WeightsError: it is another tower.
    """
    if not isinstance(clip.visual, VisionTransformer):
        raise WeightsError(f"the image tower is a {type(clip.visual).__name__}; {what} needs a ViT of open_clip: choose a ViT by name.")
    return clip.visual
