"""Where the time of a training step and of an evaluation goes: ``python -m bench.profile`` (torch.profiler, CPU time).

TeCoA's steps 3 to 6 in Lightning's trainer, so that no set-up is in them: MiniCLIP-32, and ViT-B/32 with random weights at 224 px; and
an evaluation by gradient attacks. Each has two tables: operations by their own time, and how often a step asks the device for an answer
(each is a wait on a GPU). With the usual settings they go to ``docs/performance.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import lightning as L
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from aft.clip import ModelSpec
from aft.clip.matmul import products
from aft.errors import ending_calmly
from aft.methods import TeCoA
from bench.machine import processor, quiet
from bench.page import fenced, fill, table
from bench.speed.evaluation import cell_of, forwards, of_two_attacks, robust_model
from bench.speed.row import Effort
from bench.speed.setting import BASE, MINI, ROOT, MadeUp, trainer
from bench.speed.training import ADAMW, attack_of

PAGE = ROOT / "docs" / "performance.md"
#: Batches of a run that are looked at; those before allocate, choose algorithms and encode the class texts.
LOOKED_AT = range(2, 6)

#: Operations whose result the program waits for: a number out of a tensor, or a shape that depends on values. An index that is a mask
#: of booleans is one, too: its ``nonzero`` is made inside.
WAITS = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2"})
BY_INDEX = frozenset({"aten::index", "aten::index_put", "aten::index_put_"})


class Waits(TorchDispatchMode):
    """Counts the operations of :data:`WAITS` by name while it is open, and those of :data:`BY_INDEX` whose index is a mask.

    Copies from a GPU (``.cpu()``, ``.tolist()``) are waits that no CPU makes: they are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs it, and counts it where it is a wait."""
        name = function._schema.name
        if name in WAITS or (name in BY_INDEX and any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])):
            self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


class Inside(L.Callback):
    """Opens a context for the steps that are looked at.

    Args:
        context: entered before the first of them, left after the last.
    """

    def __init__(self, context: AbstractContextManager[Any]) -> None:
        self.context = context

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Before the first."""
        if batch_idx == LOOKED_AT.start:
            self.context.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the last."""
        if batch_idx == LOOKED_AT[-1]:
            self.context.__exit__(None, None, None)


#: Something to look at: does its work, the part that counts inside a context.
Work = Callable[[AbstractContextManager[Any]], None]


def steps_of(clip: ModelSpec, batch_size: int, attack_steps: int) -> Work:
    """Steps of TeCoA in Lightning's trainer."""
    def run(context: AbstractContextManager[Any]) -> None:
        """One fit."""
        method = TeCoA(clip, attack=attack_of(attack_steps), optimizer=ADAMW)
        data = MadeUp(batch_size, method.model.record.resolution)
        trainer(Effort(), LOOKED_AT.stop, [Inside(context)]).fit(method, datamodule=data)

    return run


def an_evaluation(images: int, steps: int) -> Work:
    """APGD-CE and APGD-T at 2/255, checks and verdicts included."""
    cell = of_two_attacks(cell_of(robust_model(), "four", 2 / 255, images), steps)

    def run(context: AbstractContextManager[Any]) -> None:
        """All images at once."""
        with context:
            spent, share = forwards(cell)
        print(f"{spent} forwards, robust share {share:.2f}", flush=True)

    return run


def looked_at(name: str, run: Work, rows: int, parts: int) -> str:
    """The operations with the largest own times, as shares of all, and the waits of a step.

    Args:
        name: of the work.
        run: it; twice, since counting disturbs the times.
        rows: operations to show.
        parts: steps in the work.
    """
    with_times, waits = profile(activities=[ProfilerActivity.CPU]), Waits()
    run(with_times)
    run(waits)
    averages = sorted(with_times.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in averages)
    shown = [[event.key[:50], f"{event.count / parts:g}", f"{100 * event.self_cpu_time_total / total:.1f} %"] for event in averages[:rows]]
    asked = ", ".join(f"{count / parts:g} {operation}" for operation, count in sorted(waits.counts.items())) or "none"
    return f"{table([name, 'calls', 'own time'], shown)}\nwaits: {asked}"


def main(words: Sequence[str] | None = None) -> None:
    """Looks at all, prints, and fills the page where the settings are the usual ones."""
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    parser.add_argument("--batch_size", type=int, default=64, help="of MiniCLIP-32; an eighth of it of ViT-B/32")
    parser.add_argument("--attack_steps", type=int, default=2)
    parser.add_argument("--images", type=int, default=32, help="of the evaluation")
    parser.add_argument("--steps", type=int, default=10, help="of the evaluation's attacks")
    parser.add_argument("--rows", type=int, default=10)
    asked = parser.parse_args(words)
    quiet()
    step, small, count = f"a step, {asked.attack_steps} attack steps", max(1, asked.batch_size // 8), len(LOOKED_AT)
    works = (
        (f"{step}, MiniCLIP-32, batch {asked.batch_size}", steps_of(MINI, asked.batch_size, asked.attack_steps), count),
        (f"{step}, ViT-B/32, batch {small}", steps_of(BASE, small, asked.attack_steps), count),
        (f"evaluation, {asked.images} images, {asked.steps} steps", an_evaluation(asked.images, asked.steps), 1),
    )
    place = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, fp32 products by {products()}"
    text = "\n\n".join([place, *(looked_at(name, run, asked.rows, parts) for name, run, parts in works)])
    if asked == parser.parse_args([]):
        fill(PAGE, "bench.profile", fenced(text))
    print(text, flush=True)


if __name__ == "__main__":
    with ending_calmly():
        main()
