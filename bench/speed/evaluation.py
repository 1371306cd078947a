"""Forwards of an evaluation: on images that break, at a huge radius and at a usual one, and as a function of the share of robust images."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace
from typing import Any

import torch

from aft.clip import ModelSpec, ZeroShotModel, load_model
from aft.evaluation import Cell, first, plan
from aft.evaluation.judge import Cost, Judge, scoring
from aft.evaluation.protocols import STEPS, TARGETS
from bench.speed.row import Effort, Found, NotHere
from bench.speed.setting import ROOT
from datamodules import Sample

WEIGHTS = ROOT / "results" / "weights" / "tecoa_seed0.safetensors"
#: A radius at which the start breaks everything, one that is usual in the literature, and one at which nothing breaks.
AT_ONCE, USUAL, NEVER = 0.5, 4 / 255, 1e-6


def robust_model() -> ZeroShotModel:
    """A MiniCLIP-32 that was trained on adversarial images."""
    return load_model(ModelSpec("miniclip32", str(WEIGHTS))).eval()


def cell_of(model: ZeroShotModel, protocol: str, eps: float, images: int) -> Cell:
    """The first images of the sample's test set that are right when clean: so many, or fewer where not every tenth is right."""
    whole = first(Sample().evaluation_set("test"), 10 * images)
    batch = whole.batch(range(len(whole)))
    with torch.no_grad():
        right = model(batch.images, model.text_bank(whole.class_names, whole.templates)).argmax(1) == whole.labels_N
    data = whole.take(right.nonzero().flatten()[:images])
    return Cell(model, data, plan(protocol, eps=eps, steps=STEPS, targets=TARGETS, classes=len(data.class_names)))


def forwards(cell: Cell) -> tuple[int, float]:
    """Forwards of images through the tower, and the share of robust images."""
    with scoring(cell.model), Cost(cell.model.visual) as cost:
        verdicts, _ = Judge(cell)(range(len(cell.data)))
    return cost.forwards, float(verdicts["right"][:, -1].mean())


def broken_at_once(effort: Effort) -> Found:
    """Forwards an image under APGD-CE, APGD-T, FAB-T and Square where the first attack's first steps break it; AutoAttack's own beside."""
    images = 4 if effort.quick else 32
    cell = cell_of(robust_model(), "four", AT_ONCE, images)
    spent, share = forwards(cell)
    if share:
        raise AssertionError(f"{share:.2f} of the images are not broken at eps = {AT_ONCE}: the row measures something else.")
    there = len(cell.data)
    told = {"images": there, "protocol": "four", "eps": AT_ONCE}
    if importlib.util.find_spec("pyautoattack") is not None:
        told["autoattack"] = forwards(cell_of(cell.model, "autoattack_standard", AT_ONCE, images))[0] / there
    return Found([spent / there], {}, told)


def broken_usual(effort: Effort) -> Found:
    """Forwards of each image that APGD-CE breaks at a usual radius, under all four attacks; one image at a time.

    Raises:
        NotHere: it breaks none of them.
    """
    cell = cell_of(robust_model(), "four", USUAL, 8 if effort.quick else 32)
    alone = replace(cell, protocol=replace(cell.protocol, attacks=cell.protocol.attacks[:1]))
    values = []
    with scoring(cell.model):
        broken = (~torch.as_tensor(Judge(alone)(range(len(cell.data)))[0]["right"][:, 0])).nonzero().flatten().tolist()
        judge = Judge(cell)
        for row in broken:
            with Cost(cell.model.visual) as cost:
                judge([row])
            values.append(float(cost.forwards))
    if not values:
        raise NotHere(f"APGD-CE breaks none of {len(cell.data)} images at eps = {USUAL:.4f}")
    return Found(values, {}, {"images": len(cell.data), "broken": len(broken), "protocol": "four", "eps": USUAL})


def of_two_attacks(cell: Cell, steps: int) -> Cell:
    """The same cell with the protocol's first two attacks alone, and so many steps."""
    shorter = (replace(one, attack=replace(one.attack, steps=steps)) for one in cell.protocol.attacks[:2])  # type: ignore[type-var]
    return replace(cell, protocol=replace(cell.protocol, attacks=tuple(shorter)))


def ends(model: ZeroShotModel, protocol: str, images: int, quick: bool) -> tuple[float, float]:
    """Forwards an image where all break at once and where none does, of four attacks (quick: two, five steps): ours or AutoAttack's own."""
    cells = [cell_of(model, protocol, eps, images) for eps in (AT_ONCE, NEVER)]
    (early, none), (full, every) = (forwards(of_two_attacks(cell, 5) if quick else cell) for cell in cells)
    if (none, every) != (0.0, 1.0):
        raise AssertionError(f"robust shares of {none} and {every} where 0 and 1 are meant.")
    return early / len(cells[0].data), full / len(cells[1].data)


def by_share(effort: Effort) -> Found:
    """Forwards of ours over AutoAttack's own for a set whose robust share is a half; other shares beside.

    ``((1 - p) early + p full)`` of both, from the counted ends. The share is of images that are right when clean.
    """
    if importlib.util.find_spec("pyautoattack") is None:
        raise NotHere("package pyautoattack is not installed (extra eval)")
    model = robust_model()
    (early, full), (stock_early, stock_full) = (ends(model, name, 2, effort.quick) for name in ("four", "autoattack_standard"))
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    curve = {f"{p:g}": ((1 - p) * early + p * full) / ((1 - p) * stock_early + p * stock_full) for p in shares}
    told = {"by_robust_share": curve, "forwards": {"ours": [early, full], "autoattack": [stock_early, stock_full]}}
    return Found([curve["0.5"]], {}, told)


def along_shares(effort: Effort) -> Found:
    """Forwards an image under APGD-CE and APGD-T (20 steps, 3 targets) over the straight line between its two ends.

    Of images that are right when clean: another costs one forward. The ends are counted: none of them robust (all break at once), and every
    one robust. Between them lie radii of a robust model with other shares: an image that breaks late costs more than the line says, so
    1 is the least. ``curve`` has forwards and seconds an image, the latter once a round, all radii in turn; the first round is not kept.
    """
    images, radii, rounds = (4, (2,), 1) if effort.quick else (64, (0.5, 1, 2, 4), 3)
    model = robust_model()
    curve: dict[float, dict[str, Any]] = {}
    for turn in range(1 + rounds):
        for eps in (AT_ONCE, *(radius / 255 for radius in radii), NEVER):
            cell = replace(cell_of(model, "four", eps, images), protocol=plan("apgd", eps=eps, steps=20, targets=3, classes=10))
            began = time.perf_counter()
            spent, share = forwards(cell)
            seconds, there = time.perf_counter() - began, len(cell.data)
            one = curve.setdefault(eps, {"eps": eps, "robust_share": share, "forwards": spent / there, "images": there, "seconds": []})
            one["seconds"] += [seconds / there] if turn else []
    none, *_, every = curve.values()
    line = [none["forwards"] + one["robust_share"] * (every["forwards"] - none["forwards"]) for one in curve.values()]
    values = [one["forwards"] / straight for one, straight in zip(curve.values(), line, strict=True)][1:-1]
    told = {"attacks": "APGD-CE, APGD-T", "steps": 20, "targets": 3, "images": none["images"], "curve": [*curve.values()]}
    return Found(values, {}, told)
