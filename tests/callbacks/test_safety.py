"""What keeps a run safe: stops at step ends, atomic checkpoints, one process a folder."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from aft.attacks import PGD
from aft.clip import ModelSpec
from aft.errors import ConfigError, RunError
from aft.methods import OptimizerSpec, TeCoA
from callbacks import AtomicCheckpointIO, AveragedWeights, Interruption, KeepSaving, Stopped, checkpoint_io
from datamodules import Sample
from tests.callbacks.saves_forever import save_forever
from tests.conftest import MemoryData, make_trainer

ROOT = Path(__file__).resolve().parents[2]
KILLS = 50 if os.environ.get("AFT_STRESS") else 3


def tecoa(tiny: ModelSpec) -> TeCoA:
    """TeCoA with a one-step attack."""
    return TeCoA(tiny, attack=PGD(eps="8/255", step_size="4/255", steps=1), optimizer=OptimizerSpec(lr=1e-3, schedule="constant"))


class SignalAt(L.Callback):
    """Sends this process a signal within a step."""

    def __init__(self, step: int, *signums: int) -> None:
        self.step, self.signums = step, signums

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """At the start of the batch after ``step`` steps."""
        if trainer.global_step == self.step:
            for signum in self.signums:
                os.kill(os.getpid(), signum)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_ends_a_run_after_a_whole_step_with_a_checkpoint(
    tiny: ModelSpec, data: MemoryData, tmp_path: Path, signum: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 128 + signal (Lightning alone ends with 0 and saves nothing, R2); the checkpoint goes on; handlers are given back."""
    before, saver = signal.getsignal(signum), ModelCheckpoint(tmp_path, save_last=True)
    trainer = make_trainer(
        tmp_path, max_steps=5, limit_val_batches=0, enable_checkpointing=True, callbacks=[SignalAt(2, signum), Interruption(), saver]
    )
    with pytest.raises(Stopped) as ended:
        trainer.fit(tecoa(tiny), datamodule=data)
    assert ended.value.code == code and signal.getsignal(signum) == before
    assert "stopped after step 3" in capsys.readouterr().out
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
    again = make_trainer(tmp_path, max_steps=5, limit_val_batches=0)
    again.fit(tecoa(tiny), datamodule=data, ckpt_path=str(tmp_path / "last.ckpt"))
    assert again.global_step == 5


def test_the_second_ctrl_c_stops_at_once(tiny: ModelSpec, data: MemoryData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without waiting for the step, and without a checkpoint."""
    twice = SignalAt(1, signal.SIGINT, signal.SIGINT)
    trainer = make_trainer(tmp_path, max_steps=5, limit_val_batches=0, callbacks=[twice, Interruption()])
    with pytest.raises(SystemExit):
        trainer.fit(tecoa(tiny), datamodule=data)
    assert trainer.global_step == 1 and "stopped in step 2" in capsys.readouterr().out


def save(path: Path, value: float) -> None:
    """A checkpoint of one number."""
    AtomicCheckpointIO().save_checkpoint({"value": torch.tensor(value)}, path)


def read(path: Path) -> float:
    """The number in a checkpoint."""
    return float(AtomicCheckpointIO().load_checkpoint(path)["value"])


def test_the_checkpoint_before_is_kept(tmp_path: Path) -> None:
    """One of them, and nothing else lies about."""
    for value in (1.0, 2.0, 3.0):
        save(tmp_path / "last.ckpt", value)
    assert (read(tmp_path / "last.ckpt"), read(tmp_path / "last.ckpt.previous")) == (3.0, 2.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.previous"]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """The file-size limit stands for the full disk; the error names the file and says what to do."""
    save(tmp_path / "last.ckpt", 1.0)
    code = """
        import resource, signal, sys, torch
        from callbacks import AtomicCheckpointIO
        from aft.errors import RunError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            AtomicCheckpointIO().save_checkpoint({"value": torch.zeros(100_000)}, sys.argv[1])
        except RunError as error:
            sys.exit(f"refused: {error}")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "last.ckpt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "refused: checkpoint" in done.stderr and "--ckpt_path last" in done.stderr
    assert read(tmp_path / "last.ckpt") == 1.0 and [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """As on a disk that has become read-only: one sentence with the file's name, no traceback of the system's."""
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(RunError, match=r"checkpoint .*last.ckpt could not be written .*: make room or make it writable"):
        save(tmp_path / "checkpoints" / "last.ckpt", 1.0)


def other_file_system(folder: Path) -> Path | None:
    """A folder for temporary files that is on another file system, so that a move from there is a copy; none: there is none here."""
    candidates = [path for path in map(Path, ("/dev/shm", "/run/shm", "/var/tmp", "/tmp", ROOT)) if os.access(path, os.W_OK)]
    return next((path for path in candidates if path.stat().st_dev != folder.stat().st_dev), None)


@pytest.mark.timeout(900)
def test_kill_9_while_saving_leaves_whole_checkpoints(tmp_path: Path) -> None:
    """Whenever the kill comes, with temporary files on another file system: both files load, and no save that was done is lost.

    `make stress` kills 50 times. What a killed save leaves is under another name, and shows that the kill came while it was going on.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.callbacks.saves_forever"])
    elsewhere, dice, landed = other_file_system(tmp_path), random.Random(0), 0
    last, before = tmp_path / "last.ckpt", tmp_path / f"last.ckpt{checkpoint_io.PREVIOUS}"
    save(last, -1.0)  # so that there is one before the first
    for _ in range(KILLS):
        heard, said = processes.Pipe(duplex=False)
        writer = processes.Process(target=save_forever, args=(last, elsewhere or tmp_path, said), daemon=True)
        writer.start()
        done = heard.recv()
        time.sleep(0.25 * dice.random())
        writer.kill()
        writer.join()
        while heard.poll():
            done = heard.recv()
        said.close()
        left = [path for path in tmp_path.iterdir() if path not in (last, before)]
        landed += bool(left)
        assert read(last) in (done, done + 1) and read(before) >= -1, left
        for path in left:
            path.unlink()
    print(f"{landed} of {KILLS} kills came during a save; temporary files in {elsewhere or tmp_path}")
    assert landed >= KILLS // 3
    if elsewhere is None:
        pytest.skip(f"{KILLS} kills left whole checkpoints, but no second file system can be written here: temporary files lay on the same")


def test_parts_of_an_accumulated_step_are_not_saved(
    tiny: ModelSpec, data: MemoryData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a step, at its end: a checkpoint from between two parts would have lost the first one's gradient."""
    saved: list[int] = []
    monkeypatch.setattr("callbacks.saving.save_last", lambda trainer: saved.append(trainer.global_step))
    trainer = make_trainer(tmp_path, max_steps=3, limit_val_batches=0, accumulate_grad_batches=3, callbacks=[KeepSaving(1)])
    trainer.fit(tecoa(tiny), datamodule=data)
    assert saved == [1, 2, 3]


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_checkpoint_that_would_run_code_does_not(tmp_path: Path) -> None:
    """Tensors and plain types alone are read."""
    torch.save({"value": Payload(tmp_path / "ran")}, tmp_path / "last.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        read(tmp_path / "last.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_damaged_checkpoint_names_the_one_before(tmp_path: Path) -> None:
    """A file cut short is no traceback."""
    for value in (1.0, 2.0):
        save(tmp_path / "last.ckpt", value)
    (tmp_path / "last.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:300])
    with pytest.raises(RunError, match=f"go on from .*{checkpoint_io.PREVIOUS}"):
        read(tmp_path / "last.ckpt")


class Logged(Logger):
    """Keeps the steps under which the loss came."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    name, version = "logged", 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """One entry."""
        if "train/loss" in metrics and step is not None:
            self.steps.append(step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""


def test_the_curve_of_a_stopped_and_resumed_run_lacks_no_step(tiny: ModelSpec, tmp_path: Path) -> None:
    """Lightning logs a step after the callbacks, in one of which the run ends."""
    logged, saver = Logged(), ModelCheckpoint(tmp_path, save_last=True)
    settings = {"max_steps": 5, "limit_val_batches": 0, "enable_checkpointing": True, "logger": logged, "log_every_n_steps": 1}
    trainer = make_trainer(tmp_path, callbacks=[SignalAt(2, signal.SIGTERM), Interruption(), saver], **settings)
    with pytest.raises(Stopped):
        trainer.fit(tecoa(tiny), datamodule=Sample(batch_size=16, holdout=0))
    assert logged.steps == [0, 1, 2]
    again = make_trainer(tmp_path, callbacks=[Interruption()], **settings)
    again.fit(tecoa(tiny), datamodule=Sample(batch_size=16, holdout=0), ckpt_path=str(tmp_path / "last.ckpt"))
    assert logged.steps == [0, 1, 2, 3, 4]


def test_schedulers_that_repeat_a_signal_do_not_cost_the_checkpoint(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """SIGUSR1, then SIGTERM twice within one step: it is still finished and saved, and the first signal is the exit code's."""
    signals = SignalAt(1, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM)
    trainer = make_trainer(tmp_path, max_steps=5, limit_val_batches=0, enable_checkpointing=True,
                           callbacks=[signals, Interruption(), ModelCheckpoint(tmp_path, save_last=True)])  # fmt: skip
    with pytest.raises(Stopped) as ended:
        trainer.fit(tecoa(tiny), datamodule=data)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2 and ended.value.code == 128 + signal.SIGUSR1


class Handlers(L.Callback):
    """Who answers to signals when training is about to start."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before Interruption, which acts after the others."""
        self.found = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1)]


def test_lightning_does_not_answer_to_signals(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Its handlers would save in the middle of a step, queue the job again a second time, and end with exit code 0 (R2, R6)."""
    handlers, before = Handlers(), [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1)]
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[handlers, Interruption()])
    trainer.fit(tecoa(tiny), datamodule=data)
    assert handlers.found == before
    assert "_broadcast_sigterm_tensor" in vars(trainer.fit_loop.epoch_loop)  # nor does it wait for the GPU in every step (R5)


def test_a_stop_waits_for_the_last_part_of_an_accumulated_step(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """The signal comes in the first of three parts of step 2: the parts that are done would be lost with the process."""
    trainer = make_trainer(tmp_path, max_steps=5, limit_val_batches=0, enable_checkpointing=True, accumulate_grad_batches=3,
                           callbacks=[SignalAt(1, signal.SIGTERM), Interruption(), ModelCheckpoint(tmp_path, save_last=True)])  # fmt: skip
    with pytest.raises(Stopped):
        trainer.fit(tecoa(tiny), datamodule=data)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


class ForkAndSignal(L.Callback):
    """Within the first step, a forked child signals itself, as SLURM does to the loader's workers; its exit code says what it noted."""

    def __init__(self, interruption: Interruption) -> None:
        self.interruption, self.noted = interruption, -1

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Once."""
        if trainer.global_step == 0:
            child = os.fork()
            if child == 0:
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(self.interruption.asked)
            self.noted = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_signal_to_a_forked_child_is_not_the_run_s(
    tiny: ModelSpec, data: MemoryData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The child has the handler, too: it notes nothing and says nothing, and the run goes on to its end."""
    interruption = Interruption()
    child = ForkAndSignal(interruption)
    trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=0, callbacks=[child, interruption])
    trainer.fit(tecoa(tiny), datamodule=data)
    assert (child.noted, trainer.global_step) == (0, 2) and "stopping after this step" not in capsys.readouterr().out


def test_a_stop_waits_for_the_average(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Whatever the order of the callbacks, the checkpoint of a stop holds the average after the step, not before it."""
    average, saver = AveragedWeights(0.5), ModelCheckpoint(tmp_path, save_last=True)
    trainer = make_trainer(tmp_path, max_steps=5, limit_val_batches=0, enable_checkpointing=True,
                           callbacks=[Interruption(), KeepSaving(100), SignalAt(2, signal.SIGTERM), average, saver])  # fmt: skip
    with pytest.raises(Stopped):
        trainer.fit(tecoa(tiny), datamodule=data)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["averaged_weights"]["steps"] == average.steps == 3


def test_last_is_written_every_so_many_steps(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Steps 2 and 4 of 5, with the average after the step; no validation is needed."""
    saver = ModelCheckpoint(tmp_path, save_last=True, monitor="val/robust_accuracy")
    average = AveragedWeights(0.5)
    trainer = make_trainer(tmp_path, max_steps=5, limit_val_batches=0, enable_checkpointing=True, plugins=[AtomicCheckpointIO()],
                           callbacks=[KeepSaving(2), average, saver])  # fmt: skip
    trainer.fit(tecoa(tiny), datamodule=data)
    last, before = (torch.load(tmp_path / f"last.ckpt{end}", weights_only=True) for end in ("", checkpoint_io.PREVIOUS))
    assert (last["global_step"], before["global_step"]) == (4, 2) and last["averaged_weights"]["steps"] == 4
    with pytest.raises(ConfigError, match="every_n_steps"):
        KeepSaving(0)


@pytest.mark.parametrize("place", ["head", "middle"])
def test_the_one_before_stands_in_for_a_damaged_checkpoint(tmp_path: Path, place: str) -> None:
    """Cut short, or one byte of a weight changed, which torch would load without a word."""
    last = tmp_path / "last.ckpt"
    assert checkpoint_io.newest_whole(last) is None
    for value in (1.0, 2.0):
        save(last, value)
    assert checkpoint_io.newest_whole(last) == last
    content = bytearray(last.read_bytes())
    at = content.index(torch.tensor(2.0).numpy().tobytes())
    last.write_bytes(bytes(content[:300]) if place == "head" else bytes(content[:at] + b"\1" + content[at + 1:]))
    with pytest.warns(UserWarning, match="last.ckpt is damaged .* the one before it"):
        assert checkpoint_io.newest_whole(last) == Path(f"{last}{checkpoint_io.PREVIOUS}")
    Path(f"{last}{checkpoint_io.PREVIOUS}").write_bytes(b"")
    with pytest.raises(RunError, match="no checkpoint to go on from is whole"):
        checkpoint_io.newest_whole(last)
