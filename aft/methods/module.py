"""A CLIP as a LightningModule: what learns in it, class texts, validation, optimiser, modes, checkpoint; no loss yet.

Shapes: B images, C channels, H height, W width, K classes, D embedding width.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from aft.attacks import Attack, ClassificationObjective, sample_keys
from aft.batch import Batch, ClassData
from aft.clip import ModelSpec, TrainableSpec, load_model
from aft.clip.text_transform import TextTransformSpec, make_transform
from aft.clip.towers import frozen_to_eval, keep_statistics
from aft.clip.trainable import make_trainable
from aft.clip.training_data import data_use
from aft.clip.weights import checkpoint_header
from aft.errors import ConfigError, DataError, RunError
from aft.methods.checkpoint import refuse_another_model, refuse_other_classes, refuse_other_trainable
from aft.methods.optim import OptimizerSpec

MOST_SKIPPED = 10


class ClipModule(L.LightningModule):
    """A CLIP whose image tower learns, or what ``trainable`` names in it; subclasses bring the training step.

    Args:
        clip: the model to start from.
        optimizer: optimiser and schedule.
        val_attack: the attack of validation; none reports clean accuracy alone.
        logit_scale: factor on cosines in the loss and in the attack; none means the model's own.
        templates: prompts with one ``{}``; none means the data set's own.
        seed: of the attack's random starts, and of what ``trainable`` and ``text_transform`` add.
        trainable: what of the image tower learns.
        text_transform: what class texts go through; none means the model's own.
    """

    method: ClassVar[str] = "custom"
    trains_text: ClassVar[bool] = False
    keeps_statistics: ClassVar[bool] = True

    def __init__(
        self,
        clip: ModelSpec,
        optimizer: OptimizerSpec,
        *,
        val_attack: Attack | None,
        logit_scale: float | None,
        templates: list[str] | None,
        seed: int,
        trainable: TrainableSpec,
        text_transform: TextTransformSpec | None,
    ) -> None:
        super().__init__()
        check_scale("logit_scale", logit_scale)
        self.spec = clip
        self.model = load_model(clip)
        self.val_attack = val_attack
        self.optimizer_spec = optimizer
        self.logit_scale = logit_scale
        self.templates = templates
        self.seed = seed
        self.trainable_spec = trainable
        self.val_clean = nn.ModuleList()
        self.val_robust = nn.ModuleList()
        self.skipped_steps = 0  # in a row
        self.skipped_in_all = 0
        self._parts: list[tuple[Tensor, Tensor]] = []  # samples and loss of each part of the optimiser step that is being made
        self._choose_trainable(text_transform)

    def _choose_trainable(self, text_transform: TextTransformSpec | None) -> None:
        make_trainable(self.model, self.trainable_spec, self.seed)
        if text_transform is not None and text_transform.name != self.model.text_transform.name:
            self.model.text_transform = make_transform(text_transform, self.model.width, self.seed)
        for parameter in self.model.text_transform.parameters():
            parameter.requires_grad_(text_transform is not None)
        for parameter in self.model.text_parameters:
            parameter.requires_grad_(self.trains_text)
        self.model.clip.get_parameter("logit_scale").requires_grad_(self.trains_text and self.logit_scale is None)

    # --- data: class lists and text banks -------------------------------------------------------------------------------------

    @property
    def data(self) -> ClassData:
        """The datamodule as a method sees it.

        Raises:
            DataError: the trainer has no datamodule with class lists.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, ClassData):
            raise DataError("this run has no class names: give a datamodule with class_lists, such as datamodules.ImageFolder.")
        return datamodule

    def setup(self, stage: str) -> None:
        """Fits the text transformation on the training classes, and prepares a pair of metrics for each validation loader.

        Raises:
            ConfigError: weights and pixels would be in 16 bits.
        """
        if (precision := str(self.trainer.precision)) in ("bf16-true", "16-true"):
            instead = precision.replace("true", "mixed")
            raise ConfigError(f"trainer.precision = {precision!r}: an attack moves pixels by parts of a grey level, which 16 bits lose; "
                              f"take {instead!r}, where pixels and weights stay in fp32.")  # fmt: skip
        if self.data.class_lists.get("train"):
            self.model.text_transform.fit(self.raw_class_bank("train"))
        self.val_clean = nn.ModuleList(MeanMetric() for _ in self.data.val_class_lists)
        self.val_robust = nn.ModuleList(MeanMetric() for _ in self.data.val_class_lists)

    def class_bank(self, class_list: str) -> Tensor:
        """The detached text bank of one of the data set's class lists, ``[K, D]``."""
        return self.model.text_bank(self.data.class_lists[class_list], self.templates or self.data.templates)

    def raw_class_bank(self, class_list: str) -> Tensor:
        """The same before any text transformation."""
        return self.model.raw_bank(self.data.class_lists[class_list], self.templates or self.data.templates)

    def _class_objective(self, text_KD: Tensor, labels_B: Tensor, logit_scale: float | None) -> ClassificationObjective:
        def logits(images_BCHW: Tensor) -> Tensor:
            """Over the bank, ``[B, K]``."""
            return self.model.logits(self.model.encode(images_BCHW), text_KD, logit_scale)

        return ClassificationObjective(logits, labels_B, modules=(self.model,))

    # --- validation: a part of the training set ---------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Counts images that are right, and images that are right and stay right under ``val_attack``.

        The attack sees the model as it will be used and measured, at its own logit scale, whatever that of the training loss.
        """
        text_KD = self.class_bank(self.data.val_class_lists[dataloader_idx])
        labels_B = self._check_labels(batch, len(text_KD))
        right_B = self.model(batch.images, text_KD).argmax(1) == labels_B
        self._metric(self.val_clean, dataloader_idx).update(right_B.float())
        if self.val_attack is None:
            return
        keys_B = sample_keys(self.seed, 0, batch.index)
        adversarial = self.val_attack(self._class_objective(text_KD, labels_B, None), batch.images, keys_B)
        with torch.no_grad():
            robust_B = right_B & (self.model(adversarial.x_BCHW, text_KD).argmax(1) == labels_B)
        self._metric(self.val_robust, dataloader_idx).update(robust_B.float())

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/clean_accuracy`` and ``val/robust_accuracy``, over all ranks, each sample once."""
        for place, name in enumerate(self.data.val_class_lists):
            suffix = f"/{name}" if place else ""
            self.log(f"val/clean_accuracy{suffix}", self._metric(self.val_clean, place).compute(), prog_bar=place == 0)
            if self.val_attack is not None:
                self.log(f"val/robust_accuracy{suffix}", self._metric(self.val_robust, place).compute(), prog_bar=place == 0)
            self._metric(self.val_clean, place).reset()
            self._metric(self.val_robust, place).reset()

    @staticmethod
    def _metric(metrics: nn.ModuleList, place: int) -> MeanMetric:
        metric = metrics[place]
        assert isinstance(metric, MeanMetric)
        return metric

    def _check_labels(self, batch: Batch, classes: int | None = None) -> Tensor:
        if batch.labels is None:
            raise DataError("this batch has no labels: the method learns from classes; use labelled data.")
        known = len(self.data.class_lists["train"]) if classes is None else classes
        low, high = torch.stack(batch.labels.aminmax()).tolist() if batch.labels.numel() else (0, 0)  # the device is asked once
        if not (0 <= low and high < known):
            outside = [int(y) for y in batch.labels if not 0 <= int(y) < known]
            raise DataError(
                f"labels {outside[:5]} are outside the class list of {known} names: class list and data do not belong together."
            )
        return batch.labels

    # --- optimiser, modes, checkpoint -------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser and a schedule that counts optimiser steps."""
        spec = self.optimizer_at_this_scale()
        optimizer = spec.build(self.optimised())
        schedule = spec.schedule_of(optimizer, lambda: float(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_at_this_scale(self) -> OptimizerSpec:
        """With the learning rate for the images that a step of this run has.

        Raises:
            ConfigError: ``lr_for`` is given, and the data does not say how many images a batch has.
        """
        if self.optimizer_spec.lr_for is None:
            return self.optimizer_spec
        batch_size = getattr(self.data, "batch_size", None)
        if batch_size is None:
            raise ConfigError(f"lr_for = {self.optimizer_spec.lr_for}, but {type(self.data).__name__} has no batch_size: leave it out.")
        return self.optimizer_spec.at(batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches)

    def optimised(self) -> list[tuple[str, nn.Parameter]]:
        """What the optimiser moves: everything that learns."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def on_fit_start(self) -> None:
        """Puts what learns into training mode and what is frozen into eval mode; Lightning keeps modes as it finds them.

        BatchNorm keeps the statistics that the model came with: see :func:`aft.clip.towers.keep_statistics`.
        """
        self.train()
        frozen_to_eval(self.model.visual)
        if self.keeps_statistics:
            keep_statistics(self.model.visual)
        if not self.trains_text:
            for name, module in self.model.clip.named_children():
                if name != "visual":
                    module.eval()

    def on_train_start(self) -> None:
        """After a resume the settings of this start hold, not those that came with the optimiser's state from the checkpoint."""
        self.optimizer_spec.check_length(float(self.trainer.estimated_stepping_batches))
        optimizer, schedule = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(schedule, LambdaLR)
        self.optimizer_at_this_scale().impose(optimizer, schedule, self.optimised())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the learning rate and the norm of the whole gradient, before any clipping; a gradient that is not finite moves nothing.

        Processes decide alike, since they have averaged their gradients; each names its own samples. (fp16's gradient scaler skips by
        itself.) Once a step was skipped, the number of those of this start is logged as ``train/skipped_steps``.

        Raises:
            RunError: too many such steps in a row.
        """
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        self.log("train/gradient_norm", norm)
        self.log("optimizer/learning_rate", optimizer.param_groups[0]["lr"])
        parts, self._parts = self._parts, []
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return
        self.skipped_steps = 0 if torch.isfinite(norm) else self.skipped_steps + 1
        self.skipped_in_all += self.skipped_steps > 0
        if self.skipped_in_all:
            self.log("train/skipped_steps", float(self.skipped_in_all))
        if self.skipped_steps:
            self.zero_grad(set_to_none=True)
            what = f"the gradient of step {self.global_step + 1} is not finite ({suspects(parts)})"
            if self.skipped_steps >= MOST_SKIPPED:
                raise RunError(f"{what}, and {MOST_SKIPPED} steps in a row: lower lr, or look at these samples and at precision.")
            warnings.warn(f"{what}: the step is skipped.", stacklevel=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the model's record, so that the file alone rebuilds the model, what it is trained on, and the classes that it learns."""
        settings = self.trainable_spec.settings()
        header = checkpoint_header(self.model, self.recipe, self.eps_trained, settings, data_use(self.data))
        checkpoint["aft"] = {**header, "classes": list(self.data.class_lists["train"])}

    @property
    def recipe(self) -> str:
        """The name of what trains, for checkpoints and cards."""
        return self.method

    @property
    def eps_trained(self) -> float | None:
        """The radius that the model is trained with, in pixel units."""
        return None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on from a checkpoint of another run.

        Raises:
            WeightsError: it belongs to another model, or something else learned in it.
            DataError: the class lists differ, in names or in order.
        """
        header = checkpoint.get("aft", {})
        resumes = self.trainer.state.fn == "fit"
        if "model" in header:
            refuse_other_trainable(header["model"], self.trainable_spec.settings(), resumes)
        if not resumes:
            return
        if "model" in header:
            refuse_another_model(header["model"], checkpoint_header(self.model, self.method, None)["model"])
        if "classes" in header:
            refuse_other_classes(header["classes"], self.data.class_lists["train"])


def check_scale(name: str, scale: float | None) -> None:
    """Raises ConfigError for a factor on cosines, or a temperature, that is not above zero and finite."""
    if scale is not None and not 0 < scale < float("inf"):
        raise ConfigError(f"{name} = {scale} is not above 0 and finite: a factor on cosines, or a temperature, is positive.")


def suspects(parts: Sequence[tuple[Tensor, Tensor]]) -> str:
    """Which samples of a step to look at, in words.

    Args:
        parts: samples and loss of each part of the step on this process.
    """
    bad = [index for index_B, loss in parts if not bool(torch.isfinite(loss)) for index in index_B.tolist()]
    every = [index for index_B, _ in parts for index in index_B.tolist()]
    samples = f"samples {', '.join(map(str, (bad or every)[:8]))}{' ...' * (len(bad or every) > 8)}"
    return f"from {samples}" if bad else f"the loss of this process is finite; another's is not, or the backward pass of {samples}"
