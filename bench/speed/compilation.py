"""Eager against compiled, in a process of its own: compilation takes minutes, and can hang or end its process.

Run as a program it is that process: ``python -m bench.speed.compilation FILE DEVICE THREADS QUICK`` writes to FILE what it found.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from aft.clip.matmul import products, torchs_products
from bench.runs import to_the_end
from bench.speed.row import Effort, Found, NotHere
from bench.speed.setting import MINI
from bench.speed.tricks import attack_pass, tower_of, without_over_with

LIMIT = 900  # seconds, compilation and passes
BACKEND = "inductor"


def measured(effort: Effort) -> Found:
    """Eager against ``torch.compile`` in the pass of an attack; ``compile_seconds`` is what the first pass took longer.

    Both by torch's products: compiled code calls ``mm.out`` and ``addmm.out``, which :mod:`aft.clip.matmul` does not replace.

    Raises:
        NotHere: nothing can be compiled here.
    """
    with torchs_products():
        eager, side = tower_of(MINI, effort)
        fast = copy.deepcopy(eager)
        fast.compile(backend=BACKEND, dynamic=False)
        images_BCHW = torch.rand(64, 3, side, side, device=effort.on)
        began = time.perf_counter()
        try:
            attack_pass(fast, images_BCHW)
        except Exception as error:  # no C++ compiler, no Triton: torch raises many kinds
            raise NotHere(f"torch.compile does not work here ({type(error).__name__})") from error
        if effort.device == "cuda":
            torch.cuda.synchronize()
        first = time.perf_counter() - began
        passes = (lambda: attack_pass(eager, images_BCHW)), (lambda: attack_pass(fast, images_BCHW))
        found = without_over_with(*passes, effort, 20, {"model": MINI.name, "batch_size": 64, "products": products()})
    return Found(found.values, found.parts, {**found.told, "compile_seconds": first - found.parts["with"][-1]})


def compiled(effort: Effort) -> Found:
    """The row: another process measures, with an empty cache, and is ended with its compilers after a time.

    Raises:
        NotHere: it took too long, or nothing can be compiled here.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        settings = (str(file), effort.device, str(torch.get_num_threads()), str(int(effort.quick)))
        try:
            to_the_end([sys.executable, "-m", "bench.speed.compilation", *settings], LIMIT,
                       {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "cache")})  # fmt: skip
        except TimeoutError as error:
            raise NotHere(f"compilation took more than {LIMIT / 60:g} minutes") from error
        told = json.loads(file.read_text(encoding="utf-8"))
    if "not_here" in told:
        raise NotHere(told["not_here"])
    return Found(**told)


def main(file: str, device: str, threads: str, quick: str) -> None:
    """Measures and writes."""
    torch.set_num_threads(int(threads))
    try:
        told = asdict(measured(Effort(quick == "1", device)))
    except NotHere as error:
        told = {"not_here": str(error)}
    Path(file).write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
