"""What is asked of a model, apart from how it is attacked and counted: the contract of a task, and zero-shot classification.

Shapes: n images, C channels, H rows, W columns, K classes, D embedding width, N images of the data set.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from aft.attacks.base import Judged, Objective
from aft.attacks.objectives import ClassificationObjective, LossName, TargetedLoss, ce, dlr, dlr_targeted, margin
from aft.batch import CaptionedSet, EvaluationSet
from aft.cards import Verdicts
from aft.clip.model import ZeroShotModel
from aft.clip.stages import Draw, encode_in_stages
from aft.errors import DataError
from aft.evaluation.calibration import calibration


class Task(ABC):
    """What the runner asks of a task; ``docs/add_a_task.md`` makes one from nothing.

    ``context`` is whatever ``prepare`` made, ``outputs`` whatever ``forward`` gives; neither the runner nor the attacks look into them.
    ``truth_n`` is what is known of the rows, with one row an image.
    """

    #: Id of the task on cards.
    name: ClassVar[str]
    #: ``ce``, ``margin``, ``dlr`` take (outputs, truth), ``dlr_targeted`` also targets; each gives ``[n]``, to be maximised.
    losses: ClassVar[Mapping[str, Callable[..., Tensor]]]

    def accept(self, data: EvaluationSet) -> None:  # noqa: B027  (a task may take any data)
        """Refuses data that the task cannot be asked on.

        Raises:
            DataError: what is missing.
        """

    @abstractmethod
    def prepare(self, model: ZeroShotModel, data: EvaluationSet) -> Any:
        """What is computed once for all images, such as a bank of class texts."""

    @abstractmethod
    def forward(self, model: ZeroShotModel, images_nCHW: Tensor, context: Any, draws: Sequence[Draw] = ()) -> Any:
        """The model's outputs for these images; a random model's are the mean over ``draws``."""

    @abstractmethod
    def objective(self, model: ZeroShotModel, context: Any, truth_n: Tensor, loss: LossName) -> Objective:
        """What an attack on these rows maximises."""

    @abstractmethod
    def answer(self, outputs: Any) -> Tensor:
        """What the model says, as one number a row that can be counted, int64 ``[n]``."""

    @abstractmethod
    def score(self, outputs: Any, truth_n: Tensor) -> Tensor:
        """Whether each row is right, bool ``[n]``."""

    def describe(self, data: EvaluationSet) -> dict[str, Any]:
        """What of the task decides a figure beside its name, as plain values; empty: nothing."""
        return {}

    def truth(self, data: EvaluationSet, rows: Sequence[int]) -> Tensor:
        """What is known of the images at ``rows``, one row each; the labels unless a task says otherwise."""
        return data.labels_N[torch.as_tensor(rows, dtype=torch.long)]

    def choices(self, data: EvaluationSet) -> int:
        """Among how many answers each image is answered: what losses and targets of a protocol are fitted to."""
        return len(data.class_names)

    def chance(self, data: EvaluationSet) -> float:
        """The share of the images that blind guessing gets right."""
        return 1 / self.choices(data)

    def notes(self, outputs: Any, truth_n: Tensor) -> dict[str, Tensor]:
        """What is kept of each row beside whether it is right, one row an image; columns ``clean_NAME`` and ``NAME`` of the verdicts."""
        return {}

    def metrics(self, verdicts: Verdicts, data: EvaluationSet, context: Any) -> dict[str, Any]:
        """Further figures over all rows."""
        return {}

    def classifier(self, model: ZeroShotModel, context: Any) -> Callable[[Tensor], Tensor] | None:
        """The task as the doubts look at it: images to logits whose largest is the answer; none: no doubts are made."""
        return None


@dataclass(frozen=True, eq=False)
class RightLast:
    """An attack's objective for a task whose truth is more than a label: a classification whose right answer is the last of its columns.

    Every classification loss applies, also the targeted ones, and so do all attacks but the authors' AutoAttack.

    Args:
        outputs: maps images to what the task says of them.
        reduce: of outputs and the truth of the same images makes logits ``[n, X]``: the wrong answers (-inf where there is none), then the
            right one. An image is broken as soon as a wrong one is at least as large.
        truth_B: with one row an image.
        loss: as in :class:`aft.attacks.ClassificationObjective`.
        targets_B: columns to go to; for the targeted losses alone.
        modules: what to freeze and put in eval mode during the attack.
    """

    outputs: Callable[[Tensor], Any]
    reduce: Callable[[Any, Tensor], Tensor]
    truth_B: Tensor
    loss: LossName = "ce"
    targets_B: Tensor | None = None
    modules: Sequence[nn.Module] = ()

    def __call__(self, x_nCHW: Tensor, rows_n: Tensor) -> Judged:
        """The loss to be maximised and the verdict."""
        objective, own_n = self._of(x_nCHW, rows_n)
        return objective(x_nCHW, own_n)

    def wrong_classes(self, x_nCHW: Tensor, rows_n: Tensor, count: int) -> Tensor:
        """The columns of the ``count`` largest wrong answers, int64 ``[n, count]``."""
        objective, own_n = self._of(x_nCHW, rows_n)
        return objective.wrong_classes(x_nCHW, own_n, count)

    def towards(self, targets_B: Tensor, loss: TargetedLoss = "dlr_targeted") -> RightLast:
        """The same under a targeted loss."""
        return replace(self, loss=loss, targets_B=targets_B)

    def _of(self, x_nCHW: Tensor, rows_n: Tensor) -> tuple[ClassificationObjective, Tensor]:
        logits_nX = self.reduce(self.outputs(x_nCHW), self.truth_B[rows_n])
        labels_n = torch.full_like(rows_n, logits_nX.shape[1] - 1)
        targets_n = None if self.targets_B is None else self.targets_B[rows_n]
        return ClassificationObjective(lambda _: logits_nX, labels_n, self.loss, targets_n), torch.arange(len(rows_n), device=rows_n.device)


@dataclass(frozen=True)
class ClassText:
    """What classification computes once: ``text_KD``, one unit vector a class of the label space."""

    text_KD: Tensor


@dataclass(frozen=True)
class Classification(Task):
    """Zero-shot classification: right when the class with the largest logit is the label.

    Args:
        scale: factor on cosines; none: the model's own.
    """

    scale: float | None = None

    name: ClassVar[str] = "classification"
    losses: ClassVar[Mapping[str, Callable[..., Tensor]]] = {"ce": ce, "margin": margin, "dlr": dlr, "dlr_targeted": dlr_targeted}

    def accept(self, data: EvaluationSet) -> None:
        """Refuses captions.

        Raises:
            DataError: there are no classes.
        """
        if isinstance(data, CaptionedSet):
            raise DataError(f"{data.name}/{data.split} has captions and no classes: ask for retrieval (--task aft.evaluation.Retrieval), "
                            "or give labelled data.")

    def prepare(self, model: ZeroShotModel, data: EvaluationSet) -> ClassText:
        """Encodes every class name in every template, once."""
        return ClassText(model.text_bank(data.class_names, data.templates))

    def forward(self, model: ZeroShotModel, images_nCHW: Tensor, context: ClassText, draws: Sequence[Draw] = ()) -> Tensor:
        """Logits over the label space, ``[n, K]``, the mean over the draws of a random model."""
        asked: Sequence[Draw | None] = draws if model.stages.random and draws else [None]
        looks = [model.logits(encode_in_stages(model, images_nCHW, draw), context.text_KD, self.scale) for draw in asked]
        return torch.stack(looks).mean(0) if len(looks) > 1 else looks[0]

    def objective(self, model: ZeroShotModel, context: ClassText, truth_n: Tensor, loss: LossName) -> Objective:
        """A classification loss over the model; targeted attacks aim it themselves, so for them it starts as cross-entropy."""
        start: LossName = "ce" if loss == "dlr_targeted" else loss
        return ClassificationObjective(lambda x_nCHW: self.forward(model, x_nCHW, context), truth_n, loss=start, modules=[model])

    def answer(self, outputs: Tensor) -> Tensor:
        """The class with the largest logit."""
        return outputs.argmax(1)

    def score(self, outputs: Tensor, truth_n: Tensor) -> Tensor:
        """Whether that class is the label."""
        return self.answer(outputs) == truth_n

    def notes(self, outputs: Tensor, truth_n: Tensor) -> dict[str, Tensor]:
        """``confidence``: the probability of the answer, ``max softmax(logits)``."""
        return {"confidence": outputs.softmax(1).amax(1)}

    def metrics(self, verdicts: Verdicts, data: EvaluationSet, context: ClassText) -> dict[str, Any]:
        """For each class its n, clean and robust accuracy (none where the class has no image, or nothing attacked); calibration."""
        return {
            "per_class": {name: self._of_class(verdicts, label) for label, name in enumerate(data.class_names)},
            "calibration": calibration(verdicts),
        }

    def _of_class(self, verdicts: Verdicts, label: int) -> dict[str, Any]:
        here = verdicts["label"] == label
        n, attacked = int(here.sum()), verdicts["right"].shape[1] > 0
        robust = float(np.mean(verdicts["right"][here, -1])) if n and attacked else None
        return {"n": n, "clean_accuracy": float(np.mean(verdicts["clean"][here])) if n else None, "robust_accuracy": robust}

    def classifier(self, model: ZeroShotModel, context: ClassText) -> Callable[[Tensor], Tensor]:
        """Itself."""
        return lambda x_nCHW: self.forward(model, x_nCHW, context)
