"""Our driver against the stock package: ``python -m bench.against_autoattack``.

APGD-CE, APGD-T, FAB-T and, on the first quarter of the images, Square, with AutoAttack's settings: once through ``pyautoattack``'s own
``AutoAttack`` class, once as the protocol ``four``. On one robust CLIP, at three radii, so at three shares of robust images. Forwards and
backwards of images through the tower are counted on both sides; robust accuracy must agree within one standard error.
What one image costs is counted on four that no attack can break (eps 1e-6) and four that the first step breaks (eps 0.5).
Resumable: each figure is kept in ``results/against_autoattack.json`` as soon as it is there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aft.attacks.autoattack import package
from aft.batch import EvaluationSet
from aft.cards import standard_error, write_whole
from aft.clip import ModelSpec, ZeroShotModel, load_model
from aft.errors import ending_calmly
from aft.evaluation import Cell, first, plan
from aft.evaluation.judge import Cost, Judge, scoring
from aft.evaluation.protocols import QUERIES, STEPS, TARGETS, Budget, four
from datamodules import ImageFolder

HERE = Path(__file__).resolve().parents[1]
OUT = HERE / "results" / "against_autoattack.json"
WEIGHTS = "results/weights/tecoa_seed0.safetensors"
RADII = (1, 2, 4)
IMAGES, WINDOWED, ALONE = 200, 50, 4
THREE = ("apgd-ce", "apgd-t", "fab-t")


def stock(model: ZeroShotModel, data: EvaluationSet, eps: float) -> Tensor:
    """Who is right after the package's own loop, bool ``[n]``: three attacks on all images, then Square on the first of them."""
    text_KD = model.text_bank(data.class_names, data.templates)
    module = package("autoattack")
    batch = data.batch(range(len(data)))
    assert batch.labels is not None
    runner = module.AutoAttack(lambda x: model(x, text_KD), norm="Linf", eps=eps, version="custom", attacks=list(THREE), seed=0)
    runner.apgd.n_restarts = runner.fab.n_restarts = runner.apgd_targeted.n_restarts = 1  # as its version "standard" sets them
    runner.apgd_targeted.n_target_classes = runner.fab.n_target_classes = TARGETS
    shown, _ = runner.run_standard_evaluation(batch.images, batch.labels, batch_size=100)
    right = (model(shown, text_KD).argmax(1) == batch.labels).detach()
    windowed = round(WINDOWED / IMAGES * len(data)) if len(data) > ALONE else len(data)
    runner.attacks_to_run = ["square"]
    runner.square.n_queries = QUERIES
    rows = right[:windowed].nonzero().flatten()
    if len(rows):
        shown, _ = runner.run_standard_evaluation(batch.images[rows], batch.labels[rows], batch_size=100)
        right[rows] = (model(shown, text_KD).argmax(1) == batch.labels[rows]).detach()
    return right


def ours(model: ZeroShotModel, data: EvaluationSet, eps: float) -> Tensor:
    """The same by our own attacks, bool ``[n]``."""
    attacks = list(four(Budget(eps, STEPS, TARGETS, len(data.class_names))))
    if len(data) > ALONE:
        attacks[-1] = replace(attacks[-1], share=WINDOWED / IMAGES)
    protocol = replace(plan("four", eps=eps, steps=STEPS, targets=TARGETS, classes=len(data.class_names)), attacks=tuple(attacks))
    judge = Judge(Cell(model, data, protocol))
    found = [judge(list(range(start, min(start + 100, len(data))))) for start in range(0, len(data), 100)]
    return torch.cat([torch.from_numpy(verdicts["right"][:, -1]) for verdicts, _ in found])


def measured(run: Callable[..., Tensor], model: ZeroShotModel, data: EvaluationSet, eps: float) -> dict[str, Any]:
    """Robust accuracy, who, and what it cost."""
    begin = time.perf_counter()
    with scoring(model), Cost(model.visual) as cost:
        right = run(model, data, eps)
    share, seconds = float(right.float().mean()), round(time.perf_counter() - begin, 1)
    return {
        "robust_accuracy": share, "standard_error": standard_error(share, len(data)), "forwards": cost.forwards,
        "backwards": cost.backwards, "seconds": seconds, "robust": right.nonzero().flatten().tolist(),
    }  # fmt: skip


def right_ones(model: ZeroShotModel, data: EvaluationSet) -> Tensor:
    """Rows that are right when clean."""
    batch = data.batch(range(len(data)))
    with torch.no_grad():
        answers = model(batch.images, model.text_bank(data.class_names, data.templates)).argmax(1)
    return (answers == data.labels_N).nonzero().flatten()


def main() -> None:
    """Measures what is missing, then prints the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    model = load_model(ModelSpec("miniclip32", WEIGHTS)).eval()
    whole = ImageFolder(name="cifar10", train="data/cifar10/train.zip", test="data/cifar10/test.zip").evaluation_set("test")
    data = first(whole, IMAGES)
    found: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {"threads": torch.get_num_threads(), "weights": WEIGHTS}
    one = data.take(right_ones(model, data)[:ALONE])
    work = [(f"one {what}", one, eps) for what, eps in (("robust image", 1e-6), ("image broken at once", 0.5))]
    work += [(f"{eps}/255", data, eps / 255) for eps in RADII]
    for name, images, eps in work:
        for side, run in (("stock", stock), ("ours", ours)):
            if side not in found.setdefault(name, {}):
                found[name][side] = measured(run, model, images, eps)
                write_whole(OUT, (json.dumps(found, indent=1) + "\n").encode())
                print(name, side, {key: value for key, value in found[name][side].items() if key != "robust"}, flush=True)


if __name__ == "__main__":
    with ending_calmly():
        main()
