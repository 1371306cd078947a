"""A training step against the least that it can cost, and against loops in the shape of published ones.

Shapes: B images, C channels, H rows, W columns, K classes, D embedding width.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from aft.attacks import PGD
from aft.batch import Batch
from aft.clip import ModelSpec, ZeroShotModel
from aft.methods import FARE, AdversarialFineTuning, OptimizerSpec, TeCoA
from bench.published import ExtraPass, TextEachStep
from bench.speed.row import Effort, Found, ratios
from bench.speed.setting import WARM, MadeUp, beside, trainer
from callbacks import Throughput

EPS, STEP_SIZE = 2 / 255, 1 / 255
LOG_EVERY = 10  # steps, as configs/base.yaml has it
ADAMW = OptimizerSpec(name="adamw", lr=1e-5, schedule="constant")
SGD = OptimizerSpec(name="sgd", lr=1e-4, weight_decay=0.0, schedule="constant")


def attack_of(steps: int) -> PGD:
    """The training attack of all rows."""
    return PGD(eps=EPS, step_size=STEP_SIZE, steps=steps)


class Bare:
    """The least that a TeCoA step can cost: k times forward and gradient of the input, once forward and backward to the weights.

    Nothing but the tower, its normalisation and the cross-entropy; no attack's step, no record. AdamW's step on the tower is apart.

    Args:
        model: its image tower is copied twice, once frozen and once to be trained.
        steps: k.
        classes: K, of a bank of random texts.
    """

    def __init__(self, model: ZeroShotModel, steps: int, classes: int, device: torch.device) -> None:
        self.steps = steps
        self.frozen = copy.deepcopy(model).to(device).requires_grad_(False).eval()
        self.learning = copy.deepcopy(model).to(device).train()
        self.learning.visual.requires_grad_(True)
        self.text_KD = F.normalize(torch.randn(classes, model.width, device=device), dim=-1)
        self.optimizer = ADAMW.build(self.learning.visual.named_parameters())

    def loss(self, model: ZeroShotModel, images_BCHW: Tensor, labels_B: Tensor | None) -> Tensor:
        """Summed cross-entropy."""
        assert labels_B is not None
        embedding_BD = F.normalize(model.visual(model.pixels(images_BCHW)).float(), dim=-1)
        return F.cross_entropy(100 * embedding_BD @ self.text_KD.T, labels_B, reduction="sum")

    def step(self, batch: Batch) -> None:
        """All of it on one batch; the gradient is left for :meth:`descend`."""
        for _ in range(self.steps):
            leaf_BCHW = batch.images.detach().requires_grad_(True)
            torch.autograd.grad(self.loss(self.frozen, leaf_BCHW, batch.labels), leaf_BCHW)
        self.loss(self.learning, batch.images, batch.labels).backward()

    def descend(self, batch: Batch) -> None:
        """The optimiser's step with that gradient, which is let go."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@cache
def against_bound(effort: Effort, clip: ModelSpec, batch_size: int, steps: int, repeats: int) -> tuple[Found, Found]:
    """TeCoA's step over its bound: up to the end of its backward pass, and whole, over the bound with AdamW's step.

    Whole is with clipping, Lightning's trainer, ``Throughput`` and a TensorBoard log of every tenth step, as runs have them.
    """
    method = TeCoA(clip, attack=attack_of(steps), optimizer=ADAMW)
    data = MadeUp(batch_size, method.model.record.resolution)
    bare = Bare(method.model, steps, 10, effort.on)
    with tempfile.TemporaryDirectory() as folder:
        watch = beside(method, data, {"bound": bare.step, "bound_optimizer": bare.descend}, effort, repeats, [Throughput()],
                       logger=TensorBoardLogger(folder), log_every_n_steps=LOG_EVERY)  # fmt: skip
    told = {"model": clip.name, "batch_size": batch_size, "attack_steps": steps}
    whole = {**told, "optimizer": "adamw", "logger": "TensorBoard", "log_every_n_steps": LOG_EVERY}
    return watch.found("arithmetic", "bound", told), watch.found("step", ("bound", "bound_optimizer"), whole)


def bound(clip: ModelSpec, batch_size: int, steps: int, repeats: int, whole: bool = False) -> Callable[[Effort], Found]:
    """The row of one model; with ``whole`` optimiser, clipping, logging and Lightning are in the step, AdamW's step in the bound."""
    return lambda effort: against_bound(effort, clip, batch_size, steps, repeats)[whole]


def theirs_over_ours(
    method: AdversarialFineTuning, data: MadeUp, theirs: Callable[[Batch], object], effort: Effort, repeats: int, told: dict[str, Any],
    **settings: Any,
) -> Found:  # fmt: skip
    """Seconds of another loop's whole step over those of ours, both with their optimiser."""
    return beside(method, data, {"theirs": theirs}, effort, repeats, **settings).found("theirs", "step", told)


def text_each_step(clip: Callable[[], ModelSpec], classes: int, batch_size: int, steps: int, repeats: int) -> Callable[[Effort], Found]:
    """The row against the TeCoA lineage (:class:`bench.published.TextEachStep`)."""

    def measure(effort: Effort) -> Found:
        """Both sides by SGD, no clipping, as released."""
        method = TeCoA(clip(), attack=attack_of(steps), optimizer=SGD)
        data = MadeUp(batch_size, method.model.record.resolution, classes)
        prompts = [data.templates[0].format(name) for name in data.class_lists["train"]]
        loop = TextEachStep(method.model.to(effort.on), prompts, EPS, STEP_SIZE, steps)
        told = {"model": method.spec.name, "batch_size": batch_size, "attack_steps": steps, "classes": classes}
        return theirs_over_ours(method, data, loop.step, effort, repeats, told, gradient_clip_val=None)

    return measure


class ColdOrKept(L.Callback):
    """Seconds of steps that ask the teacher for every image (``cold``) and of steps that asked before (``kept``), each first in turn."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {"cold": [], "kept": []}
        self.kind = "cold"

    def clock(self) -> float:
        """Seconds, once the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Cold, kept, kept, cold, and again."""
        assert isinstance(pl_module, AdversarialFineTuning) and pl_module.teacher_cache is not None
        self.kind = "cold" if batch_idx % 4 in (0, 3) else "kept"
        if self.kind == "cold":
            pl_module.teacher_cache.kept.clear()
        self.began = self.clock()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """The weights have moved."""
        self.seconds[self.kind].append(self.clock() - self.began)


def cache_teacher(clip: Callable[[], ModelSpec], batch_size: int, steps: int, repeats: int) -> Callable[[Effort], Found]:
    """FARE's step with a cache of the teacher's encodings that is empty, over one in which every image is."""

    def measure(effort: Effort) -> Found:
        """Two steps a repeat."""
        method = FARE(clip(), attack=attack_of(steps), optimizer=ADAMW, cache_teacher=True)
        watch = ColdOrKept(effort.on)
        data = MadeUp(batch_size, method.model.record.resolution)
        trainer(effort, 2 * (effort.repeats(repeats) + WARM), [watch]).fit(method, datamodule=data)
        seconds = {kind: values[WARM:] for kind, values in watch.seconds.items()}
        told = {"model": method.spec.name, "batch_size": batch_size, "attack_steps": steps}
        return Found(ratios(seconds["cold"], seconds["kept"]), seconds, told)

    return measure


def extra_pass(clip: ModelSpec, batch_size: int, steps: int, repeats: int) -> Callable[[Effort], Found]:
    """The row against the FARE lineage (:class:`bench.published.ExtraPass`); ours in bf16 on a GPU, where that is our setting."""

    def measure(effort: Effort) -> Found:
        """Both sides by AdamW, no clipping."""
        method = FARE(clip, attack=attack_of(steps), optimizer=ADAMW)
        data = MadeUp(batch_size, method.model.record.resolution)
        loop = ExtraPass(method.model.to(effort.on), EPS, STEP_SIZE, steps)
        precision = "bf16-mixed" if effort.device == "cuda" else "32-true"
        told = {"model": clip.name, "batch_size": batch_size, "attack_steps": steps, "our_precision": precision}
        return theirs_over_ours(method, data, loop.step, effort, repeats, told, gradient_clip_val=None, precision=precision)

    return measure
