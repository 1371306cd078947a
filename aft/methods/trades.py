"""TRADES for CLIP: accuracy on the clean image, and the same answer under attack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from aft.attacks import Objective
from aft.errors import ConfigError
from aft.losses import kl_divergence
from aft.methods.distillation import CleanConsistency
from aft.methods.targets import Targets
from aft.methods.tecoa import TeCoA
from aft.methods.terms import Alignment, Term


class TRADES(TeCoA):
    """``L = CE(x) + beta KL(P(x) || P(x_adv))`` over class texts; the attack maximises the divergence from the clean image's distribution.

    The divergence and its gradient are zero at the clean image, so the attack must start at random. Forwards of the image tower in a step
    with ``k`` attack steps: ``k + 3`` (the constant clean distribution of the attack is one of them).

    Reference:
        Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", arXiv 1901.08573 (beta 6 for images from
        scratch, from memory). Over CLIP's class texts it is a variant of ours; no paper is known to us.

    Raises:
        ConfigError: an attack without a random start.
    """

    method: ClassVar[str] = "trades"
    default_terms: ClassVar[Mapping[str, Term]] = {
        "alignment": Alignment(image="clean"),
        "clean_consistency": CleanConsistency(direction="adversarial_second", weight=6.0),
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if any(getattr(attack, "random_start", True) is False for attack in (self.attack, *self._attacks.values())):
            raise ConfigError("attack.random_start = false: TRADES' divergence has no gradient at the clean image; start at random, in "
                              "every phase.")  # fmt: skip

    def objective(self, targets: Targets) -> Objective:
        """``KL(P(x) || P(x + delta))``, the student's clean distribution held constant."""
        clean_BK, text_KD = targets.logits(targets.student_clean), targets.text["class"]
        return self.encoding_objective(
            lambda encoding, rows_n: kl_divergence(clean_BK[rows_n], self.model.logits(encoding, text_KD, self.logit_scale))
        )
