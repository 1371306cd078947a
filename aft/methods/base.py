"""The one training step: targets -> attack -> views -> weighted terms. A method adds its terms, its objective, its text banks.

Shapes: B images, C channels, H height, W width, K classes, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aft.attacks import Adversarial, Attack, Objective, sample_keys
from aft.attacks.guards import naming_out_of_memory
from aft.batch import Batch
from aft.clip import Encoding, ModelSpec, TrainableSpec, ZeroShotModel, load_model
from aft.clip.reduced import reduced
from aft.clip.text_transform import TextTransformSpec
from aft.clip.towers import check_tokens
from aft.errors import ConfigError
from aft.methods.captions import Captions
from aft.methods.checkpoint import refuse_another_teacher
from aft.methods.module import ClipModule
from aft.methods.objectives import EncodingObjective
from aft.methods.optim import OptimizerSpec
from aft.methods.perturbations import PerturbationStore, WarmStart
from aft.methods.phases import PLAIN, Phase, attack_in, check_order, check_sight, kept_patches, phase_at
from aft.methods.targets import Targets, TextBanks
from aft.methods.teacher_cache import TeacherCache, check_cache
from aft.methods.terms import Term, all_needs, build_terms
from aft.methods.views import Views

IN_THE_BAR = ("train/loss", "train/adversarial_accuracy")
TEACHER_NEEDS = frozenset({"teacher_clean", "teacher_adversarial"})
MADE_TEXTS = {"captions": "AdvFLYP or ContrastivePretraining", "descriptions": "SAFT"}
NEGATION_TEMPLATES = ("This is not a photo of a {}",)


class AdversarialFineTuning(ClipModule):
    """Adversarial fine-tuning of a CLIP's image tower, or of what ``trainable`` names in it; the text tower is frozen.

    ``min_theta E [ sum_t weight_t * term_t(targets, views(x + delta*)) ]`` with ``delta* = argmax_delta objective(x + delta)``.

    Args:
        clip: the model to start from.
        attack: the generator of adversarial images in training.
        optimizer: optimiser and schedule.
        terms: settings laid over the method's own terms; ``name: null`` takes a term out.
        val_attack: the attack of validation; none reports clean accuracy alone.
        logit_scale: factor on cosines in the loss and in its attack; none means the model's own, at which it is validated and used.
        templates: prompts with one ``{}``; none means the data set's own.
        seed: of the attack's random starts (which depend on seed, epoch and sample alone), and of what ``trainable`` adds.
        trainable: what of the image tower learns: all of it, blocks, low-rank updates, or visual prompts.
        text_transform: what class texts go through, in training and wherever the model is used later; none means the method's own
            (LAAT expands, TIMA tunes), and where it has none, the model's.
        teacher: the frozen model that terms compare with; none means the one that the run starts from.
        phases: what is cheaper for a while: a weaker attack, fewer patches, fewer pixels, each up to a share of the run's steps.
        warm_start: where attacks begin, and free adversarial training; none: each begins anew.
        cache_teacher: keep what the teacher says of a clean image instead of asking each time; for data that augment nothing.

    Raises:
        ConfigError: an unknown term or setting, a term whose needs the data or the model cannot meet, phases that do not fit, or a warm
            start without an attack.
    """

    default_terms: ClassVar[Mapping[str, Term]] = {}
    objective_needs: ClassVar[frozenset[str]] = frozenset()
    #: Texts that a method makes and others do not: captions, descriptions.
    makes: ClassVar[frozenset[str]] = frozenset()
    #: No default of the constructor's argument: the command line's parser would pass none in its place.
    default_text_transform: ClassVar[TextTransformSpec | None] = None

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
        text_transform: TextTransformSpec | None = None,
        teacher: ModelSpec | None = None,
        phases: list[Phase] | None = None,
        warm_start: WarmStart | None = None,
        cache_teacher: bool = False,
    ) -> None:
        super().__init__(
            clip, optimizer, val_attack=val_attack, logit_scale=logit_scale, templates=templates, seed=seed, trainable=trainable,
            text_transform=text_transform or self.default_text_transform,
        )  # fmt: skip
        self.attack = attack
        self.terms = build_terms(self.default_terms, terms)
        self.term_modules = nn.ModuleDict(
            {name.replace(".", "_"): term for name, term in self.terms.items() if isinstance(term, nn.Module)}
        )
        for term in self.terms.values():
            term.prepare(self.model.width, seed)
        self.needs = all_needs(self.terms.values()) | self.objective_needs
        self.teacher_spec = teacher
        self._teacher: tuple[ZeroShotModel, ...] = ()  # a tuple keeps it out of the optimiser, of DDP and of the checkpoint
        self.teacher_cache = TeacherCache() if cache_teacher else None
        self.last_adversarial_BCHW: Tensor | None = None
        self.phases = phases or []
        check_order(self.phases)
        self._attacks = {phase.until: attack_in(phase, attack) for phase in self.phases if phase.attack}
        if warm_start and attack is None:
            raise ConfigError("warm_start is set, and there is no attack: set model.init_args.attack, or take warm_start out.")
        self.perturbations = PerturbationStore(warm_start) if warm_start else None

    def setup(self, stage: str) -> None:
        """Checks needs and builds the teacher.

        Raises:
            ConfigError: tokens are asked of a tower that has none, captions or descriptions of a method that makes none, gradients
                accumulate over a loss that couples samples, or the teacher's encodings of images that change are to be kept.
        """
        super().setup(stage)
        self._refuse_accumulation()
        for name, term in self.terms.items():
            for text in sorted((term.needs & MADE_TEXTS.keys()) - self.makes):
                raise ConfigError(f"terms.{name} needs {text}, and {type(self).__name__} makes none: use {MADE_TEXTS[text]}, or take the "
                                  f"term out, {{{name}: null}}.")  # fmt: skip
            if "tokens" in term.needs:
                check_tokens(self.model.visual, f"terms.{name} needs patch tokens: ")
        check_sight(self.phases, self.model.visual, "tokens" in self.needs)
        if self.needs & TEACHER_NEEDS and not self._teacher:
            self._teacher = (self._load_teacher(),)
            if "tokens" in self.needs:
                check_tokens(self._teacher[0].visual, f"teacher = {self._teacher[0].record.name} is asked for patch tokens: ")
        if self.teacher_cache is not None:
            check_cache(getattr(self.data, "augment", None), self.needs)

    def _refuse_accumulation(self) -> None:
        """Raises ConfigError where gradients accumulate over parts of a batch that a term couples."""
        coupled, parts = [name for name, term in self.terms.items() if term.couples_batch], self.trainer.accumulate_grad_batches
        if coupled and parts > 1:
            raise ConfigError(f"accumulate_grad_batches = {parts}, but terms.{coupled[0]} is defined on the whole batch: set "
                              "accumulate_grad_batches to 1, and raise batch_size instead.")  # fmt: skip

    def on_train_epoch_start(self) -> None:
        """A callback may have changed how many parts a step has."""
        self._refuse_accumulation()

    def on_train_start(self) -> None:
        """Phases need a run with an end.

        Raises:
            ConfigError: it has none.
        """
        super().on_train_start()
        if self.phases and math.isinf(self.trainer.estimated_stepping_batches):
            raise ConfigError("phases end at shares of the run: set trainer.max_steps, or trainer.max_epochs with data of known length.")

    def _load_teacher(self) -> ZeroShotModel:
        teacher = load_model(self.teacher_spec or self.spec).requires_grad_(False)
        if teacher.width != self.model.width:
            raise ConfigError(
                f"teacher = {teacher.record.name} has embeddings of width {teacher.width}, {self.model.record.name} of {self.model.width}: "
                "embeddings are compared, so take a teacher of the same width."
            )
        return teacher

    def text_banks(self) -> dict[str, Callable[[], Tensor]]:
        """What terms may ask for, by name: ``class``, ``original`` (before any text transformation), ``negation`` (Comp-TGA)."""
        return {
            "class": lambda: self.class_bank("train"),
            "original": lambda: self.raw_class_bank("train"),
            "negation": lambda: self.model.text_bank(self.data.class_lists["train"], NEGATION_TEMPLATES),
        }

    def live_banks(self, targets: Targets) -> dict[str, Callable[[], Tensor]]:
        """Banks through which the text side learns; none where it is frozen."""
        if not any(parameter.requires_grad for parameter in self.model.text_transform.parameters()):
            return {}
        return {"class": lambda: self.model.text_transform(targets.text["original"])}

    @property
    def teacher(self) -> ZeroShotModel | None:
        """The frozen model, in eval mode, where the student is and in its precision; none where no term needs it."""
        weight = self.model.clip.get_parameter("logit_scale")
        return self._teacher[0].to(weight.device, weight.dtype) if self._teacher else None

    def starting_model(self) -> ZeroShotModel:
        """The model that the run starts from, loaded again; the model itself where its first weights were random."""
        if self.spec.pretrained == "random":
            return self.model
        weight = self.model.clip.get_parameter("logit_scale")
        return load_model(self.spec).to(weight.device, weight.dtype)

    # --- the step ---------------------------------------------------------------------------------------------------------------

    def targets(self, batch: Batch) -> Targets:
        """What does not learn, for this batch."""
        if batch.labels is not None or "labels" in self.needs:
            self._check_labels(batch)
        captions = self.captions(batch)
        banks = self.text_banks()
        if captions is not None:
            banks["captions"] = lambda: captions.embed(self.model)
        return Targets(
            batch,
            student=self.model,
            text=TextBanks(banks),
            captions=captions,
            teacher=self.teacher,
            logit_scale=self.logit_scale,
            tokens="tokens" in self.needs,
            samples_per_step=len(batch.images) * self.trainer.world_size * self.trainer.accumulate_grad_batches,
            teacher_cache=self.teacher_cache,
        )

    def captions(self, batch: Batch) -> Captions | None:
        """The captions of this step; none unless a method learns from captions."""
        return None

    def views(self, targets: Targets) -> Views:
        """What learns, still closed."""
        live = self.live_banks(targets)
        return Views(self.model, text=live, fixed=targets.text, logit_scale=self.logit_scale, tokens="tokens" in self.needs)

    def objective(self, targets: Targets) -> Objective:
        """What the attack maximises: cross-entropy of the training classes unless a method says otherwise."""
        return self._class_objective(targets.text["class"], targets.labels, self.logit_scale)

    def encoding_objective(self, loss: Callable[[Encoding, Tensor], Tensor]) -> EncodingObjective:
        """An objective on the student's encoding: ``loss(encoding, rows)``, one value a sample."""
        return EncodingObjective(self.model, loss)

    @property
    def phase(self) -> Phase:
        """What differs from the settings in this step."""
        return phase_at(self.phases, self.global_step, self.trainer.estimated_stepping_batches) if self.phases else PLAIN

    def perturb(self, targets: Targets) -> Adversarial | None:
        """The adversarial images of this step; none where the method, or the phase, has no attack."""
        phase = self.phase
        attack = self._attacks[phase.until] if phase.attack else None if phase.clean else self.attack
        if attack is None:
            return None
        keys_B = sample_keys(self.seed, self.current_epoch, targets.index)
        if self.perturbations is not None:
            return self.perturbations.attack(attack, lambda: self.objective(targets), targets.images, targets.index, keys_B)
        return attack(self.objective(targets), targets.images, keys_B)

    def seeing_less(self, phase: Phase) -> AbstractContextManager[None]:
        """What of the image the student's tower sees in this step, in the attack as in the training forward; a teacher sees all."""
        if not phase.sees_less:
            return nullcontext()
        kept_M = kept_patches(phase, self.model.visual, self.seed, self.global_step)
        return reduced(self.model.visual, phase.resolution, kept_M)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Targets, attack, views, and the weighted sum of the terms."""
        self._images_BCHW = batch.images
        doing = f"a training step with {getattr(self.attack, 'steps', 0)} attack steps"
        with naming_out_of_memory(doing, batch.images), self.seeing_less(self.phase):
            targets = self.targets(batch)
            views = self.views(targets)
            adversarial = self.perturb(targets)
            targets.adversarial_BCHW = targets.images if adversarial is None else adversarial.x_BCHW
            views.open(targets.images, None if adversarial is None else adversarial.x_BCHW)
            losses = {name: term(targets, views) for name, term in self.terms.items()}
            refuse_constants(losses)
            total = torch.stack([self.terms[name].weight_at(self.global_step) * loss for name, loss in losses.items()]).sum()
        self._log_step(targets, views, adversarial, losses, total)
        self._parts.append((batch.index, total.detach()))
        return total

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The backward pass; a lack of memory is named here too."""
        with naming_out_of_memory(f"the backward pass after {getattr(self.attack, 'steps', 0)} attack steps", self._images_BCHW):
            super().backward(loss, *args, **kwargs)

    def _log_step(
        self, targets: Targets, views: Views, adversarial: Adversarial | None, losses: Mapping[str, Tensor], total: Tensor
    ) -> None:
        values = {"train/loss": total.detach(), **{f"train/{name}": loss.detach() for name, loss in losses.items()}}
        for name, term in self.terms.items():
            values.update({f"train/{name}/{key}": figure.detach() for key, figure in term.figures.items()})
        if adversarial is not None:
            values["attack/gain"] = adversarial.gain_B.mean()
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        read = every > 0 and (self.global_step + 1) % every == 0  # where texts learn, the bank of this step costs a pass of the text tower
        if targets.has_labels and "adversarial" in vars(views) and (read or not self.trains_text):
            with torch.no_grad():
                predicted_B = self.model.logits(views.adversarial, targets.text["class"]).argmax(1)
            values["train/adversarial_accuracy" if adversarial is not None else "train/accuracy"] = (
                (predicted_B == targets.labels).float().mean()
            )
        for name, value in values.items():
            self.log(name, value, batch_size=len(targets.images), prog_bar=name in IN_THE_BAR)
        self.last_adversarial_BCHW = None if adversarial is None else adversarial.x_BCHW.detach()

    def on_after_backward(self) -> None:
        """Free adversarial training: the gradient that is there moves the perturbations, too.

        Raises:
            ConfigError: the text transformation learns, and no term reads class texts or captions as they are now.
        """
        transform = self.model.text_transform
        if any(parameter.requires_grad and parameter.grad is None for parameter in transform.parameters()):
            raise ConfigError(
                f"text_transform = {transform.name} is to learn, and no term of this run reads tuned texts ({', '.join(self.terms)}): "
                "add one that does, such as alignment, or set text_transform to identity."
            )
        if self.perturbations is not None:
            self.perturbations.after_backward()

    def optimised(self) -> list[tuple[str, nn.Parameter]]:
        """Everything that learns, but for terms that step by themselves."""
        own = {id(p) for p in self._stepping_themselves()}
        return [(name, p) for name, p in super().optimised() if id(p) not in own]

    def _stepping_themselves(self) -> list[nn.Parameter]:
        return [p for term in self.terms.values() if term.steps_itself and isinstance(term, nn.Module) for p in term.parameters()]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """fp16's gradient scaler takes its factor from the optimiser's parameters alone; here it goes from all others, too."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            gradients = [p.grad for p in self._stepping_themselves() if p.grad is not None]
            for gradient in gradients:
                gradient.div_(scaler.get_scale())
            if not all(bool(gradient.isfinite().all()) for gradient in gradients):
                for parameter in self._stepping_themselves():
                    parameter.grad = None
        super().on_before_optimizer_step(optimizer)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimiser's step, then that of terms that step by themselves: before any callback saves this step's checkpoint."""
        super().optimizer_step(*args, **kwargs)
        for term in self.terms.values():
            term.after_step(self.global_step + 1)

    @property
    def eps_trained(self) -> float | None:
        """The radius of the attack that the run ends with, which a phase up to its end may change; none without one."""
        last = self.phases[-1] if self.phases and self.phases[-1].until == 1 else PLAIN
        eps = getattr(attack_in(last, self.attack), "eps", None)
        return None if eps is None else float(eps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds which teacher there was, and the perturbations that attacks go on from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["aft"]["teacher_sha256"] = self._teacher_hash()
        if self.perturbations is not None:
            checkpoint["perturbations"] = self.perturbations.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on from a checkpoint of another run, or with another teacher.

        Raises:
            WeightsError: it belongs to another model or teacher, or something else learned in it.
            DataError: the class lists differ, in names or in order.
        """
        super().on_load_checkpoint(checkpoint)
        if self.trainer.state.fn == "fit":
            refuse_another_teacher(checkpoint.get("aft", {}).get("teacher_sha256"), self._teacher_hash())
            if self.perturbations is not None and "perturbations" in checkpoint:
                self.perturbations.load(checkpoint["perturbations"])

    def _teacher_hash(self) -> str | None:
        return self._teacher[0].record.sha256 if self._teacher else None


def refuse_constants(losses: Mapping[str, Tensor]) -> None:
    """Raises ConfigError for a term that depends on nothing that learns."""
    constant = [name for name, loss in losses.items() if not loss.requires_grad]
    if constant:
        raise ConfigError(
            f"terms.{constant[0]} depends on nothing that learns: what it reads is frozen, such as class texts. Let those learn, "
            f"text_transform: {{name: residual}}, or take the term out, {{{constant[0]}: null}}."
        )


def need_attack(attack: Attack | None, method: str) -> Attack:
    """The attack of a method that cannot do without one.

    Raises:
        ConfigError: none was given.
    """
    if attack is None:
        raise ConfigError(f"{method} trains on adversarial images: set model.init_args.attack, such as aft.attacks.PGD.")
    return attack
