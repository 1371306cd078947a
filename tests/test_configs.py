"""Every shipped configuration builds and runs one step; every command of the README is accepted."""

from __future__ import annotations

import re
import shlex
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import DDPStrategy

import train

CONFIGS = train.HERE / "configs"
METHODS = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("methods/*.yaml")])
CHEAPER = sorted(CONFIGS.glob("cheaper/*.yaml"))
TRAINERS = sorted(CONFIGS.glob("trainer/*.yaml"))
ONE_STEP = ["--trainer.max_steps=1", "--trainer.max_epochs=-1", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=1",
            "--trainer.check_val_every_n_epoch=1",
            "--trainer.accelerator=cpu", "--trainer.devices=1"]  # fmt: skip


def on_the_sample(path: Path, folder: Path) -> list[str]:
    """The configuration on a tiny tower and the embedded data: what only large files could give is replaced, nothing else."""
    settings = yaml.safe_load(path.read_text())
    pretraining = settings["model"]["class_path"].endswith("ContrastivePretraining")
    settings["model"]["init_args"]["clip"] = {"name": "tiny", "pretrained": "random" if pretraining else None}
    if settings["model"]["init_args"].get("trainable", {}).get("pad"):
        settings["model"]["init_args"]["trainable"]["pad"] = 4  # of the tiny tower's 32 px, as 30 of 224
    given = settings.get("data", {}).get("init_args", {})
    kept = {key: given[key] for key in ("augment", "train_classes") if key in given}
    settings["data"] = {"class_path": "datamodules.Sample", "init_args": {**kept, "batch_size": 16, "holdout": 70}}
    settings.setdefault("trainer", {})["default_root_dir"] = str(folder / "run")
    (folder / path.name).write_text(yaml.safe_dump(settings))
    return ["fit", "-c", str(folder / path.name), *ONE_STEP]


@pytest.mark.parametrize("path", [p for p in METHODS if p.name != "base.yaml"], ids=lambda p: p.stem)
def test_every_recipe_runs_a_step(path: Path, tmp_path: Path) -> None:
    """On a tiny random tower."""
    assert train.main(on_the_sample(path, tmp_path)).trainer.global_step == 1


@pytest.mark.parametrize("path", CHEAPER, ids=lambda p: p.stem)
def test_every_cheaper_option_lies_over_a_recipe(path: Path, tmp_path: Path) -> None:
    """The recipe's class and its other settings stay; one step runs, and what the file sets holds."""
    below = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())["model"]["init_args"]
    command = on_the_sample(CONFIGS / "quickstart.yaml", tmp_path)
    done = train.main([*command[:3], "-c", str(path), *command[3:]])
    given, method = yaml.safe_load(path.read_text())["model"]["init_args"], done.model
    assert done.trainer.global_step == 1 and type(method).__name__ == "TeCoA"
    assert method.val_attack.steps == below["val_attack"]["init_args"]["steps"] and len(done.trainer.callbacks) > 5
    assert [phase.until for phase in method.phases] == [phase["until"] for phase in given.get("phases", [])]
    assert (method.perturbations is not None) == ("warm_start" in given)
    assert method.attack.steps == given.get("attack", below["attack"])["init_args"]["steps"]


@pytest.mark.parametrize("path", TRAINERS, ids=lambda p: p.stem)
def test_every_trainer_file_is_accepted(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its keys exist, and it lies over a recipe."""
    with pytest.raises(SystemExit) as done:
        train.main(["fit", "-c", str(CONFIGS / "quickstart.yaml"), "-c", str(path), "--print_config"])
    assert done.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert shown["accelerator"] == yaml.safe_load(path.read_text())["trainer"]["accelerator"]


@pytest.mark.parametrize("name", ["ddp", "multi_node", None])
def test_several_processes_do_not_scan_or_wait_for_ever(name: str | None) -> None:
    """What reaches torch, of the files and of ``--trainer.devices 2`` alone: no scan for unused parameters, no broadcast, ten minutes."""
    told = yaml.safe_load((CONFIGS / "trainer" / f"{name}.yaml").read_text())["trainer"] if name else {"strategy": given_by_devices()}
    parser = ArgumentParser()
    parser.add_subclass_arguments(DDPStrategy, "strategy")
    strategy = parser.instantiate(parser.parse_object({"strategy": told["strategy"]})).strategy
    assert strategy._timeout == timedelta(minutes=10)
    assert (strategy._ddp_kwargs["find_unused_parameters"], strategy._ddp_kwargs["broadcast_buffers"]) == (False, False)
    assert name is None or told["precision"] == "bf16-mixed"


def given_by_devices() -> dict[str, object]:
    """The strategy of train.py where none is named."""
    return {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": train.DDP}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_file_says_what_it_is(path: Path) -> None:
    """A head, and for recipes the command and what to expect."""
    text = path.read_text()
    assert text.startswith("# ")
    if path in METHODS and path.name != "base.yaml":
        head = re.match(r"(#.*\n)+", text)
        assert head and "python train.py fit" in head.group() and "Expect" in head.group()


def commands_of_the_readme() -> list[str]:
    """Lines of its shell blocks that start train.py."""
    text = (train.HERE / "README.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("python train.py")]


def test_the_readme_has_commands() -> None:
    """Else the next test could not fail."""
    assert len(commands_of_the_readme()) >= 3


@pytest.mark.parametrize("command", commands_of_the_readme())
def test_every_training_command_of_the_readme_is_accepted(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and keys exist (runs themselves are tested above and in tests/test_train.py)."""
    monkeypatch.chdir(train.HERE)
    words = [word for word in shlex.split(command, comments=True)[2:] if word != "..."]
    with pytest.raises(SystemExit) as done:
        train.main([*words, "--print_config"])
    assert done.value.code == 0


@pytest.mark.parametrize("path", [path for path in METHODS if path.parent.name == "methods"], ids=lambda p: p.stem)
def test_every_key_of_a_recipe_says_where_it_is_from(path: Path) -> None:
    """A comment above it that ends in a mark: read (with what was read), memory, or ours."""
    lines = path.read_text().splitlines()
    depth = {"model:": 4, "trainer:": 2}
    inside, comment, seen = "", "", 0
    for line in lines:
        inside, comment = (line, "") if line in depth else (inside, comment)
        indent = " " * depth.get(inside, 0)
        if line.startswith(f"{indent}#"):
            comment += line
        elif inside and re.match(rf"{indent}\w+:", line):
            assert re.search(r"\((read: [^)]+|(from )?memory[^)]*|ours[^)]*)\)", comment), f"{line.strip()}: no mark above it"
            comment, seen = "", seen + 1
    assert seen >= 6

