"""FARE: the embedding under attack stays the original one. B images, D embedding width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from aft.attacks import Objective
from aft.losses import squared_distance
from aft.methods.base import AdversarialFineTuning, need_attack
from aft.methods.targets import Targets
from aft.methods.terms import Term, register_term
from aft.methods.views import Views


@dataclass(eq=False)
class EmbeddingDistance(Term):
    """Squared distance of the embedding under attack from the teacher's on the clean image, not normalised (FARE, ``L_FARE``)."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher_clean"})

    def __call__(self, targets: Targets, views: Views) -> Tensor:
        """``mean ||f(x_adv) - f_0(x)||_2^2``."""
        return squared_distance(views.adversarial.embedding_BD, targets.teacher_clean.embedding_BD).mean()


register_term("embedding_distance", EmbeddingDistance)


class FARE(AdversarialFineTuning):
    """Unsupervised: no labels, no texts; what holds for the embedding holds for whatever is built on it.

    ``L = mean_i max_delta ||f(x_i + delta) - f_0(x_i)||_2^2`` on raw embeddings, summed over their width; the attack maximises the same.
    Forwards of the image tower in a step with ``k`` attack steps: ``k + 2``; of the text tower: none.

    Reference:
        Schlarmann et al., "Robust CLIP: Unsupervised Adversarial Fine-Tuning of Vision Embeddings for Robust Large Vision-Language
        Models", ICML 2024, arXiv 2402.12336 (``L_FARE``).

    Where the released code differs (read in its repository, MIT licence):
        * it runs the student on the clean images in every step, with a graph that is not used;
        * its scheduler steps after the optimiser, so the first step has the full learning rate;
        * its APGD in training normalises the embedding, against the formula;
        * its PGD has a momentum of 0.9 over signs, which for L-inf changes nothing; NaN in a gradient becomes zero; the last point is
          taken, not the best (as here);
        * the original model has OpenAI's weights whatever the student has, and is a ViT-B/32 or ViT-L/14: its own LAION and ConvNeXt
          models cannot be made by it;
        * it runs in fp32 without autocast;
        * its defaults (warm-up 14,000, batch 256, APGD) are not those of its README;
        * the student's own clean embedding as the target (``--trades``) and a share of a clean loss can be chosen; here a term does that.
    """

    method: ClassVar[str] = "fare"
    default_terms: ClassVar[Mapping[str, Term]] = {"embedding_distance": EmbeddingDistance()}
    objective_needs: ClassVar[frozenset[str]] = frozenset({"teacher_clean"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        need_attack(self.attack, type(self).__name__)

    def objective(self, targets: Targets) -> Objective:
        """The squared distance from the teacher's clean embedding."""
        clean_BD = targets.teacher_clean.embedding_BD
        return self.encoding_objective(lambda encoding, rows_n: squared_distance(encoding.embedding_BD, clean_BD[rows_n]))
