"""Doubts that cost nothing: what must hold of any table of verdicts. A card with a failed check is ``suspect``.

Numbers as in the documentation of the checks: E1 the ball, E2 the fresh forward, E3 robust <= clean, E4 every sample once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from aft.attacks.threat_model import ORDERS
from aft.batch import EvaluationSet
from aft.cards import Verdicts

#: Rounding that E1 allows beyond eps, in units of the pixel range.
SLACK = 1e-6
#: Up to so many images may be judged otherwise by the attack and by the fresh forward: a batch of another size rounds otherwise.
ALLOWED_DISAGREEMENTS = 2


def inside(adversarial_nCHW: Tensor, clean_nCHW: Tensor, norm: str, eps: float) -> Tensor:
    """Whether each image is finite, in [0, 1] exactly, and within ``eps + 1e-6`` of its clean image, bool ``[n]``, in fp32."""
    adversarial, clean = adversarial_nCHW.float().flatten(1), clean_nCHW.float().flatten(1)
    change = adversarial - clean
    length_n: Tensor = torch.linalg.vector_norm(change if norm == "linf" else change.double(), ord=ORDERS[norm], dim=1)
    in_box_n = (adversarial.amin(1) >= 0) & (adversarial.amax(1) <= 1)
    return in_box_n & (length_n <= eps + SLACK)  # both are False for NaN


def in_the_ball(verdicts: Verdicts, data: EvaluationSet) -> bool:
    """E1: every image that any attack returned was inside."""
    return bool(verdicts["inside"].all())


def judged_afresh(verdicts: Verdicts, data: EvaluationSet) -> bool:
    """E2: the attack's own verdict was that of a fresh fp32 forward, but for a few images at the boundary."""
    return int((~verdicts["agree"]).sum()) <= ALLOWED_DISAGREEMENTS


def robust_below_clean(verdicts: Verdicts, data: EvaluationSet) -> bool:
    """E3: no image is right under attack that was wrong before, or wrong after one attack and right after the next."""
    course = np.concatenate([verdicts["clean"][:, None], verdicts["right"]], axis=1)
    return not bool((course[:, 1:] & ~course[:, :-1]).any())


def each_once(verdicts: Verdicts, data: EvaluationSet) -> bool:
    """E4: the samples scored are those of the set, each once."""
    scored = verdicts["index"]
    return len(np.unique(scored)) == len(scored) == len(data) and bool(np.array_equal(np.sort(scored), np.sort(data.index_N.numpy())))


CHECKS: dict[str, Callable[[Verdicts, EvaluationSet], bool]] = {
    "E1": in_the_ball, "E2": judged_afresh, "E3": robust_below_clean, "E4": each_once,
}  # fmt: skip


def failed(verdicts: Verdicts, data: EvaluationSet) -> list[str]:
    """The ids of the checks that do not hold."""
    return [name for name, holds in CHECKS.items() if not holds(verdicts, data)]
