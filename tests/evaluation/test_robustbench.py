"""Laws of what goes out and what comes in: RobustBench's form, and attacks from outside that lower a number."""

from __future__ import annotations

import io
import json

import pytest

from aft import cards
from aft.cards import lowered, with_external
from aft.errors import DataError
from aft.evaluation import Cell, evaluate, plan, report
from aft.evaluation.robustbench import entry, export


@pytest.fixture(scope="module")
def found(make, tmp_path_factory):
    """One model under PGD and APGD, and clean."""
    make_model, make_data = make
    model = make_model()
    folder, data = tmp_path_factory.mktemp("cards"), make_data(model)
    plans = [plan(name, eps="1/255", steps=2, targets=2, classes=5) for name in ("clean", "pgd", "apgd")]
    return [("tiny", evaluate(Cell(model, data, protocol), folder, "tiny")) for protocol in plans]


def test_an_entry_has_robustbench_s_fields(found, tmp_path):
    """In its order and form; AutoAttack's field stays away, since AutoAttack did not run."""
    path, = export(found, tmp_path)
    told = json.loads(path.read_text())
    assert path.relative_to(tmp_path).as_posix() == "toy/Linf/tiny-all-1_255.json"
    assert list(told) == ["link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps",
                          "clean_acc", "reported", "footnote", "unreliable"]  # fmt: skip
    apgd = found[2][1]
    assert told["clean_acc"] == "75.00" and told["eps"] == "1/255" and told["unreliable"] is True
    assert told["reported"] == f"{100 * min(card['robust_accuracy'] for _, card in found[1:]):.2f}"
    assert "apgd" in told["footnote"] and apgd["model"]["sha256"] in told["footnote"] and "n = 40" in told["footnote"]


def test_autoattack_has_its_field_under_its_exact_name_alone(found):
    """``-like`` does not."""
    card = found[2][1]
    exact, like = ({**card, "protocol": {"name": "autoattack_standard", "fidelity": fidelity}} for fidelity in ("exact", "like"))
    assert entry("x", [exact])["autoattack_acc"] == f"{100 * card['robust_accuracy']:.2f}"
    assert "autoattack_acc" not in entry("x", [like])
    reliable = {**exact, "verdict": {"status": "reliable", "failed_checks": []}}
    assert entry("x", [reliable])["unreliable"] is False and entry("x", [reliable, like])["unreliable"] is True


def test_an_attack_from_outside_lowers_what_is_shown(found, tmp_path):
    """Marked, with its source; the card's own number stays; the export has the field; the card survives a round."""
    told = with_external(found[2][1], 0.05, "Doe et al., transfer")
    cards.write(tmp_path / "a" / "c.json", told)
    read = cards.read(tmp_path / "a" / "c.json")
    assert read == told and read["robust_accuracy"] == found[2][1]["robust_accuracy"]
    shown, stream = lowered(read), io.StringIO()
    report.show([("tiny", shown)], stream, width=120)
    assert "5.0 ±3.4*" in stream.getvalue() and "* lowered by an attack from outside: Doe et al., transfer" in stream.getvalue()
    autoattack = {**read, "protocol": {"name": "autoattack_standard", "fidelity": "exact"}}
    given = entry("tiny", [autoattack])
    assert given["external"] == "5.00" and given["reported"] == given["autoattack_acc"] == f"{100 * found[2][1]['robust_accuracy']:.2f}"
    assert lowered(found[2][1]) is found[2][1]


@pytest.mark.parametrize("accuracy, source, words", [(0.99, "x", "does not lower"), (12, "x", "0.12, not 12"), (-0.1, "x", "give a share"),
                                                     (0.0, " ", "source is empty")])  # fmt: skip
def test_what_lowers_nothing_is_refused(found, accuracy, source, words):
    """Also percent for a share, and an attack by nobody."""
    with pytest.raises(DataError, match=words):
        with_external(found[2][1], accuracy, source)
    with pytest.raises(DataError, match="no robust accuracy"):
        with_external(found[0][1], 0.1, "x")
