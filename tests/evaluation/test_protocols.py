"""Laws of protocols: a name says exactly what runs, and no attack is planned that the number of classes does not allow."""

from __future__ import annotations

import pytest

from aft.errors import ConfigError
from aft.evaluation import plan
from aft.evaluation.protocols import PROTOCOLS


def names(protocol, classes, **budget):
    """Names of the attacks of a protocol."""
    settings = {"eps": "2/255", "steps": 20, "targets": 3, **budget}
    return [planned.name for planned in plan(protocol, classes=classes, **settings).attacks]


@pytest.mark.parametrize("classes, expected", [
    (2, ["apgd_ce"]), (3, ["apgd_ce", "apgd_margin"]), (4, ["apgd_ce", "apgd_t"]), (1000, ["apgd_ce", "apgd_t"]),
])  # fmt: skip
def test_apgd_follows_the_number_of_classes(classes, expected):
    """Targeted DLR from 4 classes on, the margin with 3; the names say so."""
    assert names("apgd", classes) == expected


def test_names_and_settings_are_exact():
    """pgd carries its steps; apgd its clipped targets; strict has its own settings, whatever is asked for."""
    assert names("clean", 10) == [] and names("pgd", 10) == ["pgd20"] and names("pgd", 10, steps=7) == ["pgd7"]
    assert plan("apgd", eps=0.1, steps=5, targets=9, classes=5).attacks[1].describe(8)["target"] == 4
    strict = [planned.describe(8) for planned in plan("strict", eps=0.1, steps=1, targets=1, classes=200).attacks]
    assert [(entry["steps"], entry["target"], entry["n"]) for entry in strict] == [(100, None, 8), (100, 9, 8), (1000, None, 2)]
    pgd = plan("pgd", eps="2/255", steps=20, targets=3, classes=10).attacks[0].describe(8)
    assert pgd["step_size"] == pytest.approx(2.5 * 2 / 255 / 20) and pgd["keep"] == "best"


@pytest.mark.parametrize("classes, expected, fidelity", [
    (2, ["aa_apgd_ce", "aa_fab_t", "aa_square"], "like"), (3, ["aa_apgd_ce", "aa_apgd_dlr", "aa_fab_t", "aa_square"], "like"),
    (9, ["aa_apgd_ce", "aa_apgd_t", "aa_fab_t", "aa_square"], "like"), (10, ["aa_apgd_ce", "aa_apgd_t", "aa_fab_t", "aa_square"], "exact"),
])  # fmt: skip
def test_autoattack_is_exact_from_ten_classes_on(classes, expected, fidelity):
    """Its nine targets need ten classes; below, the card says -like."""
    protocol = plan("autoattack_standard", eps="2/255", steps=1, targets=1, classes=classes)
    assert [planned.name for planned in protocol.attacks] == expected and protocol.fidelity == fidelity
    told = {planned.name: planned.attack.describe() for planned in protocol.attacks}
    assert told["aa_square"]["steps"] == 5000 and told["aa_fab_t"]["targets"] == min(9, classes - 1)
    assert names("four", classes) == [*names("apgd", classes), "fab_t", "square"]
    rand = plan("autoattack_rand", eps="2/255", steps=1, targets=1, classes=classes)
    assert {planned.attack.describe()["eot"] for planned in rand.attacks} == {20}


@pytest.mark.parametrize("settings, words", [
    ({"name": "apdg"}, "did you mean 'apgd'"), ({"eps": 4}, "write 4/255"), ({"eps": "x"}, "not a number"),
    ({"steps": 0}, "steps = 0"), ({"targets": 0}, "targets = 0"), ({"classes": 1}, "two classes"), ({"norm": "l3"}, "unknown norm"),
])  # fmt: skip
def test_a_plan_that_makes_no_sense_is_an_error(settings, words):
    """Each says what came and what to do."""
    with pytest.raises(ConfigError, match=words):
        plan(**{"name": "apgd", "eps": "2/255", "steps": 3, "targets": 3, "classes": 10, **settings})


def test_every_protocol_plans_the_radius_that_was_asked_for():
    """The threat model of the protocol is that of each of its attacks."""
    for name in PROTOCOLS:
        protocol = plan(name, eps="3/255", steps=2, targets=2, classes=6)
        assert all(p.attack.threat.radius == protocol.eps and p.attack.norm == protocol.norm for p in protocol.attacks)
