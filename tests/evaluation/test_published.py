"""Protocols of the literature: what they plan, how they are printed, and that the ball lies where they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aft.clip import ModelSpec, load_model
from aft.evaluation import Cell, Classification, evaluate, plan
from aft.evaluation.protocols import PROTOCOLS
from aft.evaluation.published import FIELDS, PUBLISHED, printed
from aft.evaluation.report import show

TEN = tuple("abcdefghij")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_protocol_is_planned_whole_and_printed_as_like(name: str) -> None:
    """Each field has a mark; none is exact throughout, since names and samples are those of the data at hand."""
    told = PUBLISHED[name]
    assert tuple(told.marks) == FIELDS and set(told.marks.values()) <= {"exact", "described", "unknown"}
    protocol = plan(name, eps="9/255", steps=3, targets=2, classes=10)
    assert protocol.eps == told.eps and all(one.attack.threat.radius == told.eps for one in protocol.attacks)
    assert {one.describe(10)["steps"] for one in protocol.attacks} == {told.steps}
    assert printed({"name": protocol.name, "fidelity": protocol.fidelity}) == f"{name}-like"


def test_the_page_names_every_protocol() -> None:
    page = (Path(__file__).parents[2] / "docs" / "protocols.md").read_text()
    assert all(f"| `{name}` |" in page for name in (*PROTOCOLS, *PUBLISHED))


def test_steps_of_the_literature_are_whole_radii() -> None:
    """PGD hops by 1/255 and keeps its last iterate."""
    (tga,) = plan("tga_zsr", eps=0.1, steps=1, targets=1, classes=10).attacks
    assert tga.describe(1) | {"n": 0} == {"name": "pgd100_last", "loss": "ce", "steps": 100, "step_size": pytest.approx(1 / 255), "n": 0,
                                          "restarts": 1, "keep": "last", "eot": 1, "target": None}  # fmt: skip
    assert [one.name for one in plan("robustvlm", eps=0.1, steps=1, targets=1, classes=10).attacks] == ["apgd_ce", "apgd_t"]
    assert [one.name for one in plan("robustvlm", eps=0.1, steps=1, targets=1, classes=2).attacks] == ["apgd_ce"]


def test_the_ball_lies_in_the_pixels_of_the_model(data, make, tmp_path, capsys) -> None:
    """miniclip64 on 6 px images: 64 px are attacked, the change is inside the ball there, and card and table say so."""
    model = load_model(ModelSpec("miniclip64"))
    small = replace(data, images=data.images[:10], labels_N=data.labels_N[:10], index_N=data.index_N[:10])
    protocol = replace(plan("ttc", eps=0.1, steps=1, targets=1, classes=5))
    cell = Cell(model, small, protocol)
    assert cell.resolution == 64 and cell.threat == {"norm": "linf", "eps": 1 / 255, "space": "model", "resolution": 64}
    with torch.no_grad():
        shown = cell.in_space(small.images)
        assert shown.shape[-1] == 64 and 0 <= float(shown.min()) and float(shown.max()) <= 1
    card = evaluate(cell, tmp_path)
    assert card is not None and card["threat"]["space"] == "model" and "E1" not in card["verdict"]["failed_checks"]
    show([("model", card)])
    told = capsys.readouterr().out
    assert "ttc-like" in told and "model pixels at 64 px" in " ".join(told.split())


def test_another_scale_is_another_cell(model, data) -> None:
    """PMG-AFT's cosines without a scale: other losses, and another figure's identity."""
    protocol = plan("pmg_aft", eps=0.1, steps=1, targets=1, classes=5)
    cell, usual = Cell(model, data, protocol, task=Classification(protocol.scale)), Cell(model, data, replace(protocol, scale=None))
    assert cell.id != usual.id and protocol.scale == 1.0
    context = cell.task.prepare(model, data)
    with torch.no_grad():
        plain = cell.task.forward(model, data.images, context)
        scaled = usual.task.forward(model, data.images, context)
    assert torch.allclose(plain * float(model.logit_scale.detach()), scaled, rtol=1e-4, atol=1e-4) and float(plain.abs().max()) <= 1 + 1e-5
