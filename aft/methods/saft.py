"""SAFT: an attack, and a fine-tuning, on several descriptions of each class. B images, K classes, n descriptions, D width."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from aft.attacks import Objective
from aft.clip import Encoding
from aft.errors import ConfigError, DataError
from aft.methods.targets import Targets
from aft.methods.tecoa import TeCoA
from aft.methods.terms import Term, register_term
from aft.methods.views import Views


@dataclass(eq=False)
class DescriptionAlignment(Term):
    """Mean over n descriptions of the cross-entropy among all classes' texts of that description (SAFT)."""

    needs: ClassVar[frozenset[str]] = frozenset({"labels", "descriptions"})

    def __call__(self, targets: Targets, views: Views) -> Tensor:
        """``mean_i (1/n) sum_j CE(s cos(z_i, t_.j), y_i)``."""
        banks = targets.text["descriptions"].unbind(1)
        return torch.stack([F.cross_entropy(views.logits_over(views.adversarial, bank_KD), targets.labels) for bank_KD in banks]).mean()


register_term("description_alignment", DescriptionAlignment)


def own_descriptions(phrases: Sequence[Sequence[str]]) -> list[list[str]]:
    """What describes each class and no other: its first phrase, its last (a gloss, where the data have one), then those between.

    A phrase of two classes, such as a broader term, would ask the cross-entropy to tell equal texts apart. A class that shares all of
    its phrases keeps its first.

    Example:
        >>> own_descriptions([("pug", "pug-dog", "dog", "small, with a flat nose"), ("collie", "dog")])
        [['pug', 'small, with a flat nose', 'pug-dog'], ['collie']]
    """
    classes = Counter(phrase for of_class in phrases for phrase in set(of_class))
    own = [[phrase for phrase in of_class if classes[phrase] == 1] or [of_class[0]] for of_class in phrases]
    return [list(dict.fromkeys([of_class[0], of_class[-1], *of_class])) for of_class in own]


class SAFT(TeCoA):
    """TeCoA on n descriptions a class: the attack has to break them all, and so moves away from the meaning, not from a phrase.

    ``L = (1/n) sum_j CE(s cos(f(x_adv), t_.j), y)``; the attack maximises the same. Forwards of the image tower in a step with ``k`` attack
    steps: ``k + 1``.

    Args:
        descriptions: n, at least 1. A description of a class is one of the data set's phrases in a template (:func:`own_descriptions`: its
            name, its gloss, then its other names and broader terms), over again where there are fewer than n.

    For the other arguments see :class:`AdversarialFineTuning`.

    Reference:
        "Semantic-aware Adversarial Fine-tuning for CLIP", arXiv 2602.12461 (MIT licence). There, language models write the five
        descriptions of a class; here the data set gives them.

    Where the released code differs (read in its repository): its attack, with frozen weights, in eval mode and outside autocast, takes the
    mean of the batch; here the sum. That training averages over the descriptions, too, is our reading of it.
    """

    method: ClassVar[str] = "saft"
    makes: ClassVar[frozenset[str]] = frozenset({"descriptions"})
    default_terms: ClassVar[Mapping[str, Term]] = {"description_alignment": DescriptionAlignment()}

    def __init__(self, *args: Any, descriptions: int = 5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if descriptions < 1:
            raise ConfigError(f"descriptions = {descriptions}: a class needs one or more.")
        self.descriptions = descriptions

    def text_banks(self) -> dict[str, Callable[[], Tensor]]:
        """Adds ``descriptions``, ``[K, n, D]``."""
        return {**super().text_banks(), "descriptions": self._description_bank}

    def _description_bank(self) -> Tensor:
        phrases = self.data.class_phrases
        if not phrases:
            raise DataError("the data set has no phrases to describe its classes by: give class names, or a classes.json with glosses.")
        templates, own = self.templates or self.data.templates, own_descriptions(phrases)
        of_each = [[of_class[j % len(of_class)] for of_class in own] for j in range(self.descriptions)]
        return torch.stack([self.model.text_bank(names, templates) for names in of_each], 1)

    def objective(self, targets: Targets) -> Objective:
        """The mean cross-entropy over the descriptions."""
        banks = targets.text["descriptions"].unbind(1)

        def loss(encoding: Encoding, rows_n: Tensor) -> Tensor:
            """One value an image, ``[n]``."""
            labels_n = targets.labels[rows_n]
            logits = [self.model.logits(encoding, bank_KD, self.logit_scale) for bank_KD in banks]
            return torch.stack([F.cross_entropy(logits_nK, labels_n, reduction="none") for logits_nK in logits]).mean(0)

        return self.encoding_objective(loss)
