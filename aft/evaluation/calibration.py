"""Whether a classifier is as often right as it says: the expected calibration error, clean and under attack."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.classification import binary_calibration_error

from aft.cards import Verdicts

BINS = 15


def calibration(verdicts: Verdicts) -> dict[str, Any]:
    """A card's ``metrics.calibration``: the error when clean, and on the last image that each sample was shown (none without attacks).

    Under attack, an image that is wrong when clean is still the clean one, and an attack stops at the first image that breaks: it looks for
    a wrong answer, not for the most confident one, so this is no worst case.
    """
    attacked = verdicts["right"].shape[1] > 0
    clean = expected_calibration_error(verdicts["clean_confidence"], verdicts["clean"])
    under_attack = expected_calibration_error(verdicts["confidence"], verdicts["right"][:, -1]) if attacked else None
    return {"bins": BINS, "clean": clean, "attacked": under_attack, "n": len(verdicts["clean"])}


def expected_calibration_error(confidence_N: NDArray[Any], right_N: NDArray[Any]) -> float:
    """``sum_b (n_b / N) |right share of b - mean confidence of b|`` over 15 bins of equal width on the probability of the answer.

    By torchmetrics (binary, l1, of whether the answer is right). A small N makes it larger than it is: an empty or thin bin errs by chance.

    Args:
        confidence_N: the largest probability of each image, in [0, 1].
        right_N: whether that answer is right.

    Reference:
        Guo et al., arXiv 1706.04599 (ECE with 15 bins).

    Example:
        >>> import numpy as np
        >>> round(expected_calibration_error(np.array([0.9, 0.9]), np.array([True, False])), 4)
        0.4
    """
    confidence, right = torch.from_numpy(np.clip(confidence_N, 0, 1)).double(), torch.from_numpy(right_N).long()
    return float(binary_calibration_error(confidence, right, n_bins=BINS, norm="l1"))
