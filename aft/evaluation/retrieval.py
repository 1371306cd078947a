"""Image-text retrieval: the second task. Recall at k both ways, clean and with attacked images.

What is attacked is the image, and robust means that image-to-text recall at 1 holds: among all texts of the gallery, one that is true of
the image is nearest to it, when clean and after every attack. From the same images text-to-image recall is counted, clean and with each
image replaced by what the attack left of it.

Shapes: n images, N of the data set, T texts of the gallery, D embedding width, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aft.attacks.base import Objective
from aft.attacks.objectives import LossName, ce, dlr, dlr_targeted, margin
from aft.batch import CaptionedSet, EvaluationSet
from aft.cards import Verdicts, digest, standard_error
from aft.clip.model import Encoding, ZeroShotModel
from aft.clip.stages import Draw, encode_in_stages
from aft.errors import ConfigError, DataError
from aft.evaluation.tasks import ClassText, RightLast, Task

#: Texts that are compared with all images at once.
CHUNK = 1024


class Sight(NamedTuple):
    """What retrieval says of images: ``logits_nT`` over the gallery's texts, and their unit embeddings ``unit_nD``."""

    logits_nT: Tensor
    unit_nD: Tensor


def one_right(logits_nT: Tensor, truth_nT: Tensor) -> Tensor:
    """The gallery with one right text: what any classification loss can be put over, ``[n, T + 1]``.

    The last column is the nearest of the image's true texts, ``max_{t true} z_t``; all true texts have left the other columns (-inf), so
    none of them is ever counted as wrong. A tie with a wrong text is a loss: the first of equal logits is the answer.

    Example:
        >>> import torch
        >>> one_right(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[False, True, True]]))
        tensor([[3., -inf, -inf, 2.]])
    """
    best_n1 = logits_nT.masked_fill(~truth_nT, -torch.inf).amax(1, keepdim=True)
    return torch.cat([logits_nT.masked_fill(truth_nT, -torch.inf), best_n1], 1)


def over_gallery(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A classification loss with every true text counted as right: ``loss(one_right(logits, truth), T)``."""

    def of(outputs: Sight, truth_nT: Tensor, *targets_n: Tensor) -> Tensor:
        """Per image, to be maximised."""
        labels_n = torch.full_like(truth_nT[:, 0], truth_nT.shape[1], dtype=torch.long)
        return loss(one_right(outputs.logits_nT, truth_nT), labels_n, *targets_n)

    return of


@dataclass(frozen=True)
class Retrieval(Task):
    """Image-text retrieval over the captions of the images that are measured.

    Args:
        recall_at: the k of recall at k: the share of images (texts) with a true text (image) among the k nearest. A tie with a wrong one
            counts against it, so that a model that says the same of everything finds nothing.
        scale: factor on cosines in the losses; none: the model's own.

    Raises:
        ConfigError: no k, or one below 1.
    """

    recall_at: tuple[int, ...] = (1, 5, 10)
    scale: float | None = None

    name: ClassVar[str] = "retrieval"
    losses: ClassVar[Mapping[str, Callable[..., Tensor]]] = {
        "ce": over_gallery(ce), "margin": over_gallery(margin), "dlr": over_gallery(dlr), "dlr_targeted": over_gallery(dlr_targeted),
    }  # fmt: skip

    def __post_init__(self) -> None:
        object.__setattr__(self, "recall_at", tuple(sorted(set(self.recall_at))))
        if not self.recall_at or self.recall_at[0] < 1:
            raise ConfigError(f"recall_at = {list(self.recall_at)}: give one k or more, each 1 or above, such as [1, 5, 10].")

    def accept(self, data: EvaluationSet) -> None:
        """Refuses labelled data, and galleries that are smaller than k.

        Raises:
            DataError: no captions, or fewer texts or images than the largest k.
        """
        gallery = captions_of(data)
        texts, images, most = len(gallery.class_names), len(gallery), self.recall_at[-1]
        if most > min(texts, images):
            raise DataError(f"recall at {most} of {texts} texts and {images} images is always 1: give recall_at of {min(texts, images)} at "
                            "most, or more images (n).")

    def prepare(self, model: ZeroShotModel, data: EvaluationSet) -> ClassText:
        """Encodes every text of the gallery, once."""
        return ClassText(model.text_bank(data.class_names, ("{}",)))

    def forward(self, model: ZeroShotModel, images_nCHW: Tensor, context: ClassText, draws: Sequence[Draw] = ()) -> Sight:
        """Logits over the gallery and unit embeddings, the means over the draws of a random model."""
        asked: Sequence[Draw | None] = draws if model.stages.random and draws else [None]
        looks = [encode_in_stages(model, images_nCHW, draw) for draw in asked]
        logits = [model.logits(look, context.text_KD, self.scale) for look in looks]
        return Sight(torch.stack(logits).mean(0), torch.stack([Encoding(look.embedding_BD).unit_BD for look in looks]).mean(0))

    def objective(self, model: ZeroShotModel, context: ClassText, truth_n: Tensor, loss: LossName) -> Objective:
        """A classification loss over the gallery; targeted attacks aim it themselves, so for them it starts as cross-entropy."""
        start: LossName = "ce" if loss == "dlr_targeted" else loss
        return RightLast(self.classifier(model, context), one_right, truth_n, start, modules=[model])

    def answer(self, outputs: Sight) -> Tensor:
        """The nearest text."""
        return outputs.logits_nT.argmax(1)

    def score(self, outputs: Sight, truth_n: Tensor) -> Tensor:
        """Whether a true text is nearer than every wrong one: recall at 1."""
        return self.notes(outputs, truth_n)["rank"] == 0

    def describe(self, data: EvaluationSet) -> dict[str, Any]:
        """Which k, and which texts are true of which image."""
        return {"recall_at": list(self.recall_at), "truth_sha256": digest([list(texts) for texts in captions_of(data).true_texts])}

    def truth(self, data: EvaluationSet, rows: Sequence[int]) -> Tensor:
        """Which texts are true of each image, bool ``[n, T]``."""
        return captions_of(data).truth(rows)

    def choices(self, data: EvaluationSet) -> int:
        """One more than the wrong texts of the image that has the fewest."""
        return 1 + len(data.class_names) - max(map(len, captions_of(data).true_texts))

    def chance(self, data: EvaluationSet) -> float:
        """Of a text drawn blindly being true: the mean share of true texts."""
        return float(np.mean([len(texts) for texts in captions_of(data).true_texts])) / len(data.class_names)

    def notes(self, outputs: Sight, truth_n: Tensor) -> dict[str, Tensor]:
        """``rank``: how many wrong texts are at least as near as the nearest true one; ``embedding``: the unit vector."""
        logits_nX = one_right(outputs.logits_nT, truth_n)
        return {"rank": (logits_nX[:, :-1] >= logits_nX[:, -1:]).sum(1), "embedding": outputs.unit_nD}

    def metrics(self, verdicts: Verdicts, data: EvaluationSet, context: ClassText) -> dict[str, Any]:
        """Recall at each k both ways, clean and attacked (none without attacks), with chance at 1 and the sizes of the gallery."""
        gallery, texts_TD = captions_of(data), context.text_KD.float().cpu().numpy()
        states = {"clean": "clean_", **({"attacked": ""} if verdicts["right"].shape[1] else {})}
        to_text = {state: verdicts[f"{prefix}rank"] for state, prefix in states.items()}
        to_image = {state: image_ranks(texts_TD, verdicts[f"{prefix}embedding"], gallery.true_texts) for state, prefix in states.items()}
        shown = np.bincount(np.concatenate([np.array(texts) for texts in gallery.true_texts]), minlength=len(texts_TD))
        return {"recall": {
            "image_to_text": {**self._recalls(to_text), "n": len(gallery), "chance_at_1": self.chance(data)},
            "text_to_image": {**self._recalls(to_image), "n": len(texts_TD), "chance_at_1": float(shown.mean() / len(gallery))},
            "most_texts_of_an_image": max(map(len, gallery.true_texts)), "most_images_of_a_text": int(shown.max()),
        }}  # fmt: skip

    def _recalls(self, ranks: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        told: dict[str, Any] = {}
        for k in self.recall_at:
            shares = {state: float((rank < k).mean()) for state, rank in ranks.items()}
            errors = {f"{state}_standard_error": standard_error(share, len(ranks[state])) for state, share in shares.items()}
            told[f"recall_at_{k}"] = {"attacked": None, "attacked_standard_error": None, **shares, **errors}
        return told

    def classifier(self, model: ZeroShotModel, context: ClassText) -> Callable[[Tensor], Tensor]:
        """Logits over all texts: the doubts call an image right while its nearest text stays the one that it was when clean."""
        return lambda x_nCHW: self.forward(model, x_nCHW, context).logits_nT


def captions_of(data: EvaluationSet) -> CaptionedSet:
    """The data, where it has captions.

    Raises:
        DataError: it has none.
    """
    if not isinstance(data, CaptionedSet):
        raise DataError(f"retrieval was asked of {data.name}/{data.split}, which has classes and no captions: give datamodules.Captions or "
                        "caption shards, or ask for classification.")
    return data


def image_ranks(texts_TD: NDArray[Any], images_ND: NDArray[Any], true_texts: Sequence[Sequence[int]]) -> NDArray[Any]:
    """For each text the number of images it is not true of that are at least as near as the nearest one that it is true of, ``[T]``.

    Args:
        texts_TD, images_ND: unit vectors.
        true_texts: for each image the texts that are true of it; each text is true of one image or more.
    """
    ranks = []
    true_TN = np.zeros((len(texts_TD), len(images_ND)), bool)
    for image, texts in enumerate(true_texts):
        true_TN[list(texts), image] = True
    for start in range(0, len(texts_TD), CHUNK):
        true_tN, cosine_tN = true_TN[start : start + CHUNK], texts_TD[start : start + CHUNK] @ images_ND.T
        best_t1 = np.where(true_tN, cosine_tN, -np.inf).max(1, keepdims=True)
        ranks.append(((cosine_tN >= best_t1) & ~true_tN).sum(1))
    return np.concatenate(ranks)
