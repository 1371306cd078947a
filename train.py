"""Trains and validates: ``python train.py fit -c configs/quickstart.yaml``, ``python train.py validate -c ... --ckpt_path ...``.

Every option of every class is an option here; ``configs/base.yaml`` holds the defaults, later ``-c`` files lie over it, and the
command line wins over all of them and over what a checkpoint says.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from aft.attacks import Attack
from aft.batch import SuiteData
from aft.clip import ModelSpec, TrainableSpec
from aft.clip.matmul import use_onednn
from aft.errors import AftError, ConfigError, RunError
from aft.methods import AdversarialFineTuning, OptimizerSpec, Phase, WarmStart
from aft.methods.distributed import leave_process_group
from aft.settings import dropped_settings, explain, flat, new_differences, underlying
from callbacks import AtomicCheckpointIO, RunLock, TerminalProgress
from callbacks.checkpoint_io import newest_whole, sweep

HERE = Path(__file__).resolve().parent
BASE = HERE / "configs" / "base.yaml"
# Every trainable parameter is used in every step; buffers need no broadcast, which would hang uneven validation; no endless waits.
DDP = {"find_unused_parameters": False, "broadcast_buffers": False, "timeout": "0:10:00"}
HIDDEN = (  # Lightning's tips, and warnings of what is meant so here
    "`isinstance.treespec, LeafSpec.` is deprecated",
    ".*does not have many workers",
    ".*no last checkpoint available",
    ".*in eval mode at the start",
    "Total length of `list` across ranks is zero",  # no held-out images
    "`broadcast_buffers` is deprecated",
    "Checkpoint directory .* exists and is not empty",  # a run that goes on
)


class Parser(LightningArgumentParser):
    """Says near matches where a name is not known; null stays null."""

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **settings: Any) -> Any:  # type: ignore[override]
        """As ever, but jsonargparse hands a null on to the settings of a class as the text ``None``: it is null again here."""
        words = None if args is None else [re.sub(r"\A(--[\w.]+=)None\Z", r"\1null", word) for word in args]
        return super().parse_args(words, *more, **settings)

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Raises instead of printing a usage page."""
        known = (AdversarialFineTuning, Attack, L.LightningDataModule, L.Callback, OptimizerSpec, ModelSpec, TrainableSpec, Phase,
                 WarmStart)
        raise ConfigError(explain(message, self, known)) from ex


class Main(LightningCLI):
    """The command line: one run folder a run, the checkpoint never overrides a setting, nothing is dropped silently."""

    def __init__(self, args: list[str] | None) -> None:
        defaults = {"default_config_files": [str(BASE)]}
        super().__init__(
            AdversarialFineTuning,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={name: defaults for name in self.subcommands()},
            load_from_checkpoint_support=False,
            auto_configure_optimizers=False,
            args=args,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """No abbreviations: ``--trainer.max_step`` is a mistake, not ``max_steps``."""
        return super().init_parser(**kwargs, allow_abbrev=False)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """fit and validate; tests are eval.py's."""
        return {name: LightningCLI.subcommands()[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The checkpoint's options; its folder is the run folder's."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")

    def _parse_ckpt_path(self) -> None:
        """Nothing: a checkpoint's stored settings must not override the command line (Lightning would let them)."""

    @property
    def settings(self) -> Any:
        """The effective settings of this subcommand."""
        return self.config[self.config.subcommand]

    @property
    def run_folder(self) -> Path:
        """Where this run writes."""
        return Path(self.settings.trainer.default_root_dir)

    def before_instantiate_classes(self) -> None:
        """Refuses what would be lost silently, then gives logger and checkpoints their places in the run folder."""
        settings = self.settings
        for given in settings.config or []:
            lost = dropped_settings(yaml.safe_load(Path(str(given)).read_text(encoding="utf-8")), settings)
            if lost:
                raise ConfigError(
                    f"{given} sets {', '.join(lost)}, but the class named later lacks it: take it out of the file or keep the class."
                )
        check_device(str(settings.trainer.accelerator))
        self.effective = self._effective_yaml()  # before the places below: used again, the file must not point into this run's folder
        if settings.trainer.logger is None:
            place = {"save_dir": str(self.run_folder), "name": "", "version": "tensorboard", "default_hp_metric": False}
            settings.trainer.logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": place}
        if settings.checkpoint.dirpath is None:
            settings.checkpoint.dirpath = str(self.run_folder / "checkpoints")
        several = str(settings.trainer.devices) not in ("1", "auto") or int(settings.trainer.num_nodes) > 1
        if several and settings.trainer.strategy in ("auto", "ddp"):
            settings.trainer.strategy = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": DDP}
        settings.trainer.enable_progress_bar = sys.stdout.isatty() and settings.trainer.enable_progress_bar is not False
        self.trainer_defaults = {"callbacks": [TerminalProgress()]} if settings.trainer.enable_progress_bar else {}

    def instantiate_classes(self) -> None:
        """Builds everything; an error of ours comes out as it is, not inside the parser's."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise underlying(error) from None

    def before_fit(self) -> None:
        """Checks what the best checkpoint is chosen by, claims the run folder, and prints and stores the effective settings."""
        refuse_suite(self.datamodule)
        check_monitor(self.settings.checkpoint.monitor, self.model, self.datamodule)
        refuse_stale(self.run_folder)
        asked = self.settings.get("ckpt_path")
        if asked == "last":
            found = newest_whole(Path(self.settings.checkpoint.dirpath) / "last.ckpt")
            self.config_init[self.subcommand]["ckpt_path"] = None if found is None else str(found)
        if self.trainer.fast_dev_run or not self.trainer.is_global_zero:
            return
        lock = RunLock(self.run_folder)
        lock.acquire()
        try:
            claim(self.run_folder, Path(self.settings.checkpoint.dirpath), self.effective, asked)
        except RunError:
            lock.release()
            raise
        sweep(Path(self.settings.checkpoint.dirpath))
        self.trainer.callbacks.append(lock)
        if isinstance(self.trainer.strategy.checkpoint_io, AtomicCheckpointIO):
            self.trainer.strategy.checkpoint_io.may_write = lock.still_ours
        self._introduce(self.effective)
        if asked == "last":
            place = self.settings.checkpoint.dirpath
            print(f"no checkpoint in {place} yet: a new run" if found is None else f"going on from {found}", flush=True)
        elif asked:
            print(f"going on from {asked}", flush=True)

    def before_validate(self) -> None:
        """Refuses what trains nothing, and what Lightning would load unasked."""
        refuse_suite(self.datamodule)
        refuse_stale(self.run_folder)

    def _introduce(self, effective: str) -> None:
        """What runs, and the settings that decide what it becomes."""
        learns = sum(p.numel() for p in self.model.parameters() if p.requires_grad) / 1e6
        whole = sum(p.numel() for p in self.model.parameters()) / 1e6
        print(f"{type(self.model).__name__} on {type(self.datamodule).__name__}: {learns:.3g} of {whole:.3g} million parameters learn")
        for key, value in flat(yaml.safe_load(effective)):
            if value is not None and (
                key.startswith(("model.", "data.")) or key in ("trainer.max_steps", "trainer.max_epochs", "trainer.precision")
            ):
                print(f"  {key}: {value}")
        place = f"{self.trainer.world_size} x {self.trainer.strategy.root_device.type}"
        batch, parts = getattr(self.datamodule, "batch_size", None), self.trainer.accumulate_grad_batches
        if batch is not None:
            total, spec = batch * self.trainer.world_size * parts, self.model.optimizer_spec
            scaled = "as it is given" if spec.lr_for is None else f"scaled from {spec.lr:g} for {spec.lr_for} images"
            several = f"{batch} x {self.trainer.world_size} processes x {parts} parts = {total}"
            print(f"images a step: {several}; lr {spec.at(total).lr:g}, {scaled}")
        print(
            f"{place}, run folder {self.run_folder}: all settings in config.yaml, curves by tensorboard --logdir {self.run_folder}",
            flush=True,
        )

    def _effective_yaml(self) -> str:
        """All settings of this run as YAML; the checkpoint path is left out, so that the file starts a new run when it is used again."""
        settings = self.settings.clone()
        for key in ("config", "ckpt_path"):
            settings.pop(key, None)
        return str(self._parser(self.config.subcommand).dump(settings))


def check_device(accelerator: str) -> None:
    """Raises RunError where a GPU is asked for and there is none."""
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise RunError(
            f"trainer.accelerator = {accelerator!r}, but torch sees no CUDA device: use cpu or auto, or install a CUDA build of torch."
        )


def refuse_suite(data: Any) -> None:
    """Raises ConfigError where the data is a suite of test sets: nothing is trained on it, nor chosen by it."""
    if isinstance(data, SuiteData):
        raise ConfigError(
            f"{type(data).__name__} holds test sets alone: train on datamodules.ImageFolder or another of configs/data, and measure the "
            "suite afterwards with python eval.py -c configs/eval/zero_shot_suite.yaml --weights CHECKPOINT."
        )


def check_monitor(monitor: str | None, model: AdversarialFineTuning, data: Any) -> None:
    """Raises ConfigError where the figure that checkpoints are chosen by would never be measured."""
    if monitor is None or not monitor.startswith("val/"):
        return
    if not getattr(data, "val_class_lists", ()):
        raise ConfigError(
            f"checkpoint.monitor = {monitor}, but there is nothing to validate on: set data.init_args.holdout, or monitor to null."
        )
    if monitor == "val/robust_accuracy" and model.val_attack is None:
        raise ConfigError(f"checkpoint.monitor = {monitor} needs model.init_args.val_attack: set it, or monitor val/clean_accuracy.")


def refuse_stale(folder: Path) -> None:
    """Raises RunError where Lightning, under SLURM, would load a checkpoint that nobody asked for."""
    stale = sorted(folder.glob("hpc_ckpt*.ckpt"))
    if stale:
        raise RunError(
            f"{stale[-1]} is in the run folder: Lightning would load it in place of what was asked for. Move it away, or name it with "
            "--ckpt_path from another folder."
        )


def claim(folder: Path, checkpoints: Path, effective: str, asked: str | None) -> None:
    """Stores the settings in the run folder, unless it holds another run. A start that made no checkpoint does not count as a run.

    Args:
        folder: the run folder.
        checkpoints: where its checkpoints go.
        effective: the settings as YAML.
        asked: ``last``, a checkpoint's path, or none for a new run.

    Raises:
        RunError: there are checkpoints, and this is not their continuation.
    """
    taken = any(checkpoints.glob("*.ckpt"))
    own = asked == "last" or (asked is not None and Path(asked).resolve().is_relative_to(folder.resolve()))
    if taken and not own:
        raise RunError(
            f"run folder {folder} already holds a run: add --ckpt_path last to go on with it, choose another with "
            "--trainer.default_root_dir FOLDER, or delete it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    stored = sorted(folder.glob("config*.yaml"), key=lambda path: int(path.stem.partition("-")[2] or 0))
    if not taken or not stored:
        (folder / "config.yaml").write_text(effective, encoding="utf-8")
        return
    changes = new_differences(stored[-1].read_text(encoding="utf-8"), effective)
    if changes:
        print("settings that differ from the run's last start (these hold now):", *changes, sep="\n  ")
        (folder / f"config-{len(stored)}.yaml").write_text(effective, encoding="utf-8")


def quiet() -> None:
    """Hides what says nothing to a user: Lightning's tips and its own deprecated calls."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in HIDDEN:
        warnings.filterwarnings("ignore", message=message)


def main(args: list[str] | None = None) -> Main:
    """Runs one subcommand and returns the model, the data and the trainer that it made.

    Raises:
        AftError: whatever a user can mend.
    """
    torch.set_float32_matmul_precision("high")
    use_onednn()
    quiet()
    return Main(args)


if __name__ == "__main__":
    try:
        main()
    except AftError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: go on with the same command and --ckpt_path last")
    finally:
        leave_process_group()
