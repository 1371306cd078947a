"""Moves along great circles of the unit sphere. Shapes: n vectors, D width; angles in radians."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Angles nearer than this to 0 or to 180 degrees have no great circle: the vector stays.
SMALLEST_ANGLE = 1e-6


def about(unit_nD: Tensor, target_D: Tensor) -> tuple[Tensor, Tensor]:
    """Angle to the target, ``[n]`` in [0, pi], and the unit direction towards it in the tangent space, ``[n, D]``.

    ``theta = atan2(|t - (u.t) u|, u.t)``, ``e = (t - (u.t) u) / sin(theta)``.

    Args:
        unit_nD: unit vectors ``u``.
        target_D: a unit vector ``t``, ``[D]``, or one a sample, ``[n, D]``.
    """
    along_n = (unit_nD * target_D).sum(-1)
    across_nD = target_D - along_n[:, None] * unit_nD
    size_n = torch.linalg.vector_norm(across_nD, dim=-1)
    return torch.atan2(size_n, along_n), across_nD / size_n.clamp_min(1e-12)[:, None]


def rotate(unit_nD: Tensor, target_D: Tensor, angle_n: Tensor) -> Tensor:
    """Rotates unit vectors towards a target: ``cos(phi) u + sin(phi) e``; where there is no direction, ``u`` as it is.

    Args:
        unit_nD: unit vectors.
        target_D: unit vector, ``[D]`` or ``[n, D]``.
        angle_n: phi.

    Example:
        >>> import torch
        >>> z, t = torch.tensor([[1.0, 0.0]]), torch.tensor([0.0, 1.0])
        >>> rotate(z, t, torch.tensor([torch.pi / 4]))
        tensor([[0.7071, 0.7071]])
    """
    theta_n, towards_nD = about(unit_nD, target_D)
    turned_nD = angle_n.cos()[:, None] * unit_nD + angle_n.sin()[:, None] * towards_nD
    return torch.where(has_direction(theta_n)[:, None], turned_nD, unit_nD)


def has_direction(theta_n: Tensor) -> Tensor:
    """Whether a great circle leads from here to there, bool ``[n]``."""
    return (theta_n > SMALLEST_ANGLE) & (theta_n < torch.pi - SMALLEST_ANGLE)


def split(embedding_nD: Tensor) -> tuple[Tensor, Tensor]:
    """Length ``[n, 1]`` and unit vector ``[n, D]``."""
    return torch.linalg.vector_norm(embedding_nD, dim=-1, keepdim=True), F.normalize(embedding_nD, dim=-1)


def relative_drift(before_nD: Tensor, after_nD: Tensor) -> Tensor:
    """``|after - before| / |before|`` of raw embeddings, ``[n]``."""
    moved_n = torch.linalg.vector_norm(after_nD - before_nD, dim=-1)
    drift_n: Tensor = moved_n / torch.linalg.vector_norm(before_nD, dim=-1).clamp_min(1e-12)
    return drift_n
