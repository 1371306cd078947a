"""Distances between embeddings, one value a sample. B images, D embedding width."""

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_distance(first_BD: Tensor, second_BD: Tensor) -> Tensor:
    """``||a - b||_2^2``: summed over the width, not divided by it, of embeddings as they are (not normalised).

    Returns:
        ``[B]``.

    Reference:
        FARE, arXiv 2402.12336 (``L_FARE``, the student under attack against the frozen original on the clean image).

    Example:
        >>> import torch
        >>> squared_distance(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
        tensor([25.])
    """
    return (first_BD - second_BD).square().sum(1)


def cosine(first_BD: Tensor, second_BD: Tensor) -> Tensor:
    """``<a, b> / (||a|| ||b||)``, in [-1, 1].

    Returns:
        ``[B]``; 0 where a vector is zero.

    Reference:
        LAAT, arXiv 2301.13096 (smoothness is minus its mean); Sim-CLIP, arXiv 2407.14971 (``D(p, z) = -cos(p, z)``).

    Example:
        >>> import torch
        >>> cosine(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 3.0]])).round(decimals=4)
        tensor([0.7071])
    """
    return (F.normalize(first_BD, dim=1) * F.normalize(second_BD, dim=1)).sum(1)


def unit_distance(first_BD: Tensor, second_BD: Tensor) -> Tensor:
    """``|| a/||a|| - b/||b|| ||_2``, in [0, 2]; not squared, so its gradient keeps its size near zero (and is zero at zero).

    Returns:
        ``[B]``.

    Reference:
        AdvFLYP, arXiv 2604.11576 (feature term).

    Example:
        >>> import torch
        >>> unit_distance(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])).round(decimals=4)
        tensor([1.4142])
    """
    distance_B: Tensor = torch.linalg.vector_norm(F.normalize(first_BD, dim=1) - F.normalize(second_BD, dim=1), dim=1)
    return distance_B
