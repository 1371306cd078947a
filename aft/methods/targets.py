"""Targets: what does not learn. Constants of one batch, without gradient, each computed at most once and only when asked for.

Shapes: B images, K classes, M captions, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from aft.batch import Batch
from aft.clip import Encoding, ZeroShotModel
from aft.errors import ConfigError, DataError


class Targets:
    """What the attack's objective and the terms may compare with.

    Args:
        batch: images, labels or captions.
        student: the model being trained (its own clean encoding in eval mode is a target: ``student_clean``).
        text: detached text banks, ``[K, D]`` each, by name.
        teacher: the frozen base model; none where no term needs it.
        logit_scale: a fixed factor on cosines; none means the model's own.
        tokens: whether encodings carry patch tokens.
    """

    def __init__(
        self,
        batch: Batch,
        *,
        student: ZeroShotModel,
        text: Mapping[str, Tensor],
        teacher: ZeroShotModel | None = None,
        logit_scale: float | None = None,
        tokens: bool = False,
    ) -> None:
        self.images = batch.images
        self.index = batch.index
        self.text = text
        self.logit_scale = logit_scale
        self.tokens = tokens
        self.caption_texts: Sequence[str] | None = batch.captions
        self.caption_truth_BM: Tensor | None = None
        self.adversarial_BCHW: Tensor | None = None
        self._labels = batch.labels
        self._student = student
        self._teacher = teacher

    @property
    def labels(self) -> Tensor:
        """``int64 [B]``, places in the training class list.

        Raises:
            DataError: the batch has captions only, or a label is outside the class list.
        """
        if self._labels is None:
            raise DataError("this batch has no labels: the data set gives captions only; use a method that learns from captions.")
        return self._labels

    @property
    def has_labels(self) -> bool:
        """Whether the batch is labelled."""
        return self._labels is not None

    @cached_property
    def teacher_clean(self) -> Encoding:
        """The teacher on the clean images."""
        return self._frozen_encoding(self._needed_teacher, self.images)

    @cached_property
    def teacher_adversarial(self) -> Encoding:
        """The teacher on the adversarial images; there only after the attack."""
        if self.adversarial_BCHW is None:
            raise ConfigError("teacher_adversarial is asked for before the attack has run: an objective may not use it.")
        return self._frozen_encoding(self._needed_teacher, self.adversarial_BCHW)

    @cached_property
    def student_clean(self) -> Encoding:
        """The student's own clean encoding in eval mode, as a constant."""
        modes = {module: module.training for module in self._student.modules()}
        self._student.eval()
        try:
            return self._frozen_encoding(self._student, self.images)
        finally:
            for module, training in modes.items():
                module.training = training

    @property
    def _needed_teacher(self) -> ZeroShotModel:
        if self._teacher is None:
            raise ConfigError(
                "a teacher encoding is asked for, but no term declares it: add 'teacher_clean' or 'teacher_adversarial' to its needs."
            )
        return self._teacher

    def _frozen_encoding(self, model: ZeroShotModel, images_BCHW: Tensor) -> Encoding:
        with torch.no_grad():
            encoding = model.encode(images_BCHW, tokens=self.tokens)
        tokens = encoding.tokens_BND
        return Encoding(_at_least_fp32(encoding.embedding_BD), None if tokens is None else _at_least_fp32(tokens))


def _at_least_fp32(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()
