"""train.py: nothing is dropped silently, the command line wins, a run folder belongs to one run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import train
from aft.errors import AftError, ConfigError, DataError, RunError
from aft.settings import dropped_settings, new_differences

SMALL = ["--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--data.init_args.batch_size=16",
         "--trainer.log_every_n_steps=1", "--trainer.val_check_interval=1", "--trainer.check_val_every_n_epoch=1"]  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The quickstart on the tiny model."""
    path = tmp_path / "tiny.yaml"
    settings = yaml.safe_load((train.HERE / "configs" / "quickstart.yaml").read_text())
    settings["model"]["init_args"]["clip"] = {"name": "tiny"}
    settings["trainer"]["default_root_dir"] = str(tmp_path / "run")
    path.write_text(yaml.safe_dump(settings))
    return path


def fit(config: Path, *more: str) -> train.Main:
    """``train.py fit`` in this process."""
    return train.main(["fit", "-c", str(config), *SMALL, *more])


def test_fit_then_go_on(config: Path, tmp_path: Path) -> None:
    """``--ckpt_path last`` works on the first start and on every later one; the command line wins over the checkpoint."""
    first = fit(config, "--ckpt_path=last")
    assert first.trainer.global_step == 2 and (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert "ckpt_path" not in stored and stored["model"]["init_args"]["attack"]["init_args"]["steps"] == 2
    again = fit(config, "--ckpt_path=last", "--trainer.max_steps=3", "--model.init_args.attack.init_args.steps=1")
    assert again.trainer.global_step == 3 and again.model.attack.steps == 1
    changed = yaml.safe_load((tmp_path / "run" / "config-1.yaml").read_text())
    assert changed["trainer"]["max_steps"] == 3


def test_the_best_checkpoint_is_chosen_by_robust_accuracy_on_training_images(config: Path, tmp_path: Path) -> None:
    """And the validation images are never trained on."""
    done = fit(config)
    assert done.trainer.checkpoint_callback.monitor == "val/robust_accuracy"
    parts = done.datamodule._train_parts
    assert not set(parts["train"].index_N.tolist()) & set(parts["holdout"].index_N.tolist())
    assert torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["aft"]["model"]["method"] == "tecoa"


def test_a_run_folder_belongs_to_one_run(config: Path, tmp_path: Path) -> None:
    """A second run into the same folder loses nothing."""
    fit(config)
    before = (tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    with pytest.raises(RunError, match=r"already holds a run: add --ckpt_path last"):
        fit(config)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


def test_two_processes_do_not_train_in_one_folder(config: Path, tmp_path: Path) -> None:
    """R33: the second is told, nothing is written; once the first is gone (however it ended) the folder is free."""
    (tmp_path / "run").mkdir()
    code = "import sys, time; from pathlib import Path; from callbacks import RunLock; " \
           "lock = RunLock(Path(sys.argv[1])); lock.acquire(); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], cwd=train.HERE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(RunError, match="another process trains in"):
        fit(config)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.lock", "run.owner"]
    other.kill()
    other.wait()
    fit(config)


def test_a_stale_checkpoint_of_a_cluster_job_is_refused(config: Path, tmp_path: Path) -> None:
    """R7: Lightning would load hpc_ckpt_N.ckpt in place of what was asked for; the lock is free again afterwards."""
    (tmp_path / "run").mkdir()
    stale = tmp_path / "run" / "hpc_ckpt_3.ckpt"
    stale.write_bytes(b"")
    with pytest.raises(RunError, match=r"hpc_ckpt_3.ckpt is in the run folder"):
        fit(config)
    with pytest.raises(RunError, match=r"hpc_ckpt_3.ckpt is in the run folder"):
        train.main(["validate", "-c", str(config), *SMALL])
    stale.unlink()
    fit(config)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(config: Path, tmp_path: Path) -> None:
    """``--ckpt_path last`` goes on from it, and says so; what a killed save left beside it is gone."""
    fit(config)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = last.read_bytes()
    shutil.copy(last, f"{last}.previous")
    last.write_bytes(content[: len(content) // 2])
    last.with_name(".last.ckpt.4711").touch()
    with pytest.warns(UserWarning, match="last.ckpt is damaged .* going on from .*last.ckpt.previous"):
        again = fit(config, "--ckpt_path=last", "--trainer.max_steps=3")
    assert again.trainer.global_step == 3 and not last.with_name(".last.ckpt.4711").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trainer.max_step=3"], r"max_steps"),
        (["--model.init_args.attack.init_args.eps=4"], r"eps = 4.* is outside \[0, 1\] for L-inf.*4/255"),
        (["--model.init_args.attack.init_args.eps=-1/255"], r"eps"),
        (["--model.init_args.attack.init_args.eps=abc"], r"eps"),
        (["--model.init_args.attack.init_args.stepz=4"], r"stepz"),
        (["--model=aft.methods.TeCoAA"], r"TeCoAA"),
        (["-c", "configs/quickstrat.yaml"], r"^there is no file configs/quickstrat.yaml: did you mean configs/quickstart.yaml or "),
        (["-c", "teco.yaml"], r"^there is no file teco.yaml: did you mean configs/methods/tecoa.yaml or "),
        (["-c", "/nowhere/zzz.yaml"], r"^there is no file /nowhere/zzz.yaml.$"),
        (["--trainer.callbacks+=callbacks.ColapseWatch"], r"did you mean 'CollapseWatch'"),
        (["--trainer.callbacks+=callbacks.CollapseWatch", "--trainer.callbacks.evry=2"], r"did you mean 'every'"),
        (["--model.init_args.clip.name=minicilp32"], r"did you mean 'miniclip32'"),
        (["--model.init_args.terms={alignmnt: {}}"], r"did you mean 'alignment'"),
        (["--model.init_args.clip.pretrained=nowhere.ckpt"], r"no weights file at nowhere.ckpt"),
        (["--model.init_args.clip.name=miniclip32", "--model.init_args.clip.pretrained=opnai"], r"^miniclip32 has no tags.*'opnai'.*null$"),
        (["--model.init_args.phases=[{until: 0.5, drop_patch: 0.5}]"], r"did you mean 'drop_patches'"),
        (["--data.init_args.train_classes=[cat, dgo]"], r"did you mean 'dog'"),
        (["--model.init_args.trainable.name=lorra"], r"^unknown value of trainable.name 'lorra': did you mean 'lora'\?[^-]*$"),
    ],
)
def test_bad_arguments_are_named(config: Path, arguments: list[str], words: str) -> None:
    """The argument, what came, what is allowed."""
    with pytest.raises(AftError, match=words):
        fit(config, *arguments)


@pytest.mark.parametrize("key", ["clip.pretrained", "clip.base", "clip.image_size", "clip.activation", "optimizer.lr_for", "logit_scale"])
def test_null_is_nothing_however_deep_the_setting_lies(key: str) -> None:
    """The parser hands ``null`` down two levels as the word None: never a name of weights, nor an error."""
    parser = train.Parser()
    parser.add_subclass_arguments(train.AdversarialFineTuning, "model")
    given = parser.parse_args(["--model=aft.methods.TeCoA", f"--model.init_args.{key}=null"]).model.init_args
    assert given[key] is None


def test_a_suite_of_test_sets_is_not_trained_on(config: Path) -> None:
    """Nor chosen by: it says which data trains, and which command measures the suite."""
    suite = str(train.HERE / "configs" / "data" / "zero_shot_suite.yaml")
    for command in ("fit", "validate"):
        with pytest.raises(ConfigError, match="ZeroShotSuite holds test sets alone.*ImageFolder.*eval.py -c configs/eval/zero_shot_suite"):
            train.main([command, "-c", suite, "--model=aft.methods.TeCoA", "--model.init_args.clip.name=tiny",
                        "--model.init_args.attack=aft.attacks.PGD", "--model.init_args.attack.init_args.eps=2/255",
                        "--model.init_args.attack.init_args.step_size=1/255", "--model.init_args.attack.init_args.steps=1",
                        "--trainer.accelerator=cpu"])  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_where_there_is_none(config: Path) -> None:
    """Named before anything is loaded."""
    with pytest.raises(RunError, match="sees no CUDA device"):
        fit(config, "--trainer.accelerator=gpu")


def test_another_class_does_not_drop_settings_silently(config: Path) -> None:
    """The folder data set has no such setting as the file gave: refused, not ignored."""
    settings = yaml.safe_load(config.read_text())
    settings["model"]["init_args"]["attack"]["init_args"]["momentum"] = 0.5
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match=r"model.init_args.attack.init_args.steps"):
        fit(config, "--model.init_args.attack=aft.attacks.FGSM")


def test_an_empty_folder_is_named(config: Path, tmp_path: Path) -> None:
    """A folder without images."""
    (tmp_path / "empty").mkdir()
    settings = yaml.safe_load(config.read_text())
    settings["data"] = {"class_path": "datamodules.ImageFolder", "init_args": {"train": str(tmp_path / "empty"), "holdout": 10}}
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(DataError, match="empty"):
        fit(config)


def test_settings_that_a_new_class_lacks_are_listed() -> None:
    """At any depth; a setting that the new class has stays."""
    given = {"model": {"class_path": "a.B", "init_args": {"x": 1, "attack": {"class_path": "PGD", "init_args": {"steps": 2}}}}}
    effective = {
        "model": {"class_path": "a.B", "init_args": {"x": 1, "attack": {"class_path": "aft.attacks.FGSM", "init_args": {"eps": 0}}}}
    }
    assert dropped_settings(given, effective) == ["model.init_args.attack.init_args.steps"]
    assert dropped_settings(given, given) == []


def test_differences_of_two_runs() -> None:
    """One line a key."""
    assert new_differences("a: {b: 1, c: 2}", "a: {b: 1, c: 3}\nd: 4") == ["a.c: 2 -> 3", "d: None -> 4"]


def test_a_stored_config_starts_a_new_run_elsewhere(config: Path, tmp_path: Path) -> None:
    """Used again with another folder it leaves the first run alone, and starts at step 0."""
    fit(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = train.main(
        ["fit", "-c", str(tmp_path / "run/config.yaml"), f"--trainer.default_root_dir={tmp_path / 'other'}", "--trainer.max_steps=1"]
    )
    assert again.trainer.global_step == 1 and (tmp_path / "other" / "checkpoints" / "last.ckpt").is_file()
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_start_that_made_nothing_does_not_take_the_folder(config: Path, tmp_path: Path) -> None:
    """The corrected command is accepted; another run's checkpoint is not a continuation of this folder."""
    with pytest.raises(AftError):
        train.main(["fit", "-c", str(config), *SMALL, "--data.init_args.batch_size=100000"])
    fit(config)
    (tmp_path / "foreign.ckpt").write_bytes(b"")
    with pytest.raises(RunError, match="already holds a run"):
        fit(config, f"--ckpt_path={tmp_path / 'foreign.ckpt'}")


def test_a_checkpoint_chosen_by_what_is_not_measured(config: Path) -> None:
    """Said before the first step, not after the first epoch."""
    with pytest.raises(ConfigError, match="needs model.init_args.val_attack"):
        fit(config, "--model.init_args.val_attack=null")
    with pytest.raises(ConfigError, match="nothing to validate on"):
        fit(config, "--data.init_args.holdout=0")


def test_two_processes_by_the_command_line(tmp_path: Path) -> None:
    """``--trainer.devices 2`` starts the script again for the second process: one run folder, one claim, and both end."""
    command = [sys.executable, "train.py", "fit", "-c", "configs/quickstart.yaml", "--model.init_args.clip.pretrained=random",
               "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.max_steps=2", "--trainer.val_check_interval=2",
               "--trainer.check_val_every_n_epoch=1",
               "--trainer.limit_val_batches=1", "--data.init_args.batch_size=16", "--data.init_args.holdout=35",
               f"--trainer.default_root_dir={tmp_path}"]  # fmt: skip
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=train.HERE, capture_output=True, text=True, timeout=280, env={**alone, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file() and len(list(tmp_path.glob("config*.yaml"))) == 1
    assert done.stdout.count("million parameters learn") == 1


def test_nothing_is_written_outside_the_run_folder(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No lightning_logs beside the code, from whichever folder it is started."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    fit(config)
    assert not list(elsewhere.iterdir())
    shutil.rmtree(tmp_path / "run")
