"""What a figure was measured on, and how it was repeated: shared by all that is timed here. No host names, no paths."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from aft.errors import ConfigError
from aft.evaluation.origin import commit, now, versions

ALSO = ("torchvision", "lightning", "pillow", "webdataset")  # beside those that stand on every card


def hardware() -> dict[str, Any]:
    """Processor, system, cores and accelerator: what figures of one table must share."""
    return {
        "processor": processor(), "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """Hardware, threads, load, versions and commit, as a plain dictionary for a results file.

    ``load`` is how many processes wanted to run, mean of the last minute: above ``cores`` no wall-clock figure is to be trusted.
    """
    head, dirty = commit()
    return {
        **hardware(), "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": {**versions(), **{name: importlib.metadata.version(name) for name in ALSO}},
        "commit": head, "dirty": dirty, "created": now(),
    }  # fmt: skip


def quiet() -> None:
    """Only figures on the screen: none of the trainer's advice."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def processor() -> str:
    """The processor's name as the system gives it."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or "unknown")


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and number of repeats."""
    quarters = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "quarter": quarters[0], "three_quarters": quarters[2], "n": len(values)}


def interleaved(
    work: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter, warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of each piece of work, all of them in turn in each repeat, so that a slow minute falls on all alike.

    Args:
        work: what to time, by name.
        repeats: rounds that count.
        clock: ``time.perf_counter`` (wall) or ``time.process_time`` (CPU time of this process, all threads).
        warm: rounds before them that do not.
    """
    found: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(warm + repeats):
        for name, run in work.items():
            began = clock()
            run()
            if turn >= warm:
                found[name].append(clock() - began)
    return found


def ratios(above: list[float], below: list[float]) -> dict[str, float]:
    """Spread of ``above / below``, repeat by repeat."""
    return spread([one / other for one, other in zip(above, below, strict=True)])


def place_of(out: Path | None, usual: Path, quick: bool) -> Path:
    """Where figures go: as asked, or to the usual place.

    Raises:
        ConfigError: a trial would overwrite figures.
    """
    if quick and out is None:
        raise ConfigError(f"too little is measured for {usual.parent.name}/{usual.name}: give --out FILE.")
    return out or usual
