"""Losses on class texts, and margins from their distances. K classes, D embedding width, B images."""

from typing import Literal

import torch
from torch import Tensor

from aft.errors import ConfigError, unknown_name

MarginFunction = Literal["increasing", "constant", "decreasing"]
MARGIN_FUNCTIONS = ("increasing", "constant", "decreasing")


def hyperspherical_energy(text_KD: Tensor, power: float = 2.0) -> Tensor:
    """``(1 / (K (K - 1))) sum_{j != k} 1 / (1 + ||t_j - t_k||^power)``: small where texts are far apart.

    Args:
        text_KD: unit vectors, two classes or more.
        power: of the distance, above 0.

    Returns:
        Scalar in (0, 1]: 1 for equal vectors, 1/3 for orthogonal ones and 1/5 for opposite ones at power 2.

    Raises:
        ConfigError: fewer than two classes, or a power under which spreading would not pay.

    Reference:
        TIMA, arXiv 2405.17678 (minimum hyperspherical energy, in its stabilised form). The form is known from secondary sources.

    Example:
        >>> import torch
        >>> hyperspherical_energy(torch.eye(2)).round(decimals=4)
        tensor(0.3333)
    """
    if len(text_KD) < 2:
        raise ConfigError(f"hyperspherical energy of {len(text_KD)} class: it is defined between two classes or more.")
    check_power(power)
    apart_P = _distances(text_KD)[~torch.eye(len(text_KD), dtype=torch.bool, device=text_KD.device)]
    return (1 / (1 + apart_P.clamp_min(0).pow(power / 2))).mean()


def check_power(power: float) -> None:
    """Raises ConfigError for a power of the distance that is not above 0: the energy would not fall as texts spread."""
    if not power > 0:
        raise ConfigError(f"power = {power} is not above 0: the energy must fall as texts spread; the paper's is 2.")


def rival_margins(text_KD: Tensor, margin: float, function: MarginFunction = "decreasing") -> Tensor:
    """What is added to the logit of rival k of class y: ``margin * r_yk``, ``r`` in [0, 1] from the distance of their texts.

    ``increasing`` gives far rivals more, ``decreasing`` gives near ones more, ``constant`` gives all ``margin``. Distances are scaled to
    [0, 1] over all pairs; where all are equal, ``r`` is 1.

    Args:
        text_KD: the original unit text vectors.
        margin: in logits, 0 or more.
        function: of the distance.

    Returns:
        ``[K, K]``, zero on the diagonal.

    Raises:
        ConfigError: an unknown function, a negative margin, or one class alone.

    Reference:
        TIMA, arXiv 2405.17678 (text-aware margin). Its exact form is unpublished: this one is ours.

    Example:
        >>> import torch
        >>> rival_margins(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), 2.0, "increasing")[0].abs().round(decimals=4)
        tensor([0., 0., 2.])
    """
    if function not in MARGIN_FUNCTIONS:
        raise ConfigError(unknown_name("margin function", str(function), MARGIN_FUNCTIONS))
    if not margin >= 0:
        raise ConfigError(f"margin = {margin} is negative: give 0 or more, in logits.")
    if len(text_KD) < 2:
        raise ConfigError(f"margins between {len(text_KD)} class: rivals need two classes or more.")
    off_KK = ~torch.eye(len(text_KD), dtype=torch.bool, device=text_KD.device)
    far_KK = _distances(text_KD).clamp_min(0).sqrt()
    low, high = far_KK[off_KK].min(), far_KK[off_KK].max()
    if function == "constant" or bool(high - low < 1e-6):
        share_KK = torch.ones_like(far_KK)
    else:
        share_KK = (far_KK - low) / (high - low)
        share_KK = share_KK if function == "increasing" else 1 - share_KK
    return margin * share_KK * off_KK


def _distances(text_KD: Tensor) -> Tensor:
    """``||t_j - t_k||^2`` by the parallelogram of inner products: its gradient is finite where vectors are equal."""
    square_K = text_KD.square().sum(1)
    return square_K[:, None] + square_K[None, :] - 2 * text_KD @ text_KD.T
