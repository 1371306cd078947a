"""An evaluation that is killed again and again, or shared, or cut into other batches, ends with the cards of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aft import cards
from aft.batch import EvaluationSet
from aft.evaluation import Cell, Place, evaluate, plan
from aft.evaluation.runner import card_path

ROOT = Path(__file__).resolve().parents[2]
KILLS = 10 if os.environ.get("AFT_STRESS") else 3
HAPPENED = ("created", "command", "cost", "dirty")


def start(out: Path) -> subprocess.Popen[bytes]:
    """PGD and APGD on forty images of the sample, in parts of four."""
    words = ["--data", "datamodules.Sample", "--models", "{m: {name: miniclip32}}", "--protocols", "[clean, pgd, apgd]", "--eps", "[1/255]",
             "--n", "40", "--steps", "6", "--batch_size", "4", "--threads", "1", "--out", str(out)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, str(ROOT / "eval.py"), *words], env=environment, stdout=subprocess.DEVNULL)


def found_in(out: Path) -> dict[str, Any]:
    """All cards, without what only happened to them, and the verdicts beside them."""
    every = {}
    for path in sorted((out / "cards").rglob("*.json")):
        card = {key: value for key, value in json.loads(path.read_text()).items() if key not in HAPPENED}
        table = cards.read_arrays(path.with_suffix(".npz"))
        every[path.name] = (card, {name: table[name].tolist() for name in sorted(table)})
    return every


@pytest.mark.timeout(600)
def test_killed_at_random_moments_it_ends_with_the_same_cards(tmp_path: Path) -> None:
    """kill -9 once some more parts are there than when it started, at a random moment after."""
    assert start(tmp_path / "whole").wait(300) == 0
    dice, landed = random.Random(0), 0
    for _ in range(KILLS):
        process = start(tmp_path / "killed")
        held = len(list((tmp_path / "killed").rglob("*.npz")))
        while process.poll() is None and len(list((tmp_path / "killed").rglob("*.npz"))) <= held:
            time.sleep(0.01)
        time.sleep(0.3 * dice.random())
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            landed += 1
        process.wait()
    assert start(tmp_path / "killed").wait(300) == 0
    assert landed >= 2, "too few kills met a running evaluation"
    assert found_in(tmp_path / "killed") == found_in(tmp_path / "whole") and len(found_in(tmp_path / "whole")) == 3


def table_of(cell: Cell, out: Path, batch_size: int, world: int) -> dict[str, np.ndarray]:
    """The verdicts, made by so many processes in turn."""
    for rank in range(world):
        evaluate(cell, out, batch_size=batch_size, place=Place(rank, world))
    return cards.read_arrays(card_path(out, "model", cell).with_suffix(".npz"))


@pytest.mark.parametrize("precise", [True, False])
def test_batches_and_processes_change_no_verdict(make: Any, tmp_path: Path, precise: bool) -> None:
    """Batches of 1, 7 and 64 by one, two and three processes: identical in float64; in fp32 at most 0.5 % differ."""
    make_model, make_data = make
    model, data = make_model(), make_data(make_model(), n=200)
    if precise:
        model, data = model.double(), EvaluationSet(**{**vars(data), "images": data.images.double()})
    cell = Cell(model, replace(data), plan("apgd", eps=0.02, steps=5, targets=2, classes=5))
    reference = table_of(cell, tmp_path / "reference", 200, 1)
    assert 0.1 < reference["right"][:, -1].mean() < 0.65
    for batch_size in (1, 7, 64):
        for world in (1, 2, 3):
            table = table_of(cell, tmp_path / f"{batch_size}-{world}", batch_size, world)
            differ = int((table["right"] != reference["right"]).any(1).sum())
            print(f"batches of {batch_size} by {world} processes: {differ} of {len(table['row'])} verdicts differ")
            assert differ <= (0 if precise else 0.005 * len(table["row"]))
