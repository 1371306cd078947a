"""Sim-CLIP: clean and adversarial embedding of one tower point the same way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from aft.attacks import Objective
from aft.losses import cosine, squared_distance
from aft.methods.base import AdversarialFineTuning, need_attack
from aft.methods.targets import Targets
from aft.methods.terms import Term, Weight, one_of, register_term
from aft.methods.views import Views


@dataclass(eq=False)
class SiameseCosine(Term):
    """Minus the cosine of clean and adversarial embedding, each held constant in turn (Sim-CLIP); -1 is its least value."""

    needs: ClassVar[frozenset[str]] = frozenset({"clean"})

    def __call__(self, targets: Targets, views: Views) -> Tensor:
        """``-(cos(f(x_adv), sg f(x)) + cos(f(x), sg f(x_adv))) / 2``, averaged."""
        clean_BD, adversarial_BD = views.clean.embedding_BD, views.adversarial.embedding_BD
        return -(cosine(adversarial_BD, clean_BD.detach()) + cosine(clean_BD, adversarial_BD.detach())).mean() / 2


@dataclass(eq=False)
class TeacherCosine(Term):
    """Minus the cosine of the adversarial embedding and the teacher's clean one (Sim-CLIP as released)."""

    weight: Weight = 0.5
    needs: ClassVar[frozenset[str]] = frozenset({"teacher_clean"})

    def __call__(self, targets: Targets, views: Views) -> Tensor:
        """``-mean cos(f(x_adv), f_0(x))``."""
        return -cosine(views.adversarial.embedding_BD, targets.teacher_clean.embedding_BD).mean()


register_term("siamese_cosine", SiameseCosine)
register_term("teacher_cosine", TeacherCosine)


class SimCLIP(AdversarialFineTuning):
    """Unsupervised and Siamese: ``L = (D(f(x_adv), sg f(x)) + D(f(x), sg f(x_adv))) / 2`` with ``D(p, z) = -cos(p, z)``.

    The attack maximises the squared distance to the student's own clean embedding, or to the teacher's (``away_from: teacher``). Forwards
    of the image tower in a step with ``k`` attack steps: ``k + 3``; as released ``k + 2``.

    Args:
        away_from: what the attack moves the embedding away from: ``student`` or ``teacher``.

    For the other arguments see :class:`AdversarialFineTuning`.

    Reference:
        Hossain and Imteaj, "Sim-CLIP: Unsupervised Siamese Adversarial Fine-Tuning for Robust and Semantically-Rich Vision-Language
        Models", arXiv 2407.14971; Sim-CLIP+: arXiv 2409.07353.

    Where the released code differs (read in its repository; ``configs/methods/sim_clip_released.yaml`` does as it does):
        * the clean branch is the *frozen* model, so there is no Siamese pair, and the second half has no gradient: what remains is half the
          cosine to the frozen clean embedding;
        * the attack maximises the squared distance to that embedding, not the cosine;
        * a variant takes the frozen embedding from another augmentation of the image; here there is one view;
        * its sources disagree on the optimiser: the README has AdamW with 1e-3 and a decay of 1e-5, the script SGD with the same, a
          commented line AdamW with 1e-5 and 1e-4; the module that the README starts does not exist.

    There is no predictor between the two halves, so holding one side constant in turn halves the gradient of the cosine and changes nothing
    else.
    """

    method: ClassVar[str] = "sim_clip"
    default_terms: ClassVar[Mapping[str, Term]] = {"siamese_cosine": SiameseCosine()}

    def __init__(self, *args: Any, away_from: Literal["student", "teacher"] = "student", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        need_attack(self.attack, "Sim-CLIP")
        one_of("away_from", away_from, ("student", "teacher"))
        self.away_from = away_from
        self.needs = self.needs | ({"teacher_clean"} if away_from == "teacher" else set())

    def objective(self, targets: Targets) -> Objective:
        """The squared distance from a constant clean embedding."""
        clean = targets.student_clean if self.away_from == "student" else targets.teacher_clean
        return self.encoding_objective(lambda encoding, rows_n: squared_distance(encoding.embedding_BD, clean.embedding_BD[rows_n]))
