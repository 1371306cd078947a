"""Who may write into a run folder, and what a process that was killed in a save leaves there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from aft.clip import ModelSpec
from aft.errors import RunError
from callbacks import RunLock, checkpoint_io
from tests.callbacks.test_safety import ROOT, read, save, tecoa
from tests.conftest import MemoryData, make_trainer

OLD = """
    import os, sys
    from pathlib import Path
    import torch
    from aft.errors import RunError
    from callbacks import AtomicCheckpointIO, RunLock
    lock, io = RunLock(Path(sys.argv[1])), AtomicCheckpointIO()
    lock.acquire()
    io.may_write = lock.still_ours
    for line in sys.stdin:
        try:
            io.save_checkpoint({"value": torch.tensor(float(line))}, Path(sys.argv[1]) / "last.ckpt")
            print("saved", flush=True)
        except RunError as error:
            print(error, flush=True)
"""


@pytest.mark.parametrize("same_job", [True, False])
def test_a_process_of_an_earlier_start_that_still_lives_writes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_job: bool
) -> None:
    """The next start of the same job takes the folder over, and the old one is refused at its next save; another job is itself refused."""
    environment = {**os.environ, "SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "0"}
    old = subprocess.Popen([sys.executable, "-c", textwrap.dedent(OLD), str(tmp_path)], cwd=ROOT, env=environment, text=True,
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert old.stdin is not None and old.stdout is not None

    def ask(value: str) -> str:
        old.stdin.write(f"{value}\n")
        old.stdin.flush()
        return old.stdout.readline()

    assert ask("1") == "saved\n"
    monkeypatch.setenv("SLURM_JOB_ID", "12" if same_job else "13")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lock = RunLock(tmp_path)
    if same_job:
        lock.acquire()
        lock.still_ours()
        assert "was started again" in ask("2") and read(tmp_path / "last.ckpt") == 1.0
        with pytest.raises(RunError, match="another process trains"):
            RunLock(tmp_path).acquire()
        lock.release()
    else:
        with pytest.raises(RunError, match=rf"another process trains in .*\(process {old.pid} on .*, job 12\)"):
            lock.acquire()
        assert ask("2") == "saved\n"
    old.kill()
    old.wait()


def test_a_run_that_was_started_elsewhere_ends_at_its_next_log_entry(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """It need not come to a save to notice."""
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.owner.write_text(json.dumps({**lock.me, "start": "another"}))
    trainer = make_trainer(tmp_path, max_steps=3, limit_val_batches=0, log_every_n_steps=2, callbacks=[lock])
    with pytest.raises(RunError, match="was started again"):
        trainer.fit(tecoa(tiny), datamodule=data)
    assert trainer.global_step == 2


def test_what_a_killed_save_left_is_swept_up(tmp_path: Path) -> None:
    """Its temporary files, and nothing else: neither checkpoints nor hidden files of others."""
    kept = {"last.ckpt", "last.ckpt.previous", ".last.ckpt.txt", ".notes.7"}
    for value in (1.0, 2.0):
        save(tmp_path / "last.ckpt", value)
    for name in (".last.ckpt.txt", ".notes.7", ".last.ckpt.4711", ".best.ckpt.12.previous"):
        (tmp_path / name).touch()
    checkpoint_io.sweep(tmp_path)
    checkpoint_io.sweep(tmp_path / "not there")
    assert {path.name for path in tmp_path.iterdir()} == kept
