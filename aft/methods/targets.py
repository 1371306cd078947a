"""Targets: what does not learn. Constants of one batch, without gradient, each computed at most once and only when asked for.

Shapes: B images, K classes, M captions, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from aft.batch import Batch
from aft.clip import Encoding, ZeroShotModel
from aft.errors import ConfigError, DataError, unknown_name
from aft.methods.captions import Captions
from aft.methods.teacher_cache import TeacherCache


class TextBanks(Mapping[str, Tensor]):
    """Detached text banks by name, each made when it is first asked for.

    Args:
        makers: functions that give ``[K, D]`` (``descriptions``: ``[K, n, D]``).
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = makers
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, bank: str) -> Tensor:
        if bank not in self._makers:
            raise ConfigError(unknown_name("text bank of this method", bank, self._makers))
        if bank not in self._made:
            self._made[bank] = self._makers[bank]().detach()
        return self._made[bank]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


class Targets:
    """What the attack's objective and the terms may compare with.

    Args:
        batch: images, labels or captions.
        student: the model being trained (its own clean encoding in eval mode is a target: ``student_clean``).
        text: detached text banks, ``[K, D]`` each, by name.
        captions: the captions of this step; none where the method learns from classes.
        teacher: the frozen base model; none where no term needs it.
        logit_scale: a fixed factor on cosines; none means the model's own.
        tokens: whether encodings carry patch tokens.
        samples_per_step: images of one optimiser step over all processes: what a sum in released code runs over.
        teacher_cache: what the teacher said of clean images before; none encodes them in every step.
    """

    def __init__(
        self,
        batch: Batch,
        *,
        student: ZeroShotModel,
        text: Mapping[str, Tensor],
        captions: Captions | None = None,
        teacher: ZeroShotModel | None = None,
        logit_scale: float | None = None,
        tokens: bool = False,
        samples_per_step: int | None = None,
        teacher_cache: TeacherCache | None = None,
    ) -> None:
        self.images = batch.images
        self.index = batch.index
        self.text = text
        self.logit_scale = logit_scale
        self.tokens = tokens
        self.captions = captions
        self.samples_per_step = samples_per_step or len(batch.images)
        self.adversarial_BCHW: Tensor | None = None
        self._labels = batch.labels
        self._student = student
        self._teacher = teacher
        self._teacher_cache = teacher_cache

    @property
    def resolution(self) -> int:
        """Side of the square that the tower sees, in pixels."""
        return self._student.record.resolution

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

    @property
    def caption_truth_BM(self) -> Tensor:
        """Which captions are true of which image, ``bool [B, M]``.

        Raises:
            ConfigError: the method makes no captions.
        """
        if self.captions is None:
            raise ConfigError("a term asks for captions, and this method makes none: use AdvFLYP or ContrastivePretraining.")
        return self.captions.truth_BM

    def logits(self, encoding: Encoding, bank: str = "class", logit_scale: float | None = None) -> Tensor:
        """Constant logits of a constant encoding over a detached bank, ``[B, K]``, at the method's scale unless another is given."""
        scale = self.logit_scale if logit_scale is None else logit_scale
        return self._student.logits(encoding, self.text[bank], scale).detach()

    @cached_property
    def teacher_clean(self) -> Encoding:
        """The teacher on the clean images."""
        teacher, cache = self._needed_teacher, self._teacher_cache
        if cache is None:
            return self._frozen_encoding(teacher, self.images)
        return Encoding(cache(self.index, self.images, lambda images: self._frozen_encoding(teacher, images).embedding_BD))

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
            return model.encode(images_BCHW, tokens=self.tokens).precise
