"""AdvFLYP: fine-tune like you pre-train, on adversarial images and captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from aft.losses import unit_distance
from aft.methods.base import need_attack
from aft.methods.distillation import CleanConsistency, TeacherDistillation
from aft.methods.learning_from_captions import LearningFromCaptions
from aft.methods.targets import Targets
from aft.methods.terms import CaptionContrast, Term, register_term
from aft.methods.views import Views


@dataclass(eq=False)
class FeatureProximity(Term):
    """The unit embedding under attack stays near the teacher's on the same image and near the student's clean one (AdvFLYP)."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher_adversarial", "clean"})

    def __call__(self, targets: Targets, views: Views) -> Tensor:
        """``mean ||z_adv - z_0,adv|| + mean ||z_adv - z_clean||``, distances not squared."""
        adversarial_BD = views.adversarial.embedding_BD
        to_teacher_B = unit_distance(adversarial_BD, targets.teacher_adversarial.embedding_BD)
        return (to_teacher_B + unit_distance(adversarial_BD, views.clean.embedding_BD)).mean()


register_term("feature_proximity", FeatureProximity)


class AdvFLYP(LearningFromCaptions):
    """CLIP's own loss on adversarial images and captions, with the embedding and the distribution over captions held near.

    ``L = InfoNCE(x_adv, captions) + feature_proximity + KL(P_adv || P_0,adv) + KL(P_adv || P_clean)`` with ``P`` over the captions of the
    batch; the attack maximises the image-to-caption half. The text tower is frozen. Features are gathered over processes, so the loss is
    that of the global batch; captions of labelled data are drawn from what is true of the class. Forwards of the image tower in a step
    with ``k`` attack steps: ``k + 3``.

    Reference:
        Xing et al., "Finetune Like You Pretrain: Boosting Zero-shot Adversarial Robustness in Vision-language Models", CVPR 2026
        Findings, arXiv 2604.11576.

    Where the released code differs (read in its repository):
        * a caption is true of its own image alone; here equal captions are true of each other's images, and drawn ones of every class that
          has the phrase;
        * the README divides eps by 256, the code by 255; the frozen branch builds a graph that nobody uses;
        * it stops when robust accuracy on Tiny-ImageNet has not risen for 10 epochs; here a run has its length.
        Its clean branch has a gradient, and distances of features are not squared, as here.
    """

    method: ClassVar[str] = "advflyp"
    default_terms: ClassVar[Mapping[str, Term]] = {
        "caption_contrast": CaptionContrast(),
        "feature_proximity": FeatureProximity(),
        "teacher_distillation": TeacherDistillation(bank="captions"),
        "clean_consistency": CleanConsistency(bank="captions"),
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        need_attack(self.attack, "AdvFLYP")
