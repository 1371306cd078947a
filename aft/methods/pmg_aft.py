"""PMG-AFT: the pre-trained model guides the fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from aft.methods.distillation import CleanConsistency, TeacherDistillation
from aft.methods.tecoa import TeCoA
from aft.methods.terms import Alignment, Term


class PMGAFT(TeCoA):
    """TeCoA, held near the frozen original on the adversarial image and near itself on the clean one.

    ``L = CE(x_adv) + alpha KL(P_adv || P_teacher(x_adv)) + beta KL(P_adv || P_clean)``, ``alpha = beta = 1``; the attack maximises the
    cross-entropy alone. Forwards of the image tower in a step with ``k`` attack steps: ``k + 3``.

    Reference:
        Wang et al., "Pre-trained Model Guided Fine-Tuning for Zero-Shot Adversarial Robustness", CVPR 2024, arXiv 2401.04350.
        The direction of the divergences and the two weights are from memory.

    Where the released code differs (read in its repository; ``configs/methods/pmg_aft_released.yaml`` does as it does):
        * texts are normalised again after they were multiplied by the logit scale, so all distributions have scale 1 in place of 100;
        * both divergences run the other way, ``KL(P_teacher || P_adv)`` and ``KL(P_clean || P_adv)``;
        * they are summed over the batch while the cross-entropy is its mean, so their weight grows with the batch size; there are no
          ``alpha`` and ``beta``;
        * the clean distribution has a gradient, its entropy's included (here, too, unless ``detach`` is set; whether the paper's has, is
          not known to us);
        * pixels are normalised by ImageNet's mean and standard deviation;
        * attack gradients add to the weights' own, as in TeCoA's code; eps is 2/255 with 5 steps unless told otherwise;
        * the teacher builds a graph that nobody uses; the best checkpoint is chosen on all 16 test sets; its AutoAttack runs in fp32, all
          other attacks under fp16 autocast, and robust accuracy depends on the test batch size (issue 1 of its repository).
        (Three versions are in use: AGFT's repository runs scale 100, ``KL(P_teacher || P_adv)`` and a mean; TTC's and AdvFLYP's run scale
        100, ``KL(P_adv || P_teacher)`` and a mean.)
    """

    method: ClassVar[str] = "pmg_aft"
    default_terms: ClassVar[Mapping[str, Term]] = {
        "alignment": Alignment(),
        "teacher_distillation": TeacherDistillation(),
        "clean_consistency": CleanConsistency(),
    }
