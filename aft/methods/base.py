"""The one training step: targets -> attack -> views -> weighted terms. A method adds its terms, its objective, its text banks.

Shapes: B images, C channels, H height, W width, K classes, D embedding width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from aft.attacks import Adversarial, Attack, ClassificationObjective, Objective, sample_keys
from aft.attacks.guards import naming_out_of_memory
from aft.batch import Batch, ClassData
from aft.clip import ModelSpec, ZeroShotModel, load_model
from aft.clip.towers import frozen_to_eval, keep_statistics
from aft.clip.trainable import TrainableSpec, make_trainable
from aft.clip.weights import checkpoint_header
from aft.errors import ConfigError, DataError, RunError, WeightsError
from aft.methods.optim import OptimizerSpec
from aft.methods.targets import Targets
from aft.methods.terms import Term, all_needs, build_terms
from aft.methods.views import Views

IN_THE_BAR = ("train/loss", "train/adversarial_accuracy")
MOST_SKIPPED = 10
TEACHER_NEEDS = frozenset({"teacher_clean", "teacher_adversarial"})


class AdversarialFineTuning(L.LightningModule):
    """Adversarial fine-tuning of a CLIP's image tower, or of what ``trainable`` names in it; the text tower is frozen.

    ``min_theta E [ sum_t weight_t * term_t(targets, views(x + delta*)) ]`` with ``delta* = argmax_delta objective(x + delta)``.

    Args:
        clip: the model to start from.
        attack: the generator of adversarial images in training.
        optimizer: optimiser and schedule.
        terms: settings laid over the method's own terms; ``name: null`` takes a term out.
        val_attack: the attack of validation; none reports clean accuracy alone.
        logit_scale: factor on cosines in the loss and in the attack; none means the model's own.
        templates: prompts with one ``{}``; none means the data set's own.
        seed: of the attack's random starts (which depend on seed, epoch and sample alone), and of what ``trainable`` adds.
        trainable: what of the image tower learns: all of it, blocks, low-rank updates, or visual prompts.

    Raises:
        ConfigError: an unknown term or setting, or a term whose needs the data or the model cannot meet.
    """

    method: ClassVar[str] = "custom"
    default_terms: ClassVar[Mapping[str, Term]] = {}
    trains_text: ClassVar[bool] = False
    keeps_statistics: ClassVar[bool] = True

    def __init__(
        self,
        clip: ModelSpec = ModelSpec(),  # noqa: B008  (frozen)
        attack: Attack | None = None,
        optimizer: OptimizerSpec = OptimizerSpec(),  # noqa: B008  (frozen)
        terms: dict[str, dict[str, Any] | None] | None = None,
        val_attack: Attack | None = None,
        logit_scale: float | None = None,
        templates: list[str] | None = None,
        seed: int = 0,
        trainable: TrainableSpec = TrainableSpec(),  # noqa: B008  (frozen)
    ) -> None:
        super().__init__()
        self.spec = clip
        self.model = load_model(clip)
        self.attack = attack
        self.val_attack = val_attack
        self.optimizer_spec = optimizer
        self.terms = build_terms(self.default_terms, terms)
        self.term_modules = nn.ModuleDict(
            {name.replace(".", "_"): term for name, term in self.terms.items() if isinstance(term, nn.Module)}
        )
        self.logit_scale = logit_scale
        self.templates = templates
        self.seed = seed
        self.trainable_spec = trainable
        self.needs = all_needs(self.terms.values())
        self._teacher: tuple[ZeroShotModel, ...] = ()  # a tuple keeps it out of the optimiser, of DDP and of the checkpoint
        self.val_clean = nn.ModuleList()
        self.val_robust = nn.ModuleList()
        self.last_adversarial_BCHW: Tensor | None = None
        self.skipped_steps = 0
        self._choose_trainable()

    def _choose_trainable(self) -> None:
        make_trainable(self.model, self.trainable_spec, self.seed)
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
        """Checks class lists and needs, builds the teacher, and prepares a pair of metrics for each validation loader."""
        if "tokens" in self.needs:
            self.model.encode(torch.zeros(1, 3, self.model.record.resolution, self.model.record.resolution), tokens=True)
        coupled = [name for name, term in self.terms.items() if term.couples_batch]
        if coupled and self.trainer.accumulate_grad_batches > 1:
            raise ConfigError(f"{coupled[0]} is defined on the whole batch: accumulate_grad_batches must be 1; raise batch_size instead.")
        if self.needs & TEACHER_NEEDS and not self._teacher:
            self._teacher = (load_model(self.spec).requires_grad_(False),)
        self.val_clean = nn.ModuleList(MeanMetric() for _ in self.data.val_class_lists)
        self.val_robust = nn.ModuleList(MeanMetric() for _ in self.data.val_class_lists)

    def class_bank(self, class_list: str) -> Tensor:
        """The detached text bank of one of the data set's class lists, ``[K, D]``."""
        return self.model.text_bank(self.data.class_lists[class_list], self.templates or self.data.templates)

    @property
    def teacher(self) -> ZeroShotModel | None:
        """The frozen base model in eval mode; none where no term needs it."""
        return self._teacher[0].to(self.device) if self._teacher else None

    # --- the step ---------------------------------------------------------------------------------------------------------------

    def targets(self, batch: Batch) -> Targets:
        """What does not learn, for this batch."""
        self._check_labels(batch)
        return Targets(
            batch,
            student=self.model,
            text={"class": self.class_bank("train")},
            teacher=self.teacher,
            logit_scale=self.logit_scale,
            tokens="tokens" in self.needs,
        )

    def views(self, targets: Targets) -> Views:
        """What learns, still closed."""
        text: dict[str, Callable[[], Tensor]] = {bank: lambda bank=bank: targets.text[bank] for bank in targets.text}  # type: ignore[misc]
        return Views(self.model, text=text, logit_scale=self.logit_scale, tokens="tokens" in self.needs)

    def objective(self, targets: Targets) -> Objective:
        """What the attack maximises: cross-entropy of the training classes unless a method says otherwise."""
        return self._class_objective(targets.text["class"], targets.labels)

    def _class_objective(self, text_KD: Tensor, labels_B: Tensor) -> ClassificationObjective:
        def logits(images_BCHW: Tensor) -> Tensor:
            """Over the bank, ``[B, K]``."""
            return self.model.logits(self.model.encode(images_BCHW), text_KD, self.logit_scale)

        return ClassificationObjective(logits, labels_B, modules=(self.model,))

    def perturb(self, targets: Targets) -> Adversarial | None:
        """The adversarial images of this step; none where the method has no attack."""
        if self.attack is None:
            return None
        keys_B = sample_keys(self.seed, self.current_epoch, targets.index)
        return self.attack(self.objective(targets), targets.images, keys_B)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Targets, attack, views, and the weighted sum of the terms."""
        self._images_BCHW, self._index_B = batch.images, batch.index
        with naming_out_of_memory(f"a training step with {getattr(self.attack, 'steps', 0)} attack steps", batch.images):
            targets = self.targets(batch)
            views = self.views(targets)
            adversarial = self.perturb(targets)
            targets.adversarial_BCHW = None if adversarial is None else adversarial.x_BCHW
            views.open(targets.images, targets.adversarial_BCHW)
            losses = {name: term(targets, views) for name, term in self.terms.items()}
            total = torch.stack([self.terms[name].weight_at(self.global_step) * loss for name, loss in losses.items()]).sum()
        self._log_step(targets, views, adversarial, losses, total)
        return total

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The backward pass; a lack of memory is named here too."""
        with naming_out_of_memory(f"the backward pass after {getattr(self.attack, 'steps', 0)} attack steps", self._images_BCHW):
            super().backward(loss, *args, **kwargs)

    def _log_step(
        self, targets: Targets, views: Views, adversarial: Adversarial | None, losses: Mapping[str, Tensor], total: Tensor
    ) -> None:
        values = {"train/loss": total.detach(), **{f"train/{name}": loss.detach() for name, loss in losses.items()}}
        if adversarial is not None:
            values["attack/gain"] = adversarial.gain_B.mean()
        if targets.has_labels and "class" in targets.text and "adversarial" in vars(views):
            with torch.no_grad():
                predicted_B = self.model.logits(views.adversarial, targets.text["class"]).argmax(1)
            values["train/adversarial_accuracy" if adversarial is not None else "train/accuracy"] = (
                (predicted_B == targets.labels).float().mean()
            )
        for name, value in values.items():
            self.log(name, value, batch_size=len(targets.images), prog_bar=name in IN_THE_BAR)
        self.last_adversarial_BCHW = targets.adversarial_BCHW

    # --- validation: a part of the training set ---------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Counts images that are right, and images that are right and stay right under ``val_attack``."""
        text_KD = self.class_bank(self.data.val_class_lists[dataloader_idx])
        labels_B = self._check_labels(batch, len(text_KD))
        right_B = self.model(batch.images, text_KD).argmax(1) == labels_B
        self._metric(self.val_clean, dataloader_idx).update(right_B.float())
        if self.val_attack is None:
            return
        keys_B = sample_keys(self.seed, 0, batch.index)
        adversarial = self.val_attack(self._class_objective(text_KD, labels_B), batch.images, keys_B)
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
        if batch.labels.numel() and not (0 <= int(batch.labels.min()) and int(batch.labels.max()) < known):
            outside = [int(y) for y in batch.labels if not 0 <= int(y) < known]
            raise DataError(
                f"labels {outside[:5]} are outside the class list of {known} names: class list and data do not belong together."
            )
        return batch.labels

    # --- optimiser, modes, checkpoint -------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser and a schedule that counts optimiser steps."""
        optimizer = self.optimizer_spec.build(self.named_parameters())
        schedule = self.optimizer_spec.schedule_of(optimizer, lambda: float(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

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
        self.optimizer_spec.impose(optimizer, schedule, self.named_parameters())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the norm of the whole gradient, before any clipping; a gradient that is not finite moves nothing.

        Processes decide alike, since they have averaged their gradients. (fp16's gradient scaler skips by itself.)

        Raises:
            RunError: too many such steps in a row.
        """
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        self.log("train/gradient_norm", norm)
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return
        self.skipped_steps = 0 if torch.isfinite(norm) else self.skipped_steps + 1
        if self.skipped_steps:
            optimizer.zero_grad(set_to_none=True)
            samples = ", ".join(str(int(i)) for i in self._index_B[:8])
            what = f"the gradient of step {self.global_step + 1} is not finite (samples {samples} ...)"
            if self.skipped_steps >= MOST_SKIPPED:
                raise RunError(f"{what}, and {MOST_SKIPPED} steps in a row: lower lr, or look at these samples and at precision.")
            warnings.warn(f"{what}: the step is skipped.", stacklevel=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the model's record, so that the file alone rebuilds the model, and the classes that it learns."""
        eps = getattr(self.attack, "eps", None)
        header = checkpoint_header(self.model, self.method, None if eps is None else float(eps), self.trainable_spec.settings())
        checkpoint["aft"] = {**header, "classes": list(self.data.class_lists["train"])}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on training with other classes than the checkpoint's: labels would silently mean something else.

        Raises:
            WeightsError: the checkpoint belongs to another model, or something else learned in it.
            DataError: the class lists differ, in names or in order.
        """
        header = checkpoint.get("aft", {})
        if "model" in header:
            refuse_other_trainable(header["model"], self.trainable_spec.settings(), self.trainer.state.fn == "fit")
        if self.trainer.state.fn == "fit" and "model" in header:
            refuse_another_model(header["model"], checkpoint_header(self.model, self.method, None)["model"])
        stored = header.get("classes")
        if stored is None or self.trainer.state.fn != "fit" or tuple(stored) == tuple(self.data.class_lists["train"]):
            return
        here = self.data.class_lists["train"]
        raise DataError(
            f"the checkpoint was trained on {len(stored)} classes ({', '.join(stored[:4])} ...), the data has {len(here)} "
            f"({', '.join(here[:4])} ...): go on with the same classes in the same order, or start a new run from its weights "
            "with --model.init_args.clip.pretrained CHECKPOINT."
        )


def need_attack(attack: Attack | None, method: str) -> Attack:
    """The attack of a method that cannot do without one.

    Raises:
        ConfigError: none was given.
    """
    if attack is None:
        raise ConfigError(f"{method} trains on adversarial images: set model.init_args.attack, such as aft.attacks.PGD.")
    return attack


def refuse_other_trainable(stored: Mapping[str, Any], here: Mapping[str, Any], resumes: bool) -> None:
    """Raises WeightsError where something else learned in a checkpoint, and it is resumed or has other tensors for it."""
    before = stored.get("trainable") or {"name": "all"}
    added = {before["name"], here["name"]} & {"lora", "prompts"}
    if before != dict(here) and (resumes or added):
        raise WeightsError(
            f"the checkpoint has trainable = {before}, this run has {dict(here)}: go on with the same, or start a new run from its "
            "weights with --model.init_args.clip.pretrained CHECKPOINT."
        )


def refuse_another_model(stored: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises WeightsError where a checkpoint was trained from another model than this run's."""
    for key in ("config", "activation", "mean", "std", "base_sha256"):
        before, now = stored[key], here[key]
        if before != (list(now) if isinstance(before, list) else now):
            raise WeightsError(f"the checkpoint has {key} = {before}, this run has {now}: go on with the clip that it was trained from.")
