"""What methods share that learn from captions: image-text pairs, or captions drawn from what is true of a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import Tensor

from aft.batch import Batch
from aft.clip import Encoding
from aft.clip.prompts import CAPTION_TEMPLATES
from aft.errors import ConfigError, DataError
from aft.losses import image_to_caption
from aft.methods.base import AdversarialFineTuning
from aft.methods.captions import Captions, drawn_captions, given_captions
from aft.methods.objectives import EncodingObjective
from aft.methods.targets import Targets
from aft.methods.terms import one_of


class LearningFromCaptions(AdversarialFineTuning):
    """Adds the text bank ``captions``, ``[M, D]`` over all processes, and an attack on the image-to-caption loss.

    Labelled data become captions: at every step each image (or each class) draws one of its phrases (names, hypernyms, gloss) and one
    template. The attack sees the captions of all processes as constants, and gathers no images.

    Args:
        captions_per: ``image`` draws one caption an image (InfoNCE), ``class`` one a class (a class-caption cross-entropy).
        caption_templates: templates that captions are drawn from; none means a short list of general ones.
        name_share: share of captions that take the class's first name; the rest take any of its phrases.

    For the other arguments see :class:`AdversarialFineTuning`.

    Raises:
        ConfigError: name_share is no share, or captions_per is unknown.
    """

    makes: ClassVar[frozenset[str]] = frozenset({"captions"})

    def __init__(
        self,
        *args: Any,
        captions_per: Literal["class", "image"] = "image",
        caption_templates: list[str] | None = None,
        name_share: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= name_share <= 1:
            raise ConfigError(f"name_share = {name_share} is outside [0, 1]: it is the share of captions that take the class's first name.")
        one_of("captions_per", captions_per, ("image", "class"))
        self.captions_per = captions_per
        self.caption_templates = list(caption_templates or CAPTION_TEMPLATES)
        self.name_share = name_share

    def captions(self, batch: Batch) -> Captions:
        """Those of the batch, or drawn ones: a function of seed, step and sample.

        Raises:
            DataError: the batch has neither captions nor labels, or its classes have no phrases.
        """
        if batch.captions is not None:
            return given_captions(batch.captions, batch.images.device)
        if batch.labels is None:
            raise DataError("this batch has neither captions nor labels to draw captions by: use data with captions, or labelled data.")
        labels_B, phrases = self._check_labels(batch), self.data.class_phrases
        if not phrases:
            raise DataError("the data set has no phrases to make captions of: give class names, or data with captions.")
        step = f"{self.seed}/{self.global_step}"
        keys = step if self.captions_per == "class" else [f"{step}/{index}" for index in batch.index.tolist()]
        return drawn_captions(phrases, labels_B, keys, self.caption_templates, self.name_share)

    def live_banks(self, targets: Targets) -> dict[str, Callable[[], Tensor]]:
        """Adds the captions' embeddings with gradient, where the text tower or the text transformation learns."""
        live, captions = super().live_banks(targets), targets.captions
        if captions is None or not (self.trains_text or live):
            return live
        return {**live, "captions": lambda: captions.embed(self.model)}

    def objective(self, targets: Targets) -> EncodingObjective:
        """The image-to-caption cross-entropy of this process's images."""
        truth_BM, captions_MD = targets.caption_truth_BM, targets.text["captions"]

        def loss(encoding: Encoding, rows_n: Tensor) -> Tensor:
            """Against the captions of all processes, ``[n]``."""
            return image_to_caption(self.model.logits(encoding, captions_MD, self.logit_scale), truth_BM[rows_n])

        return self.encoding_objective(loss)
