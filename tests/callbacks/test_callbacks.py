"""What a person sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aft.attacks import PGD
from aft.clip import ModelSpec
from aft.methods import TeCoA
from callbacks import Farewell, ImageLog, PlainProgress, RunLock, TerminalProgress, Throughput
from tests.conftest import MemoryData, make_trainer


@pytest.fixture
def run(tiny: ModelSpec, data: MemoryData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, EventAccumulator]:
    """Four steps with all callbacks: the output, and TensorBoard's events."""
    attack = PGD(eps="8/255", step_size="4/255", steps=2)
    method = TeCoA(tiny, attack=attack, val_attack=PGD(eps="8/255", step_size="4/255", steps=2, keep="best"))
    saver = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/robust_accuracy", mode="max", save_last=True)
    trainer = make_trainer(
        tmp_path, max_steps=4, log_every_n_steps=2, val_check_interval=2, limit_val_batches=1, enable_checkpointing=True,
        callbacks=[PlainProgress(), Throughput(), ImageLog(every_n_steps=2, images=5), Farewell(), saver],
        logger=TensorBoardLogger(str(tmp_path), name="", version="tb", default_hp_metric=False),
    )  # fmt: skip
    trainer.fit(method, datamodule=data)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    return capsys.readouterr().out, events


def test_lines_when_not_a_terminal(run: tuple[str, EventAccumulator]) -> None:
    """Steps with terms, validation with clean and robust accuracy, no control codes; the last line is a command."""
    lines = run[0].strip().splitlines()
    assert any(line.startswith("step 2/4") and "alignment" in line and "adversarial_accuracy" in line for line in lines)
    assert any(line.startswith("validation at step 2") and "clean_accuracy" in line and "robust_accuracy" in line for line in lines)
    assert "\x1b" not in run[0] and "\r" not in run[0]
    assert lines[-3].startswith("checkpoint: ") and Path(lines[-3].split()[1]).is_file()
    assert lines[-1].strip().startswith("python eval.py") and lines[-3].split()[1] in lines[-1]


def test_stable_names_and_pictures_in_tensorboard(run: tuple[str, EventAccumulator]) -> None:
    """Each term, total, gain, accuracy, gradient norm, images a second; a picture of three rows."""
    tags = run[1].Tags()
    wanted = {"train/loss", "train/alignment", "train/adversarial_accuracy", "train/gradient_norm", "attack/gain", "val/clean_accuracy",
              "val/robust_accuracy", "optimizer/learning_rate", "speed/images_per_second", "speed/data_wait"}  # fmt: skip
    assert wanted <= set(tags["scalars"]) and tags["images"] == ["attack/clean_adversarial_difference"]
    assert 0 <= run[1].Scalars("speed/data_wait")[-1].value < 1
    picture = run[1].Images("attack/clean_adversarial_difference")[0]
    assert (picture.height, picture.width) == (3 * (3 * 32 + 4), 5 * (3 * 32 + 4))


def test_a_run_that_logs_nothing(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """``log_every_n_steps: 0`` is Lightning's word for that: callbacks that act at log entries leave it alone."""
    watchers = [PlainProgress(), Throughput(), RunLock(tmp_path)]
    trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=0, log_every_n_steps=0, callbacks=watchers)
    trainer.fit(TeCoA(tiny, attack=PGD(eps="8/255", step_size="4/255", steps=1)), datamodule=data)
    assert trainer.global_step == 2


def test_one_picture_a_step_with_accumulation(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Micro-batches of one optimiser step are one step; the student is in training mode again after the picture."""
    method, pictures, modes = TeCoA(tiny, attack=PGD(eps="8/255", step_size="4/255", steps=1)), [], []
    log = ImageLog(every_n_steps=1)
    log.table = lambda *arguments: pictures.append(1) or ImageLog.table(*arguments)  # type: ignore[method-assign,func-returns-value]
    method.on_train_batch_start = lambda batch, batch_idx: modes.append(method.model.visual.training)  # type: ignore[method-assign]
    logger = TensorBoardLogger(str(tmp_path), name="", version="tb")
    data.batch_size = 6
    settings = {"max_steps": 2, "accumulate_grad_batches": 2, "limit_val_batches": 0, "callbacks": [log], "logger": logger}
    make_trainer(tmp_path, **settings).fit(method, datamodule=data)
    assert len(pictures) == 3 and all(modes)  # at steps 0, 1 and 2


def test_the_difference_is_amplified_and_grey_means_none() -> None:
    """The largest change has full contrast; no change is mid-grey."""
    clean = torch.full((1, 3, 4, 4), 0.5)
    changed = clean.clone()
    changed[0, 0, 0, 0] += 0.01
    picture = ImageLog(enlarge=1).picture(clean, changed)
    difference = picture[:, 2 * 8 + 2 : 2 * 8 + 6, 2:6]
    assert float(difference[0, 0, 0]) == pytest.approx(1.0) and (difference[1:] == 0.5).all()


def test_the_terminal_s_bar_counts_passes(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """From 1, with their number also where the run is given in steps (Lightning says 0/-2); figures have short names."""
    bar, seen = TerminalProgress(), []
    method = TeCoA(tiny, attack=PGD(eps="8/255", step_size="4/255", steps=1))
    method.on_train_batch_start = lambda batch, batch_idx: seen.append(bar._get_train_description(method.current_epoch))  # type: ignore[method-assign]
    trainer = make_trainer(tmp_path, max_steps=4, limit_val_batches=0, enable_progress_bar=True, callbacks=[bar])
    trainer.fit(method, datamodule=data)
    assert seen == ["Pass 1/2"] * 3 + ["Pass 2/2"]
    assert {"loss", "adversarial_accuracy"} <= set(bar.get_metrics(trainer, method)) and "v_num" not in bar.get_metrics(trainer, method)
