"""What a training step of each method holds, against plain fine-tuning: ``python -m bench.memory [--quick --out FILE]``.

Plain is the same step without an attack: cross-entropy of clean images to class texts. Per method, with and without
``callbacks.ActivationCheckpointing``:

* ``saved``: most bytes that autograd held for a backward pass at any time of the step, each storage once, weights and images left out
  (hooks on what is saved; what a recomputed block saves for a moment is not in it);
* ``allocated``: most bytes that torch's allocator gave out in the step above what was there before it (on a GPU
  ``max_memory_allocated``, on a CPU the allocations that the profiler sees); the gradients of the step before, which go on the way,
  make room;
* ``kept``: what is there when the step begins: weights, teacher, the optimiser's state, and gradients of the step before, which stay
  until the backward pass.

The second step of a real run is measured. Ratios are (kept + allocated) / plain's. Also: what 1,000 steps leave behind (``growth``).
Writes ``results/memory.json`` and the tables of ``docs/performance.md``.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.utils.data import DataLoader

import aft.methods as methods
from aft.attacks import PGD
from aft.batch import Batch
from aft.cards import write_whole
from aft.clip import ModelSpec
from aft.errors import ending_calmly
from aft.methods import AdversarialFineTuning, OptimizerSpec
from bench.growth import Growth
from bench.machine import machine, place_of, quiet
from bench.page import fenced, fill, table
from callbacks import ActivationCheckpointing, Throughput

ROOT = Path(__file__).resolve().parents[1]
OUT, PAGE = ROOT / "results" / "memory.json", ROOT / "docs" / "performance.md"
ALL = ("TeCoA", "SAFT", "FARE", "AGFT", "TIMA", "LAAT", "TRADES", "PMGAFT", "SimCLIP", "LORE", "TGAZSR", "AdvFLYP")
FEW = ("TeCoA", "FARE", "PMGAFT")
TOWERS = (("miniclip32", "miniclip32", 32, 64, ALL), ("ViT-B-32, random weights", "ViT-B-32", 224, 4, ALL))
STEPS = 2  # of the attack


class Saved:
    """Bytes that autograd holds between forward and backward; each storage once, however many operations saved it.

    Args:
        known: storages that are there anyway: weights, images.
    """

    def __init__(self, known: set[int]) -> None:
        self.known, self.now, self.most = known, 0, 0
        self.held: dict[int, int] = {}

    def pack(self, saved: Tensor) -> Any:
        """Counts a tensor that is saved; the object returned is freed together with the graph."""
        place = saved.untyped_storage().data_ptr()
        if place in self.known or not place:
            return saved
        size = saved.untyped_storage().nbytes()
        self.held[place] = self.held.get(place, 0) + 1
        if self.held[place] == 1:
            self.now += size
            self.most = max(self.most, self.now)
        kept = Kept(saved)
        weakref.finalize(kept, self.free, place, size)
        return kept

    def free(self, place: int, size: int) -> None:
        """One operation less that needs this storage."""
        self.held[place] -= 1
        if not self.held[place]:
            self.now -= size

    @staticmethod
    def unpack(kept: Any) -> Tensor:
        """The tensor for the backward pass."""
        return kept.value if isinstance(kept, Kept) else kept


class Kept:
    """A saved tensor, by an object whose end can be noticed."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


@contextmanager
def saving(known: set[int]) -> Iterator[Saved]:
    """Counts what is saved inside."""
    counter = Saved(known)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, counter.unpack):
        yield counter


class Allocated:
    """Most bytes given out by torch's allocator above what was there at ``start``."""

    def start(self, module: nn.Module) -> None:
        """From here. On a CPU the profiler sees no end of what it did not see begin: gradients, which a step frees, are copied under it."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.profiler.start()
        self.before = 0
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
                self.before += parameter.grad.nbytes

    def stop(self) -> int:
        """To here; the most bytes."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() - self.before
        self.profiler.stop()
        return highest(allocations(self.profiler.profiler.kineto_results.experimental_event_tree())) - self.before  # type: ignore[union-attr]


def highest(changes: Iterable[tuple[int, int, int]]) -> int:
    """Most bytes at once. A block whose beginning is not among the changes does not end: it may be one that an earlier profile saw begin
    at that place, of another size."""
    held: dict[int, int] = {}
    now = most = 0
    for _, place, size in sorted(changes):
        if size > 0:
            held[place] = size
            now += size
            most = max(most, now)
        else:
            now -= held.pop(place, 0)
    return most


def allocations(events: Sequence[Any]) -> Iterator[tuple[int, int, int]]:
    """Of a profile's tree of events: time, place, and bytes that were given out (above 0) or taken back."""
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from allocations(event.children)


class Measure(L.Callback):
    """Measures the second step in one of two ways, which disturb each other: ``saved`` by hooks, else allocations."""

    def __init__(self, saved: bool) -> None:
        self.by_hooks = saved
        self.found: dict[str, int] = {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Before the second step."""
        if batch_idx != 1:
            return
        gc.collect()
        if self.by_hooks:
            known = {p.untyped_storage().data_ptr() for p in pl_module.parameters()} | {batch.images.untyped_storage().data_ptr()}
            assert isinstance(pl_module, AdversarialFineTuning)
            if pl_module.teacher is not None:
                known |= {p.untyped_storage().data_ptr() for p in pl_module.teacher.parameters()}
            self.manager = saving(known)
            self.counter = self.manager.__enter__()
            return
        self.kept = kept_bytes(pl_module, trainer.optimizers[0])
        self.allocated = Allocated()
        self.allocated.start(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """After it."""
        if batch_idx != 1:
            return
        if self.by_hooks:
            self.manager.__exit__(None, None, None)
            self.found["saved"] = self.counter.most
            return
        self.found |= {"allocated": self.allocated.stop(), "kept": self.kept}


def kept_bytes(method: L.LightningModule, optimizer: torch.optim.Optimizer) -> int:
    """Weights, teacher, the optimiser's state, and gradients where there are some."""
    assert isinstance(method, AdversarialFineTuning)
    modules: list[nn.Module] = [method, *([] if method.teacher is None else [method.teacher])]
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    tensors += [t.grad for t in tensors if t.grad is not None]
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class InMemory(L.LightningDataModule):
    """A batch of random images, some classes, so many steps."""

    def __init__(self, batch_size: int, side: int, steps: int = 2, classes: int = 10) -> None:
        super().__init__()
        images = torch.rand(batch_size, 3, side, side, generator=torch.Generator().manual_seed(0))
        self.batches = [Batch(images, torch.arange(batch_size), torch.arange(batch_size) % classes)] * steps
        names = tuple(f"thing {place}" for place in range(classes))
        self.class_lists, self.val_class_lists, self.templates = {"train": names}, (), ("a photo of a {}.",)
        self.class_phrases = tuple((name, "thing") for name in names)

    def train_dataloader(self) -> DataLoader[Batch]:
        """The same batch again and again."""
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]


def make(name: str, spec: ModelSpec) -> AdversarialFineTuning:
    """A method with an attack of two steps; ``plain`` is none: cross-entropy on clean images."""
    optimizer = OptimizerSpec(lr=1e-6, schedule="constant")
    if name == "plain":
        return AdversarialFineTuning(spec, None, optimizer, terms={"alignment": {}})
    given: AdversarialFineTuning = getattr(methods, name)(spec, PGD(eps="4/255", step_size="2/255", steps=STEPS), optimizer)
    return given


def measured(name: str, spec: ModelSpec, side: int, batch: int, less: bool) -> dict[str, int | None]:
    """Bytes of one method; two short runs, one for each way of measuring."""
    found: dict[str, int | None] = {}
    for by_hooks in (True, False):
        measure = Measure(by_hooks)
        with tempfile.TemporaryDirectory() as folder:
            callbacks: list[L.Callback] = [*([ActivationCheckpointing()] if less else []), measure]
            trainer = L.Trainer(accelerator="auto", devices=1, max_steps=2, max_epochs=-1, logger=False, enable_checkpointing=False,
                                enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
                                use_distributed_sampler=False, callbacks=callbacks)  # fmt: skip
            trainer.fit(make(name, spec), datamodule=InMemory(batch, side))
        found |= measure.found
    return found


def growth(steps: int) -> dict[str, Any]:
    """What a step of TeCoA on MiniCLIP-32 leaves behind, from a fifth of the steps on."""
    seen = Growth(steps // 5)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(accelerator="auto", devices=1, max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
                            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
                            use_distributed_sampler=False, callbacks=[Throughput(), seen])  # fmt: skip
        trainer.fit(make("TeCoA", ModelSpec("miniclip32")), datamodule=InMemory(2, 32, steps))
    return {"per_step": seen.per_step, "census": [asdict(one) for one in seen.found]}


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints, writes; returns what it wrote."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three methods on the small tower: whether it runs, no figures; needs --out")
    parser.add_argument("--out", type=Path, help=f"where the figures go; the usual place, {OUT.name}, fills the page as well")
    given = parser.parse_args(args)
    out = place_of(given.out, OUT, given.quick)
    quiet()
    towers = [("miniclip32", "miniclip32", 32, 4, FEW)] if given.quick else TOWERS
    told: dict[str, Any] = {"machine": machine(), "quick": given.quick, "attack_steps": STEPS, "towers": {}}
    for title, name, side, batch, names in towers:
        spec = ModelSpec(name) if name == "miniclip32" else ModelSpec(name, "random")
        rows = {method: {key: measured(method, spec, side, batch, less) for key, less in (("held", False), ("recomputed", True))}
                for method in ("plain", *names)}  # fmt: skip
        told["towers"][title] = {"batch": batch, "side": side, "methods": rows}
    told["growth"] = growth(100 if given.quick else 1000)
    text = "\n\n".join(in_words(title, tower) for title, tower in told["towers"].items())
    left = ", ".join(f"{key} {value:.3g}" for key, value in told["growth"]["per_step"].items())
    text += f"\n\nleft behind by a step: {left}"
    write_whole(out, (json.dumps(told, indent=1) + "\n").encode())
    if out == OUT:
        fill(PAGE, "bench.memory", fenced(text))
    print(text, flush=True)
    return told


def in_words(title: str, tower: dict[str, Any]) -> str:
    """One table; MB, and ratios to plain fine-tuning."""
    plain = tower["methods"]["plain"]["held"]

    def total(one: dict[str, int]) -> int:
        """At the highest."""
        return one["kept"] + one["allocated"]

    rows = []
    for name, both in tower["methods"].items():
        for way, one in both.items():
            rows.append([f"{name}, {way}", *(f"{one[key] / 1e6:.1f}" for key in ("saved", "allocated", "kept")),
                         f"{one['saved'] / plain['saved']:.2f}", f"{total(one) / total(plain):.2f}"])  # fmt: skip
    head = [f"{title}, batch {tower['batch']}, MB", "saved", "allocated", "kept", "saved / plain", "all / plain"]
    return table(head, rows)


if __name__ == "__main__":
    with ending_calmly():
        main()
