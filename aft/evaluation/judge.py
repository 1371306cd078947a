"""A verdict on each image of one batch: right when clean, and after each attack in turn, always by a fresh forward in fp32 (or fp64).

Shapes: n images of a batch, C channels, H rows, W columns, A attacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from aft.attacks import StockAttack, sample_keys
from aft.attacks.adaptive import Expected
from aft.attacks.base import Objective
from aft.attacks.sight import Dice, Sight
from aft.batch import EvaluationSet
from aft.cards import Verdicts, cell_of
from aft.clip.model import ZeroShotModel, at_least_fp32
from aft.clip.stages import Stages, draws_for
from aft.errors import ConfigError
from aft.evaluation.adaptive import applying
from aft.evaluation.checks import inside
from aft.evaluation.origin import data_block, model_block
from aft.evaluation.planned import Planned
from aft.evaluation.protocols import Protocol
from aft.evaluation.subsets import SELECTION_SEED
from aft.evaluation.tasks import Classification, Task

#: What of a model identifies a cell. Not its name or place: the same weights read the same way are the same model.
MODEL_IDENTITY = ("sha256", "resolution", "mean", "std", "activation", "text_transform")


@dataclass(frozen=True)
class Survivors:
    """Images that a larger radius did not break: they are taken as robust at a smaller one, and not attacked again.

    The attack at the smaller radius could still have broken some of them (an attack is no proof), so accuracy can only come out higher.

    Args:
        cell: id of the cell with the larger radius.
        eps: that radius, in units of the pixel range.
        rows: places in the data of that cell's robust images.
    """

    cell: str
    eps: float
    rows: frozenset[int]


@dataclass(frozen=True)
class Cell:
    """One figure to measure.

    Args:
        model: on its device.
        data: the samples and the label space, as :func:`aft.evaluation.subsets.first` chose them.
        protocol: the attacks.
        seed: of the attacks' noise.
        task: what is asked of the model.
        survivors: of a larger radius; none attacks every image that is right when clean.

    Raises:
        ConfigError: survivors of a radius that is not larger; a protocol for defences and a model that declares no stages, or survivors.
        DataError: data that the task cannot be asked on.
    """

    model: ZeroShotModel
    data: EvaluationSet
    protocol: Protocol
    seed: int = 0
    task: Task = field(default_factory=Classification)
    survivors: Survivors | None = None

    def __post_init__(self) -> None:
        self.task.accept(self.data)
        if self.survivors is not None and not self.survivors.eps > (self.protocol.eps or 0):
            raise ConfigError(f"survivors of eps = {self.survivors.eps:g} say nothing of eps = {self.protocol.eps}: take a larger radius.")
        if self.protocol.plan is not None and self.survivors is not None:
            raise ConfigError(f"{self.protocol.name} attacks every image at every radius: leave out largest_first.")
        _ = self.moves, self.defense  # a model that does not fit is known before anything is measured

    @property
    def moves(self) -> tuple[Planned, ...]:
        """The attacks of the protocol that apply to the model."""
        plan = self.protocol.plan
        return self.protocol.attacks if plan is None else applying(self.protocol.attacks, stages_of(self.model), plan)

    @property
    def defense(self) -> dict[str, Any] | None:
        """``name`` and ``settings`` of the model's defence; none for an undefended model.

        Raises:
            ConfigError: a model with stages that does not say what it is.
        """
        told = getattr(self.model, "defense", None)
        if told is None and stages_of(self.model).declared:
            raise ConfigError(f"{type(self.model).__name__} declares stages but no defense: give it a property defense that returns "
                              '{"name": ..., "settings": {...}}, by which its cards are told apart.')  # fmt: skip
        return None if told is None else {"name": told["name"], "settings": dict(told["settings"])}

    @property
    def resolution(self) -> int:
        """Height of the images as they are attacked, pixels."""
        native = int(self.data.batch([0]).images.shape[-2])
        return self.model.record.resolution if self.protocol.space == "model" else native

    def in_space(self, images_nCHW: Tensor) -> Tensor:
        """Images in the pixels that the protocol attacks."""
        return self.model.resize(images_nCHW).clamp(0, 1) if self.protocol.space == "model" else images_nCHW

    @property
    def threat(self) -> dict[str, Any] | None:
        """A card's ``threat``: ``native`` pixels are those before any resize, ``model`` those after it; none without attacks."""
        if not self.protocol.attacks:
            return None
        return {"norm": self.protocol.norm, "eps": self.protocol.eps, "space": self.protocol.space, "resolution": self.resolution}

    @property
    def seeds(self) -> dict[str, int | None]:
        """A card's ``seeds``; the attack's is none without attacks, the scoring's none where the model is not random.

        One number may serve all: draws of an attack, of the choice among its points and of the verdict never meet (``draws_for``).
        """
        attack, scoring = (self.seed if there else None for there in (self.protocol.attacks, stages_of(self.model).random))
        return {"attack": attack, "selection": SELECTION_SEED, "scoring": scoring}

    @property
    def attacks(self) -> list[dict[str, Any]]:
        """A card's ``attacks``."""
        return [planned.describe(len(self.data)) for planned in self.moves]

    @cached_property
    def id(self) -> str:
        """The card's ``cell``: a hash of all that decides the figure."""
        model = model_block(self.model.record)
        return cell_of({
            "task": self.task.name, "model": {key: model[key] for key in MODEL_IDENTITY}, "data": data_block(self.data),
            "protocol": {"name": self.protocol.name, "fidelity": self.protocol.fidelity}, "threat": self.threat, "attacks": self.attacks,
            "settings": [planned.attack.describe() for planned in self.moves], "defense": self.defense, "seeds": self.seeds,
            "precision": "fp32", **({"survivors": self.survivors.cell} if self.survivors else {}),
            **({"scale": self.protocol.scale} if self.protocol.scale else {}),
            **({"corruptions": self.protocol.corruptions.describe()} if self.protocol.corruptions else {}),
            **({"task_settings": told} if (told := self.task.describe(self.data)) else {}),
            **({"plan": self.protocol.plan.describe()} if self.protocol.plan else {}),
        })  # fmt: skip


def cell_under(
    protocol: Protocol, model: ZeroShotModel, data: EvaluationSet, task: Task, seed: int = 0, survivors: Survivors | None = None
) -> Cell:
    """The cell of a protocol, which may bring class texts and a scale of its own.

    Raises:
        ConfigError: a protocol that brings them, for another task than classification.
    """
    if protocol.templates or protocol.scale:
        if not isinstance(task, Classification):
            raise ConfigError(f"protocol {protocol.name} brings class texts or a scale for classification, and the task is {task.name}: "
                              "take one of clean, pgd, apgd, strict.")
        data = replace(data, templates=protocol.templates or data.templates)
        task = replace(task, scale=protocol.scale or task.scale)
    return Cell(model, data, protocol, seed, task, survivors)


def stages_of(model: object) -> Stages:
    """What a model declares; nothing where it knows of no stages."""
    stages = getattr(model, "stages", Stages())
    assert isinstance(stages, Stages)
    return stages


class Cost:
    """Counts the images that go forward and backward through an image tower while it is open."""

    def __init__(self, tower: nn.Module) -> None:
        self.tower, self.forwards, self.backwards = tower, 0, 0

    def _count(self, tower: nn.Module, arguments: Any, output: Any) -> None:
        images = len(arguments[0])
        self.forwards += images
        embedding = output[0] if isinstance(output, tuple) else output
        if embedding.requires_grad:
            embedding.register_hook(lambda _: self._count_backward(images))

    def _count_backward(self, images: int) -> None:
        self.backwards += images

    def __enter__(self) -> Cost:
        self._handle = self.tower.register_forward_hook(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Eval mode and full fp32 (no autocast, no TF32) while it is open; afterwards as before."""
    training = [part for part in model.modules() if part.training]
    precision = torch.get_float32_matmul_precision()
    device = next(model.parameters()).device.type
    model.eval()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for part in training:
            part.training = True


class Judge:
    """Judges batches of one cell; opened by the runner inside :func:`scoring`.

    Args:
        cell: what to measure.
    """

    def __init__(self, cell: Cell) -> None:
        self.cell, self.model, self.task = cell, cell.model, cell.task
        self.context = self.task.prepare(cell.model, cell.data)
        self.device = next(cell.model.parameters()).device

    def __call__(self, rows: Sequence[int]) -> tuple[Verdicts, Tensor]:
        """Verdicts on these rows of the cell's data, and the last adversarial image of each (the clean one where none was made).

        An image that is wrong when clean is not attacked, nor is one that an earlier attack has broken.
        """
        batch, truth_n = self.cell.data.batch(rows), self.task.truth(self.cell.data, rows).to(self.device)
        shown_nCHW = self.cell.in_space(batch.images.to(self.device))
        keys_n = sample_keys(self.cell.seed, 0, batch.index).to(self.device)
        seen = self.look(shown_nCHW, truth_n, keys_n)
        spared = self.cell.survivors.rows if self.cell.survivors else frozenset()
        spared_n = torch.tensor([row in spared for row in rows], device=self.device)
        course = _Course(shown_nCHW, truth_n, keys_n, seen, spared_n)
        for planned in self.cell.protocol.attacks:
            shown = planned.limit(len(self.cell.data))
            self.attack(planned, course, torch.tensor([row < shown for row in rows], device=self.device))
        corrupted = self.corrupted(shown_nCHW, truth_n, batch.index, keys_n)
        columns = {"row": torch.as_tensor(rows), "index": batch.index, "clean_answer": seen.answer_n, "clean": seen.right_n}
        labels = {} if batch.labels is None else {"label": batch.labels}
        clean = {f"clean_{name}": note for name, note in seen.notes.items()}
        columns |= labels | clean | corrupted | course.columns()
        return {name: _array(column) for name, column in columns.items()}, course.shown_nCHW

    def corrupted(self, images_nCHW: Tensor, truth_n: Tensor, index_n: Tensor, keys_n: Tensor) -> dict[str, Tensor]:
        """The column ``corrupted``, bool ``[n, kinds times severities]``: whether each is right on each corrupted image."""
        told = self.cell.protocol.corruptions
        if told is None:
            return {}
        rights = [self.look(told.apply(images_nCHW, index_n, *one), truth_n, keys_n).right_n for one in told.each()]
        return {"corrupted": torch.stack(rights, 1)}

    def look(self, images_nCHW: Tensor, truth_n: Tensor, keys_n: Tensor) -> Seen:
        """The fresh forward. It knows nothing of any attack (E2), nor its random numbers."""
        with torch.no_grad():
            draws = draws_for("scoring", keys_n)
            outputs = self.task.forward(self.model, at_least_fp32(images_nCHW.detach()), self.context, draws)
            return Seen(self.task.answer(outputs), self.task.score(outputs, truth_n), self.task.notes(outputs, truth_n))

    def objective(self, planned: Planned, truth_n: Tensor, keys_n: Tensor, place: int) -> Objective:
        """What the attack maximises; of a random model a new draw at each forward. AutoAttack's own code throws its dice by place."""
        if not stages_of(self.model).random:
            return self.task.objective(self.model, self.context, truth_n, planned.loss)
        sight = Sight(self.model)
        inner: Objective = self.task.objective(sight, self.context, truth_n, planned.loss)  # type: ignore[arg-type]
        return inner if isinstance(planned.attack, StockAttack) else Expected(inner, sight, Dice(keys_n, place))

    def attack(self, planned: Planned, course: _Course, meant_n: Tensor) -> None:
        """Shows one attack the images that are still right, of those that it is meant for, and records what came of it."""
        rows_n = (course.right_n & ~course.spared_n & meant_n).nonzero().flatten()
        right_n, agree_n = course.right_n.clone(), torch.ones_like(course.right_n)
        if len(rows_n):
            clean_nCHW, truth_n = course.clean_nCHW[rows_n], course.truth_n[rows_n]
            objective = self.objective(planned, truth_n, course.keys_n[rows_n], len(course.rights))
            result = planned.attack(objective, clean_nCHW, course.keys_n[rows_n])
            seen = self.look(result.x_BCHW, truth_n, course.keys_n[rows_n])
            within_n = inside(result.x_BCHW, clean_nCHW, planned.attack.norm, planned.attack.threat.radius)
            course.see(rows_n, result.x_BCHW, seen)
            right_n[rows_n] = seen.right_n
            course.inside_n[rows_n] &= within_n
            if result.broken_B is not None:
                agree_n[rows_n] = result.broken_B == ~seen.right_n
        course.record(right_n, agree_n)


class Seen(NamedTuple):
    """What one forward says of images: the answers, whether they are right, and the task's notes."""

    answer_n: Tensor
    right_n: Tensor
    notes: dict[str, Tensor]


class _Course:
    """What is known of a batch while one attack follows the other."""

    def __init__(self, clean_nCHW: Tensor, truth_n: Tensor, keys_n: Tensor, seen: Seen, spared_n: Tensor) -> None:
        self.clean_nCHW, self.truth_n, self.keys_n, self.right_n, self.spared_n = clean_nCHW, truth_n, keys_n, seen.right_n, spared_n
        self.shown_nCHW, self.answer_n, self.inside_n = clean_nCHW.clone(), seen.answer_n.clone(), torch.ones_like(seen.right_n)
        self.notes = {name: note.clone() for name, note in seen.notes.items()}
        self.rights: list[Tensor] = []
        self.agrees: list[Tensor] = []

    def see(self, rows_n: Tensor, images_nCHW: Tensor, seen: Seen) -> None:
        """These images were shown last, and this was said of them."""
        self.shown_nCHW[rows_n], self.answer_n[rows_n] = images_nCHW.to(self.shown_nCHW), seen.answer_n
        for name, note in seen.notes.items():
            self.notes[name][rows_n] = note

    def record(self, right_n: Tensor, agree_n: Tensor) -> None:
        """Who is still right after one more attack, and for whom the attack's own verdict was the fresh one."""
        self.right_n = right_n
        self.rights.append(right_n)
        self.agrees.append(agree_n)

    def columns(self) -> dict[str, Tensor]:
        """The columns of verdicts that attacks fill: ``right`` and ``agree`` are ``[n, A]``, the others are of the last image shown."""
        empty_n0 = self.right_n.new_zeros((len(self.right_n), 0))
        return {
            **self.notes, "answer": self.answer_n, "inside": self.inside_n,
            "right": torch.stack(self.rights, 1) if self.rights else empty_n0,
            "agree": torch.stack(self.agrees, 1) if self.agrees else empty_n0,
        }  # fmt: skip


def _array(column: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = column.cpu().numpy()
    return array
