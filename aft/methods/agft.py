"""AGFT: soft labels of the original model guide the fine-tuning. B images, K classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from aft.attacks import Objective
from aft.losses import soft_cross_entropy
from aft.methods.base import AdversarialFineTuning, need_attack
from aft.methods.module import check_scale
from aft.methods.targets import Targets
from aft.methods.terms import Term, register_term
from aft.methods.views import Views


@dataclass(eq=False)
class SoftAlignment(Term):
    """Cross-entropy of the adversarial image to the teacher's distribution on the clean one (AGFT).

    ``scale_ratio`` (r) is the teacher's logit scale as a share of the student's: below 1 its labels are softer.
    """

    scale_ratio: float = 0.4
    needs: ClassVar[frozenset[str]] = frozenset({"teacher_clean"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale("scale_ratio", self.scale_ratio)

    def soft_labels(self, targets: Targets) -> Tensor:
        """``softmax( r S cos(f_0(x), t) )``, ``[B, K]``."""
        return (self.scale_ratio * targets.logits(targets.teacher_clean)).softmax(1)

    def __call__(self, targets: Targets, views: Views) -> Tensor:
        """``-mean sum_k q_k log p_k``."""
        return soft_cross_entropy(views.logits(views.adversarial), self.soft_labels(targets)).mean()


register_term("soft_alignment", SoftAlignment)


class AGFT(AdversarialFineTuning):
    """No labels: the original model's own distribution over the classes of the clean image is the target of the adversarial one.

    ``L = -sum_k q_k log p_k`` with ``q = softmax(r S cos(f_0(x), t))`` and ``p = softmax(S cos(f(x_adv), t))``; the attack maximises it.
    ``S`` is ``logit_scale`` (in training alone: the model keeps its own for use), ``r`` the term's ``scale_ratio``. With one-hot labels in
    the place of ``q`` it is TeCoA. Forwards of the image tower in a step with ``k`` attack steps: ``k + 2``.

    Reference:
        Cui et al., "AGFT: Alignment-Guided Fine-Tuning for Zero-Shot Adversarial Robustness of Vision-Language Models", CVPR 2026,
        arXiv 2603.29410.

    Where the released code differs (read in its repository):
        * one of its attack factories returns nothing, so that clean accuracy is reported as robust; its "AutoAttack" is the randomised
          version of another package; test sets are padded with repeated samples;
        * the attack runs under autocast with a mean-reduced loss; here the loss is summed and logits are fp32;
        * ``--clip_grad`` is a switch whose value, 1.0, is taken as the largest norm, before gradients are unscaled;
        * S, r and the rate are 100, 1 and 1e-5 unless told otherwise; the README's best are 180, 0.4 and 4e-4, forty times the rate that
          its TeCoA has: compare at tuned rates.
    """

    method: ClassVar[str] = "agft"
    default_terms: ClassVar[Mapping[str, Term]] = {"soft_alignment": SoftAlignment()}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        need_attack(self.attack, "AGFT")

    def objective(self, targets: Targets) -> Objective:
        """The same soft cross-entropy; without that term, the usual one."""
        term = self.terms.get("soft_alignment")
        if not isinstance(term, SoftAlignment):
            return super().objective(targets)
        text_KD, soft_BK = targets.text["class"], term.soft_labels(targets)
        return self.encoding_objective(
            lambda encoding, rows_n: soft_cross_entropy(self.model.logits(encoding, text_KD, self.logit_scale), soft_BK[rows_n])
        )
