"""Contrastive pre-training of image and text tower, clean or adversarial, from captions or from classes with many phrases.

Shapes: B images, M captions, K classes, D embedding width.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from aft.batch import Batch
from aft.clip.prompts import CAPTION_TEMPLATES
from aft.errors import ConfigError, DataError
from aft.methods.base import AdversarialFineTuning
from aft.methods.targets import Targets
from aft.methods.terms import CaptionContrast, Term, truth_of_captions
from aft.methods.views import Views

MAX_LOG_SCALE = math.log(100.0)


class ContrastivePretraining(AdversarialFineTuning):
    """CLIP's pre-training (arXiv 2103.00020); with an attack it is adversarial pre-training.

    Labelled data become captions: at every step each class (or each image) draws one of its phrases (names, hypernyms, gloss) and
    one template. A caption is true of every image whose class has that phrase, so ``dog`` is no false negative of a poodle.

    Args:
        captions_per: ``class`` draws one caption a class (a class-caption cross-entropy), ``image`` one an image (InfoNCE).
        caption_templates: templates that captions are drawn from; none means a short list of general ones.
        name_share: share of captions that take the class's first name; the rest take any of its phrases.

    For the other arguments see :class:`AdversarialFineTuning`; base weights may be random and the attack may be none.
    """

    method: ClassVar[str] = "none"
    default_terms: ClassVar[Mapping[str, Term]] = {"caption_contrast": CaptionContrast()}
    trains_text: ClassVar[bool] = True
    keeps_statistics: ClassVar[bool] = False  # random weights have none worth keeping

    def __init__(
        self,
        *args: Any,
        captions_per: Literal["class", "image"] = "class",
        caption_templates: list[str] | None = None,
        name_share: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.captions_per = captions_per
        self.caption_templates = list(caption_templates or CAPTION_TEMPLATES)
        self.name_share = name_share

    def targets(self, batch: Batch) -> Targets:
        """Targets with this step's captions and which of them are true of which image."""
        targets = Targets(
            batch, student=self.model, text={}, teacher=self.teacher, logit_scale=self.logit_scale, tokens="tokens" in self.needs
        )
        if batch.captions is not None:
            self._one_process("image-text pairs")
            targets.caption_truth_BM = truth_of_captions(batch.captions, batch.images.device)
            return targets
        texts, truth_MK = self._draw_captions(self._check_labels(batch))
        targets.caption_texts = texts
        targets.caption_truth_BM = truth_MK.T[targets.labels]
        return targets

    def _one_process(self, what: str) -> None:
        if self.trainer.world_size > 1:
            raise ConfigError(
                f"{what} on several processes are not there yet (captions are not gathered): use one process, or captions_per: class."
            )

    def _draw_captions(self, labels_B: Tensor) -> tuple[list[str], Tensor]:
        """One caption a class or an image, and for which classes each is true (``bool [M, K]``)."""
        phrases = self.data.class_phrases
        if not phrases:
            raise DataError("the data set has no phrases to make captions of: give class names, or data with captions.")
        if self.captions_per == "image":
            self._one_process("captions_per: image")
        draw = random.Random(f"{self.seed}/{self.global_step}")
        classes = range(len(phrases)) if self.captions_per == "class" else [int(y) for y in labels_B]
        chosen = [phrases[c][0] if draw.random() < self.name_share else draw.choice(phrases[c]) for c in classes]
        texts = [draw.choice(self.caption_templates).replace("{}", phrase) for phrase in chosen]
        holds = [set(of_class) for of_class in phrases]
        truth = [[phrase in of_class for of_class in holds] for phrase in chosen]
        return texts, torch.tensor(truth, device=labels_B.device)

    def views(self, targets: Targets) -> Views:
        """The captions' embeddings are live: the text tower learns."""
        captions = targets.caption_texts
        if captions is None:
            raise DataError("this batch has neither labels nor captions.")
        text: dict[str, Callable[[], Tensor]] = {
            "captions": lambda: self.model.encode_text(captions),
            "class": lambda: self.class_bank("train"),
        }
        return Views(self.model, text=text, logit_scale=self.logit_scale, tokens="tokens" in self.needs)

    def perturb(self, targets: Targets):  # type: ignore[no-untyped-def]
        """With an attack, it maximises cross-entropy to the detached class texts."""
        if self.attack is not None:
            targets.text = {"class": self.class_bank("train")}
        return super().perturb(targets)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Keeps the logit scale at 100 or below, as CLIP does."""
        with torch.no_grad():
            self.model.clip.get_parameter("logit_scale").clamp_(max=MAX_LOG_SCALE)
