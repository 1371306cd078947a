"""What ``bench.scaling`` runs on two processes: ``python -m bench.scaling_two FOLDER [--quick]``. Lightning starts the second one."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

import aft.methods as methods
from aft.attacks import PGD
from aft.batch import Batch
from aft.clip import ModelSpec
from aft.methods import AdversarialFineTuning, OptimizerSpec
from aft.methods.distributed import leave_process_group
from bench.machine import quiet

KINDS = ("synced", "unsynced", "alone")
CLASSES = 10
WIRED = ("TeCoA", "FARE", "PMGAFT", "LORE", "AdvFLYP")
SIZES = (2**12, 2**16, 2**20, 2**22, 2**23, 2**24)  # bytes of an all-reduce alone


def kind_at(batch_idx: int, kinds: tuple[str, ...] = KINDS) -> str:
    """The kind of a step: all of them in each turn, each turn beginning with another one.

    Example:
        >>> "".join(kind_at(step, ("a", "b", "c")) for step in range(9))
        'abcbcacab'
    """
    turn, place = divmod(batch_idx, len(kinds))
    return kinds[(turn + place) % len(kinds)]


class Turns(L.LightningDataModule):
    """For each kind of step in turn this process's images: half of the batch; alone, all of it on the first process, one on the other."""

    def __init__(self, batch: int, turns: int, kinds: tuple[str, ...] = KINDS) -> None:
        super().__init__()
        self.batch, self.turns, self.kinds = batch, turns, kinds
        names = tuple(f"thing {place}" for place in range(CLASSES))
        self.class_lists, self.val_class_lists, self.templates = {"train": names}, (), ("a photo of a {}.",)
        self.class_phrases = tuple((name, "thing") for name in names)

    def train_dataloader(self) -> DataLoader[Batch]:
        """One batch of each kind, again and again, in the order of :func:`kind_at`."""
        assert self.trainer is not None
        rank = self.trainer.global_rank
        count = {kind: (self.batch if rank == 0 else 1) if kind == "alone" else self.batch // 2 for kind in self.kinds}
        images = torch.rand(self.batch, 3, 32, 32, generator=torch.Generator().manual_seed(rank))
        made = {kind: Batch(images[:n], torch.arange(n), torch.arange(n) % CLASSES) for kind, n in count.items()}
        steps = range(self.turns * len(self.kinds))
        return DataLoader([made[kind_at(step, self.kinds)] for step in steps], batch_size=None)  # type: ignore[arg-type]


class Timed(L.Callback):
    """Seconds of each kind of step, and of the backward pass of steps without an all-reduce; the first turn is left out."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "backward")}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        """All begin together; DDP's own switch, which ``no_sync`` turns, says whether this step sends gradients."""
        self.kind = kind_at(batch_idx)
        trainer.strategy.model.require_backward_grad_sync = self.kind == "synced"  # type: ignore[union-attr,assignment]
        dist.barrier()
        self.began = time.perf_counter()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """The backward pass begins."""
        self.turned = time.perf_counter()

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """It ends."""
        self.back = time.perf_counter() - self.turned

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """The step ends."""
        if batch_idx >= len(KINDS):
            self.seconds[self.kind].append(time.perf_counter() - self.began)
            if self.kind == "unsynced":
                self.seconds["backward"].append(self.back)


class Dispatched(TorchDispatchMode):
    """Bytes that this process brings into each kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Looks, and does what was asked."""
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1].strip("_").replace("_base", "")
            brought = args[0] if name in ("allreduce", "broadcast") else args[1] if len(args) > 1 else ()  # outputs come before inputs
            if name != "barrier":
                self.bytes[name] += sum(one.nbytes for one in tree_leaves(brought) if isinstance(one, Tensor))
        return func(*args, **(kwargs or {}))


class Wire(L.Callback):
    """Counts what the last step sends: buckets of gradients by a hook of DDP, every collective by the dispatcher."""

    def __init__(self) -> None:
        self.buckets: list[int] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The hook sees every bucket and sends it as DDP does."""
        def hook(group: Any, bucket: dist.GradBucket) -> Any:
            """One bucket."""
            self.buckets.append(bucket.buffer().nbytes)
            return allreduce_hook(group, bucket)

        hook.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}  # torch compares them with its own
        trainer.strategy.model.register_comm_hook(None, hook)  # type: ignore[union-attr,operator]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Only the last step counts: DDP arranges its buckets anew after the first."""
        self.buckets.clear()
        self.seen = Dispatched()
        self.seen.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """The step is done."""
        self.seen.__exit__(None, None, None)


def fit(name: str, attack_steps: int, data: Turns, callback: L.Callback) -> AdversarialFineTuning:
    """All turns of a method on two processes."""
    attack = PGD(eps="4/255", step_size="2/255", steps=attack_steps)
    method: AdversarialFineTuning = getattr(methods, name)(ModelSpec("miniclip32"), attack, OptimizerSpec(lr=1e-9, schedule="constant"))
    steps = data.turns * len(data.kinds)
    strategy = DDPStrategy(find_unused_parameters=False, broadcast_buffers=False, process_group_backend="gloo")
    L.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
              enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
              callbacks=[callback]).fit(method, datamodule=data)  # fmt: skip
    return method


def wired(name: str, batch: int) -> dict[str, Any]:
    """Bytes that a step of a method brings into collectives, and what is expected of it.

    A term that couples samples gathers its images' embeddings, what is true of them over all captions (both fp32), the captions'
    embeddings, and for each caption the classes that it is true of.
    """
    seen = Wire()
    method = fit(name, 1, Turns(batch, 2, ("synced",)), seen)
    gathers = 0
    if any(term.couples_batch for term in method.terms.values()):
        own = batch // 2
        gathers = 4 * own * (2 * method.model.width + batch + CLASSES)
    gradients = sum(p.numel() * p.element_size() for p in method.parameters() if p.requires_grad)
    return {"gradients": gradients, "buckets": list(seen.buckets), "gathers": gathers, "collectives": dict(seen.seen.bytes)}


def transfers(repeats: int) -> dict[str, list[float]]:
    """Seconds of all-reduces of several sizes, in turn."""
    places = {size: torch.ones(size // 4) for size in SIZES}
    found: dict[str, list[float]] = {str(size): [] for size in SIZES}
    for turn in range(repeats + 2):
        for size, place in places.items():
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(place)
            place.div_(2)
            if turn > 1:
                found[str(size)].append(time.perf_counter() - began)
    return found


def main() -> None:
    """Everything in one process group; each process writes what it found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    batch, turns, attacked = (8, 3, (1,)) if given.quick else (64, 22, (1, 2, 5, 10))
    found: dict[str, Any] = {"global_batch": batch, "steps": {}}
    for k in attacked:
        timed = Timed()
        fit("TeCoA", k, Turns(batch, turns), timed)
        found["steps"][k] = timed.seconds
    found["wire"] = {name: wired(name, batch) for name in (WIRED[::4] if given.quick else WIRED)}
    found["transfers"] = transfers(3 if given.quick else 20)
    (given.folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()


if __name__ == "__main__":
    try:
        main()
    finally:
        leave_process_group()
