"""How many images a second a core of the loader makes, how long a step waits for them, and how many cores a GPU needs:
``python -m bench.loader [--quick --out FILE]``.

Through this project's datamodules, from files to a batch in the process that trains. JPEGs are made here (500 x 375 pixels, noise at all
scales as photographs have it; the bytes are in the result). ``decoder alone`` is Pillow on the same bytes: opened, decoded, resized.
Repeats of all cases are interleaved. Writes ``results/loader.json`` and the tables of ``docs/performance.md``.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import open_clip
import torch
from PIL import Image

from aft.attacks import PGD
from aft.batch import Batch
from aft.cards import write_whole
from aft.clip import ModelSpec
from aft.clip.cost import vit_cost
from aft.errors import ending_calmly
from aft.methods import OptimizerSpec, TeCoA
from bench.machine import interleaved, machine, place_of, quiet, spread
from bench.page import fenced, fill, table
from callbacks import Throughput
from datamodules import ImageFolder, Sample, Shards
from datamodules.common import ImageData
from datamodules.convert import convert
from datamodules.images import cover
from datamodules.order import TrainLoader
from datamodules.shard_writer import Recipe

ROOT = Path(__file__).resolve().parents[1]
OUT, PAGE = ROOT / "results" / "loader.json", ROOT / "docs" / "performance.md"
ORIGINAL, REDUCED, SMALL, HELD = "500 x 375 JPEG to 224 px", "reduced shards, 224 px", "shards, 32 px", "sample, held in memory, 32 px"
BATCH, SMALL_BATCH = 64, 128
ACHIEVED = 400e12  # FLOP/s of a GPU: an assumption, as in docs/cluster.md
NEEDS = (("ViT-B-32", 2), ("ViT-B-32", 10), ("ViT-B-16", 2), ("ViT-L-14", 2), ("ViT-L-14", 10))
AHEAD = 3  # batches that a worker holds ready, and the one under way
LOAD = (0.5, 1.0, 2.0)  # step times, in units of the time in which one core makes a batch
FADE = 0.62  # of the amplitude from one octave to the next finer one


@cache
def picture(seed: int, width: int = 500, height: int = 375) -> Image.Image:
    """Noise at all scales, each octave ``FADE`` of the coarser one."""
    noise = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for octave in range(1, 10):
        cells = (min(height, 2**octave), min(width, 2**octave))
        for channel in range(3):
            layer = Image.fromarray(noise.normal(size=cells).astype(np.float32))
            total[..., channel] += FADE**octave * np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(((total - total.mean()) / total.std() * 50 + 120).clip(0, 255).astype(np.uint8))


def write_pictures(folder: Path, count: int, side: int | None = None) -> Path:
    """JPEGs of two classes, reduced to a square of ``side`` pixels where that is given."""
    for number in range(count):
        place = folder / ("cat", "dog")[number % 2] / f"{number:04d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        made = picture(number % 32)  # the content of a file decides its cost; 32 of them are enough
        (made if side is None else cover(made, side)).save(place, "JPEG", quality=95)
    return folder


def cases(folder: Path, images: int) -> dict[str, Callable[[int], ImageData]]:
    """A datamodule of each kind, for a number of workers."""
    photos, small = write_pictures(folder / "photos" / "train", images), write_pictures(folder / "small" / "train", images, 32)
    per_shard = images // 8
    reduced = convert(str(photos), str(folder / "reduced"), Recipe(per_shard=per_shard, resize=224))[0]
    shards = convert(str(small), str(folder / "shards"), Recipe(per_shard=per_shard))[0]
    return {
        ORIGINAL: lambda workers: ImageFolder(str(photos), image_size=224, cache_bytes=0, batch_size=BATCH, num_workers=workers),
        REDUCED: lambda workers: Shards(str(reduced), image_size=224, batch_size=BATCH, window=BATCH, num_workers=workers),
        SMALL: lambda workers: Shards(str(shards), batch_size=SMALL_BATCH, window=SMALL_BATCH, num_workers=workers, augment="crop_flip"),
        HELD: lambda workers: Sample(batch_size=SMALL_BATCH, num_workers=workers, augment="crop_flip"),
    }  # fmt: skip


def endless(data: ImageData) -> Iterator[Batch]:
    """Batches as they come to the process that trains (bytes), epoch after epoch."""
    loader = data.train_dataloader()
    assert isinstance(loader, TrainLoader)
    loader.as_bytes = True
    for epoch in itertools.count():
        loader.order.set_epoch(epoch)
        yield from loader


def decoder_alone(data: ImageData, images: int) -> Callable[[], None]:
    """Pillow on the same files."""
    split = data.evaluation_set("train")
    source = split.images.source
    encoded = [source.read(place) for place in range(min(images, len(source)))]

    def run() -> None:
        """All of them once."""
        for one in encoded:
            with Image.open(io.BytesIO(one)) as image:
                picture = image.convert("RGB")
            if data.image_size is not None:
                cover(picture, data.image_size)

    run.bytes = statistics.mean(map(len, encoded))  # type: ignore[attr-defined]
    run.images = len(encoded)  # type: ignore[attr-defined]
    return run


def rates(kinds: dict[str, Callable[[int], ImageData]], repeats: int, batches: int) -> dict[str, dict[str, Any]]:
    """Images a second of one core by kind: ``alone`` (the decoder, CPU time), ``here`` (CPU time), ``worker`` (a process, wall time)."""
    here = {name: endless(make(0)) for name, make in kinds.items()}
    others = {name: endless(make(1)) for name, make in kinds.items()}
    alone = {name: decoder_alone(make(0), 4 * batches) for name, make in kinds.items() if name != HELD}
    drawn = {name: batches * (SMALL_BATCH if name in (SMALL, HELD) else BATCH) for name in kinds}

    def draw(stream: Iterator[Batch]) -> Callable[[], None]:
        """So many batches of a stream."""
        def run() -> None:
            """Drawn and let go."""
            for _ in range(batches):
                next(stream)

        return run

    cpu = interleaved({**{f"here {n}": draw(s) for n, s in here.items()}, **{f"alone {n}": run for n, run in alone.items()}},
                      repeats, time.process_time)  # fmt: skip
    wall: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(repeats + 1):
        for name, stream in others.items():
            for _ in range(AHEAD):  # made while others were timed
                next(stream)
            began = time.perf_counter()
            draw(stream)()
            if turn:
                wall[name].append(time.perf_counter() - began)
    found: dict[str, dict[str, Any]] = {}
    for name in kinds:
        here_rate, worker_rate = ([drawn[name] / s for s in seconds] for seconds in (cpu[f"here {name}"], wall[name]))
        found[name] = {"here": spread(here_rate), "worker": spread(worker_rate)}
        if name in alone:
            count = alone[name].images  # type: ignore[attr-defined]
            found[name] |= {"alone": spread([count / s for s in cpu[f"alone {name}"]]), "bytes": alone[name].bytes}  # type: ignore[attr-defined]
            found[name]["kept"] = spread([rate * b / count for rate, b in zip(here_rate, cpu[f"alone {name}"], strict=True)])
    return found


def waiting_at(make: Callable[[int], ImageData], rate: float, repeats: int, batches: int) -> list[dict[str, float]]:
    """Share of a step that waits, with one worker, at given step times (the step sleeps, as a process whose GPU works).

    What is to be expected is ``max(0, 1 - t r / B)`` with step time t, batch B and a worker's rate r.
    """
    stream = endless(make(1))
    found = []
    for load in LOAD:
        step, shares = load * BATCH / rate, []
        for turn in range(repeats + 1):  # the first one uses up what was made before
            began, waited = time.perf_counter(), 0.0
            for _ in range(max(batches, 2 * AHEAD)):
                asked = time.perf_counter()
                next(stream)
                waited += time.perf_counter() - asked
                time.sleep(step)
            if turn:
                shares.append(waited / (time.perf_counter() - began))
        found.append({"load": load, "step_seconds": step, "expected": max(0.0, 1 - load), **spread(shares)})
    return found


class Waits(L.Callback):
    """Collects what ``Throughput``, which comes before it, has logged."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """After an entry of the log."""
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.shares.append(float(trainer.callback_metrics["speed/data_wait"]))


def waiting_in_training(steps: int, folder: Path) -> dict[str, float]:
    """Share of the time that TeCoA (2 steps) on MiniCLIP-32 and the sample waits for batches, as a run logs it; without the first entry."""
    waits = Waits()
    attack = PGD(eps="2/255", step_size="2/255", steps=2)
    method = TeCoA(ModelSpec("miniclip32"), attack=attack, optimizer=OptimizerSpec(schedule="constant"))
    trainer = L.Trainer(accelerator="auto", devices=1, max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, log_every_n_steps=2,
                        default_root_dir=str(folder), callbacks=[Throughput(), waits])  # fmt: skip
    trainer.fit(method, datamodule=Sample(batch_size=SMALL_BATCH, augment="crop_flip"))
    return spread(waits.shares[1:])


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes in one thread inside, so that a core is a core; afterwards in as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def needed(model: str, attack_steps: int, achieved: float) -> float:
    """Images a second that a GPU of so many achieved FLOP/s trains by TeCoA."""
    config = open_clip.get_model_config(model)
    return achieved / vit_cost(config).fine_tuning_step(attack_steps)


def cores(found: dict[str, dict[str, Any]], achieved: float, given: float | None) -> list[dict[str, Any]]:
    """Cores a GPU needs, by a worker's measured rate; for a given number of images a second, or by the cost of the model."""
    rows = [("as given", None, given)] if given is not None else [(model, k, needed(model, k, achieved)) for model, k in NEEDS]
    return [{"model": model, "attack_steps": k, "images_per_second": rate,
             "cores": {name: math.ceil(rate / found[name]["worker"]["median"]) for name in (ORIGINAL, REDUCED)}}
            for model, k, rate in rows]  # fmt: skip


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints, writes; returns what it wrote."""
    parser = argparse.ArgumentParser(prog="python -m bench.loader", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few images: whether it runs, no figures; needs --out")
    parser.add_argument("--images-per-second", type=float, help="what your GPU trains; without it, by the models' cost")
    parser.add_argument("--achieved", type=float, default=ACHIEVED, help="FLOP/s that a GPU achieves, for that cost")
    parser.add_argument("--out", type=Path, help=f"where the figures go; the usual place, {OUT.name}, fills the page as well")
    given = parser.parse_args(args)
    for name in ("images_per_second", "achieved"):
        if getattr(given, name) is not None and not getattr(given, name) > 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(given, name):g}: give a number above 0.")
    out = place_of(given.out, OUT, given.quick)
    repeats, batches, images, steps = (2, 1, 256, 6) if given.quick else (9, 6, 1024, 42)
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        with one_thread():
            kinds = cases(Path(folder), images)
            found = rates(kinds, repeats, batches)
            at = {name: waiting_at(kinds[name], found[name]["worker"]["median"], repeats, batches) for name in (ORIGINAL, REDUCED)}
        told = {"machine": machine(), "quick": given.quick, "rates": found, "waiting_at_step_time": at,
                "waiting_in_training": waiting_in_training(steps, Path(folder)), "achieved_flops": given.achieved,
                "cores": cores(found, given.achieved, given.images_per_second)}  # fmt: skip
    write_whole(out, (json.dumps(told, indent=1) + "\n").encode())
    if out == OUT:
        fill(PAGE, "bench.loader", fenced(in_words(told)))
    print(in_words(told), flush=True)
    return told


def in_words(told: dict[str, Any]) -> str:
    """The tables."""
    def shown(one: dict[str, float] | None, digits: int = 0) -> str:
        """Median and quartiles."""
        return "-" if one is None else f"{one['median']:.{digits}f} ({one['quarter']:.{digits}f} to {one['three_quarters']:.{digits}f})"

    rows = [[name, f"{one['bytes'] / 1e3:.0f} kB" if "bytes" in one else "-", shown(one.get("alone")), shown(one["here"]),
             shown(one.get("kept"), 2), shown(one["worker"])] for name, one in told["rates"].items()]  # fmt: skip
    waits = [[f"{name}, step of {one['load']:g} x a core's batch", f"{one['expected']:.2f}", shown(one, 2)]
             for name, all_of_it in told["waiting_at_step_time"].items() for one in all_of_it]
    waits.append(["TeCoA, MiniCLIP-32, sample data", "-", shown(told["waiting_in_training"], 4)])
    needs = [[f"{one['model']}" + ("" if one["attack_steps"] is None else f", {one['attack_steps']} attack steps"),
              f"{one['images_per_second']:,.0f}", *map(str, one["cores"].values())] for one in told["cores"]]  # fmt: skip
    return "\n\n".join((
        table(["images/s of a core, median (middle half)", "file", "decoder alone", "loader", "loader / decoder", "a worker, wall"], rows),
        table(["share of the step spent waiting", "expected", "measured"], waits),
        table(["cores a GPU needs", "images/s", ORIGINAL, REDUCED], needs),
    ))  # fmt: skip


if __name__ == "__main__":
    with ending_calmly():
        main()
