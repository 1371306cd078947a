"""Where the time of a training step and of an evaluation goes: ``python -m bench.profile`` (torch.profiler, MiniCLIP-32).

Two tables: operations by their own time, and how often the step asks the device for an answer (each is a wait on a GPU).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from aft.methods import TeCoA
from bench.speed.evaluation import cell_of, forwards, gradient_attacks, robust_model
from bench.speed.row import Effort
from bench.speed.setting import MINI, MadeUp, trainer
from bench.speed.training import ADAMW, attack_of

#: Operations whose result the program waits for: a number out of a tensor, or a shape that depends on values.
WAITS = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2"})


class Waits(TorchDispatchMode):
    """Counts the operations of :data:`WAITS` by name while it is open, and with them every copy of a tensor into a list."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs it, and counts it where it is a wait."""
        name = function._schema.name
        if name in WAITS:
            self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def a_step(batch_size: int, attack_steps: int) -> Callable[[], None]:
    """Four steps of TeCoA in Lightning's trainer."""
    def run() -> None:
        """One fit."""
        method = TeCoA(MINI, attack=attack_of(attack_steps), optimizer=ADAMW)
        trainer(Effort(), 4, []).fit(method, datamodule=MadeUp(batch_size))

    return run


def an_evaluation(images: int, steps: int) -> Callable[[], None]:
    """APGD-CE and APGD-T at 2/255, checks and verdicts included."""
    cell = gradient_attacks(cell_of(robust_model(), "four", 2 / 255, images), steps)
    return lambda: print(f"{forwards(cell)} forwards, robust share")


def show(name: str, run: Callable[[], None], rows: int) -> None:
    """The operations with the largest own times, as shares of all."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    averages = recorded.key_averages()
    total = sum(event.self_cpu_time_total for event in averages)
    table = Table("operation", "calls", "own time", title=name)
    for event in sorted(averages, key=lambda event: -event.self_cpu_time_total)[:rows]:
        table.add_row(event.key[:50], str(event.count), f"{100 * event.self_cpu_time_total / total:.1f} %")
    Console(width=80).print(table)


def main() -> None:
    """Profiles both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--attack_steps", type=int, default=2)
    parser.add_argument("--images", type=int, default=32, help="of the evaluation")
    parser.add_argument("--steps", type=int, default=10, help="of the evaluation's attacks")
    parser.add_argument("--rows", type=int, default=14)
    asked = parser.parse_args()
    for name, run in {"four training steps": a_step(asked.batch_size, asked.attack_steps),
                      "evaluation": an_evaluation(asked.images, asked.steps)}.items():  # fmt: skip
        show(name, run, asked.rows)
        with Waits() as waits:
            run()
        print(f"waits: {waits.counts}")


if __name__ == "__main__":
    main()
