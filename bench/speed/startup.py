"""From ``python train.py`` to the end of the first step, and what it is spent on; the share of a step that waits for data."""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L

from bench.runs import to_the_end
from bench.speed.row import Effort, Found

#: When this module is imported: by the command line's parser, so once train.py has imported all that it needs.
IMPORTED = time.time()
#: Seconds of a run.
LIMIT = 300
#: Stretches of a start, by the stamp that ends each.
STRETCHES = {
    "imported": "imports", "built": "parser, model and callbacks", "set_up": "data, class texts, trainer", "trains": "optimiser, loader",
    "first_batch": "first batch", "first_step": "first step",
}  # fmt: skip


#: A line of ``-X importtime``: own microseconds, with what it imports, and the module.
IMPORT = re.compile(r"import time:\s+(?P<own>\d+) \|\s+\d+ \|\s+(?P<module>\S+)")


class FirstStep(L.Callback):
    """Writes when each stretch of a start ended, seconds since the epoch, as JSON; ends the run after ``steps``.

    Args:
        file: to write to.
    """

    def __init__(self, file: str) -> None:
        self.file, self.stamps = Path(file), {"imported": IMPORTED}
        self.waits: list[float] = []
        self.steps: list[float] = []
        self.ended: float | None = None
        self.waited: float | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Everything is built; the datamodule's setup comes next."""
        self.stamps["built"] = time.time()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The data is there."""
        self.stamps["set_up"] = time.time()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The optimiser is there."""
        self.stamps["trains"] = time.time()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """A batch is there; what was waited for it, but for the first one of the run."""
        self.began = time.time()
        self.stamps.setdefault("first_batch", self.began)
        self.waited = None if self.ended is None else self.began - self.ended

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step is done; it is kept beside its wait."""
        self.ended = time.time()
        if self.waited is not None:
            self.waits.append(self.waited)
            self.steps.append(self.ended - self.began)
        self.stamps.setdefault("first_step", self.ended)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes."""
        told = {"stamps": self.stamps, "waits": self.waits, "steps": self.steps}
        self.file.write_text(json.dumps(told), encoding="utf-8")


def run(steps: int, folder: Path) -> dict[str, Any]:
    """``python train.py fit -c configs/quickstart.yaml`` for so many steps: its stamps, with ``started``, and its waits."""
    file = folder / f"stamps-{time.monotonic_ns()}.json"
    command = [sys.executable, "train.py", "fit", "-c", "configs/quickstart.yaml", "--trainer.max_steps", str(steps),
               "--trainer.limit_val_batches", "0", "--checkpoint.monitor", "null", "--trainer.default_root_dir", str(file.with_suffix("")),
               "--trainer.callbacks+=bench.speed.startup.FirstStep", "--trainer.callbacks.file", str(file)]  # fmt: skip
    started = time.time()
    to_the_end(command, LIMIT)
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    told["stamps"]["started"] = started
    return told


def start_up(effort: Effort) -> Found:
    """Seconds from the command to the end of the first step on MiniCLIP-32 and the embedded sample."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(1, Path(folder))["stamps"] for _ in range(effort.repeats(5) if not effort.quick else 1)]
    parts: dict[str, list[float]] = {name: [] for name in STRETCHES.values()}
    for stamps in runs:
        before = stamps["started"]
        for stamp, name in STRETCHES.items():
            parts[name].append(stamps[stamp] - before)
            before = stamps[stamp]
    told = {"command": "python train.py fit -c configs/quickstart.yaml", "imports": imports()}
    return Found([stamps["first_step"] - stamps["started"] for stamps in runs], parts, told)


def imports(most: int = 10) -> dict[str, float]:
    """Seconds that the modules of each package take when train.py is imported, without what they import; the dearest packages."""
    said = to_the_end([sys.executable, "-X", "importtime", "-c", "import train"], LIMIT)
    spent: dict[str, float] = {}
    for line in said.splitlines():
        if (found := IMPORT.match(line)) is not None:
            package = found["module"].partition(".")[0]
            spent[package] = spent.get(package, 0.0) + int(found["own"]) / 1e6
    return dict(sorted(spent.items(), key=lambda one: -one[1])[:most])


def data_wait(effort: Effort) -> Found:
    """Seconds of waiting for batches over all seconds of a run, on the embedded sample with crops and mirror images; one figure a run.

    A median over steps would leave out what comes seldom and lasts long.
    """
    steps, runs = (6, 2) if effort.quick else (40, 5)
    with tempfile.TemporaryDirectory() as folder:
        told = [run(steps, Path(folder)) for _ in range(runs)]
    waits, works = ([sum(one[key]) for one in told] for key in ("waits", "steps"))
    shares = [wait / (wait + work) for wait, work in zip(waits, works, strict=True)]
    return Found(shares, {"wait": waits, "step": works}, {"recipe": "configs/quickstart.yaml", "steps": steps})
