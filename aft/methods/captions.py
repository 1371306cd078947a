"""Captions of a batch, over all processes: given with the images, or drawn from what is true of their classes.

Shapes: B images of this process, M captions of all processes, K classes, D embedding width.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aft.clip import ZeroShotModel
from aft.methods.distributed import gather_with_gradient


@dataclass(eq=False)
class Captions:
    """The captions of one step.

    Args:
        texts: of this process.
        truth_BM: bool, which of all processes' captions are true of which image of this one.
        shared: every process has the same texts (one a class), so that nothing is gathered.
    """

    texts: list[str]
    truth_BM: Tensor
    shared: bool = False
    _embedded: Tensor | None = field(init=False, default=None, repr=False)

    def embed(self, model: ZeroShotModel) -> Tensor:
        """Unit embeddings of all captions, ``[M, D]``, as the model classifies with them: through its text transformation, too.

        With gradient where the text side learns. The tower runs once.
        """
        if self._embedded is None:
            own_bD = model.text_transform(model.encode_text(self.texts))
            self._embedded = own_bD if self.shared else gather_with_gradient(own_bD)
        return self._embedded


def given_captions(texts: Sequence[str], device: torch.device) -> Captions:
    """A batch of image-text pairs: an image's own caption is true of it, and so is every equal text."""
    own_B = torch.tensor([_number_of(text) for text in texts], device=device)
    return Captions(list(texts), own_B[:, None] == gather_with_gradient(own_B)[None, :])


def drawn_captions(
    phrases: Sequence[Sequence[str]],
    labels_B: Tensor,
    keys: Sequence[str] | str,
    templates: Sequence[str],
    name_share: float,
) -> Captions:
    """One caption an image, or one a class: a phrase of the class in a template, a function of its key alone.

    A caption is true of every class that has its phrase, so ``dog`` is no false negative of a poodle.

    Args:
        phrases: per class, all that is true of it, name first.
        labels_B: classes of the images.
        keys: one an image; a single one draws a caption for each class, the same on every process.
        templates: with one ``{}`` each.
        name_share: share of captions that take the class's first name; the rest take any of its phrases.
    """
    one_a_class = isinstance(keys, str)
    if isinstance(keys, str):
        common = random.Random(keys)
        draws = [(common, c) for c in range(len(phrases))]
    else:
        draws = [(random.Random(key), int(y)) for key, y in zip(keys, labels_B, strict=True)]
    chosen = [phrases[c][0] if draw.random() < name_share else draw.choice(phrases[c]) for draw, c in draws]
    texts = [draw.choice(templates).replace("{}", phrase) for (draw, _), phrase in zip(draws, chosen, strict=True)]
    holds = [set(of_class) for of_class in phrases]
    truth_bK = torch.tensor([[phrase in of_class for of_class in holds] for phrase in chosen], device=labels_B.device)
    truth_MK = truth_bK if one_a_class else gather_with_gradient(truth_bK.float()) > 0.5
    return Captions(texts, truth_MK.T[labels_B], shared=one_a_class)


def _number_of(text: str) -> int:
    """63 bits that name a text on every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
