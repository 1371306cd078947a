"""One command as the tasks of an array: methods x seeds x whatever else varies, each with a name that becomes its folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from aft.errors import ConfigError, unknown_name

TRAINING = ("fit",)
MEASURING = ("evaluate", "curve")
OURS = {  # what the submission decides by itself
    "fit": ("--trainer.default_root_dir", "--trainer.num_nodes", "--trainer.devices", "--ckpt_path", "--checkpoint.dirpath"),
    "evaluate": ("--out", "--rank", "--world"),
    "curve": ("--out", "--rank", "--world"),
}
CONFIGURATION = ("-c", "--config")
SEED_OPTIONS = ("--seed_everything", "--model.init_args.seed", "--data.init_args.seed")


#: A value on one axis: its part of the folder's name, and the words that it puts before and behind the command's own.
Choice = tuple[str, tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Command:
    """What runs: ``train.py fit ...`` or ``eval.py evaluate ...``.

    Args:
        words: subcommand and its options.

    Raises:
        ConfigError: another subcommand, or an option that the submission sets.
    """

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        known = (*TRAINING, *MEASURING)
        if not self.words:
            raise ConfigError("there is no command: write it after --, such as: python -m aft.submit -- fit -c configs/methods/tecoa.yaml")
        if self.words[0] not in known:
            raise ConfigError(unknown_name("command after --", self.words[0], known))
        for word in self.words:
            if word.partition("=")[0] in OURS[self.words[0]]:
                raise ConfigError(f"{word}: aft.submit sets this option itself (folder and processes follow from the job); leave it out.")

    @property
    def trains(self) -> bool:
        """Whether it is a training."""
        return self.words[0] in TRAINING

    def check_files(self, here: Path) -> None:
        """Looks whether the YAML files of the command are there, before a job waits in a queue to find out.

        Args:
            here: where relative paths start from.

        Raises:
            ConfigError: one is not; files in its folder with similar names are listed.
        """
        for word, following in zip(self.words, (*self.words[1:], ""), strict=True):
            option, given, value = word.partition("=")
            if option in CONFIGURATION and not (path := here / (value if given else following)).is_file():
                name = unknown_name("file", path.name, [near.name for near in path.parent.glob("*.yaml")])
                raise ConfigError(f"{option} {path}: {name}")


@dataclass(frozen=True)
class Task:
    """One element of an array: the name of its folder, and the whole command."""

    name: str
    words: tuple[str, ...]


def tasks_of(command: Command, methods: Sequence[str], seeds: Sequence[int], vary: Sequence[str], configs: Path) -> list[Task]:
    """Every combination; one task without a name when nothing varies.

    Args:
        command: what all tasks share.
        methods: names of ``configs/methods/NAME.yaml``, or paths of YAML files; they come first, so that the command's own lie over them.
        seeds: of everything random.
        vary: ``KEY=VALUE,VALUE ...``, any option of the command.
        configs: the folder that holds ``methods``.

    Raises:
        ConfigError: a method without a file, methods for a measurement, or a ``vary`` that is none.
    """
    if methods and not command.trains:
        raise ConfigError("--methods is for fit; an evaluation varies by --vary, such as --vary weights=a.ckpt,b.ckpt.")
    axes: list[list[Choice]] = []
    if methods:
        axes.append([(name_of(method), ("-c", method_file(method, configs)), ()) for method in methods])
    if seeds:
        axes.append([(f"seed{seed}", (), seed_words(command, seed)) for seed in seeds])
    for key, values in map(axis, vary):
        axes.append([(f"{key.rpartition('.')[2]}{clean(value)}", (), (f"--{key}={value}",)) for value in values])
    tasks = []
    for chosen in product(*axes):
        first = [word for _, before, _ in chosen for word in before]
        last = [word for _, _, after in chosen for word in after]
        tasks.append(Task("_".join(name for name, _, _ in chosen), (command.words[0], *first, *command.words[1:], *last)))
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two tasks would share a folder: {', '.join(twice)}. Give each value once.")
    return tasks


def axis(text: str) -> tuple[str, list[str]]:
    """``KEY=A,B`` as key and values.

    Raises:
        ConfigError: it is none.
    """
    key, _, values = text.partition("=")
    found = [value for value in values.split(",") if value]
    if not key or not found:
        raise ConfigError(f"--vary {text}: write KEY=VALUE,VALUE with any option of the command, such as seed_everything=0,1.")
    return key.lstrip("-"), found


def seed_words(command: Command, seed: int) -> tuple[str, ...]:
    """The options that make everything random another."""
    return tuple(f"{option}={seed}" for option in SEED_OPTIONS) if command.trains else (f"--seed={seed}",)


def method_file(method: str, configs: Path) -> str:
    """The YAML of a method.

    Raises:
        ConfigError: there is none.
    """
    path = Path(method) if method.endswith(".yaml") else configs / "methods" / f"{method}.yaml"
    if not path.is_file():
        raise ConfigError(unknown_name("method", method, [p.stem for p in (configs / "methods").glob("*.yaml")]))
    return str(path.resolve())


def name_of(method: str) -> str:
    """The name of a method in folders."""
    return clean(Path(method).stem if method.endswith(".yaml") else method)


def clean(value: str) -> str:
    """A value as part of a folder's name, which is also its name in tables: ``4/255`` is ``4_255``."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", value).strip("_")
