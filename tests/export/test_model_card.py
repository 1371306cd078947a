"""README.md of an export: figures of these very weights with their verdicts, what is not known said as such, lines that load it."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from aft import cards
from aft.clip import ZeroShotModel
from aft.clip.files import file_hash
from aft.errors import DataError
from aft.export import FORMATS, Provenance, cards_below, export
from aft.export.model_card import model_card

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "results" / "cards" / "tecoa_mini" / "tecoa_seed0"


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """A real card, at 2/255."""
    (path,) = MEASURED.glob("cifar10-*-linf-2-*.json")
    return cards.read(path)


def put(folder: Path, name: str, card: dict[str, Any], **model: Any) -> None:
    """A card of other weights."""
    changed = copy.deepcopy(card)
    changed["model"] |= model
    changed["cell"] = name.ljust(16, "0")
    cards.write(folder / f"{name}.json", changed)


def test_figures_stand_with_n_error_radius_and_verdict(model: ZeroShotModel, measured: dict[str, Any], tmp_path: Path) -> None:
    """As on the card, and the card itself lies in the folder."""
    put(tmp_path / "cards", "a", measured, sha256=model.record.sha256)
    export(model, "open_clip", tmp_path / "out", cards=cards_below(tmp_path / "cards", model))
    text = (tmp_path / "out" / "README.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| cifar10/test all"))
    shares = [(100 * measured[f"{what}_accuracy"], 100 * measured["standard_error"][what]) for what in ("clean", "robust")]
    clean, robust = (f"{share:.2f} ± {error:.2f}" for share, error in shares)
    cells = ["cifar10/test all", "500", "linf 2/255, native 32 px", "apgd", clean, robust, "reliable"]
    assert row == "| " + " | ".join(cells) + " |" and "Chance: cifar10 all 10.0 %" in text
    (inside,) = (tmp_path / "out" / "cards").glob("*.json")
    assert cards.read(inside)["robust_accuracy"] == measured["robust_accuracy"]


def test_the_lower_external_figure_and_failed_checks_are_shown(model: ZeroShotModel, measured: dict[str, Any], tmp_path: Path) -> None:
    """What others broke counts here as in the tables."""
    told = cards.with_external(copy.deepcopy(measured), 0.05, "somebody")
    told["verdict"] = {"status": "suspect", "failed_checks": ["E5"]}
    put(tmp_path, "a", told, sha256=model.record.sha256)
    text = model_card(model, "hf", FORMATS["hf"], head(), False, cards_below(tmp_path, model), Provenance(), {})
    assert "| 5.00 ± " in text and "| suspect E5 |" in text


def head() -> Any:
    """No classes."""
    from aft.export import Head

    return Head()


def test_figures_of_other_weights_are_refused(model: ZeroShotModel, measured: dict[str, Any], tmp_path: Path) -> None:
    """Of another file, or of the same one behind a defence."""
    put(tmp_path, "a", measured)
    with pytest.raises(DataError, match=f"are of these weights .*they are of {measured['model']['sha256'][:12]}"):
        cards_below(tmp_path, model)
    behind = copy.deepcopy(measured)
    behind["defense"] = dict.fromkeys(cards.BLOCKS["defense"]) | {"name": "low_pass", "settings": {}}
    put(tmp_path, "b", behind, sha256=model.record.sha256)
    with pytest.raises(DataError, match="Measure them with eval.py"):
        cards_below(tmp_path, model)
    (tmp_path / "table.json").write_text('{"rows": []}')  # no card, and passed over
    with pytest.raises(DataError, match="Measure them with eval.py"):
        cards_below(tmp_path, model)
    (tmp_path / "half").mkdir()
    put(tmp_path / "half", "c", {**measured, "status": "partial"}, sha256=model.record.sha256)
    with pytest.raises(DataError, match="not all of its images are measured"):
        cards_below(tmp_path / "half", model)
    with pytest.raises(DataError, match="no cards lie below .*empty"):
        cards_below(tmp_path / "empty", model)


def test_a_merged_model_shows_its_curve(model: ZeroShotModel, measured: dict[str, Any], tmp_path: Path) -> None:
    """Its own figures first; then the points between the same ends, not those of other bases."""
    model.record = replace(model.record, method="merge(0.5*aaaaaaaa)", base_sha256="b" * 64)
    put(tmp_path, "own", measured, sha256=model.record.sha256, base_sha256="b" * 64, method=model.record.method)
    put(tmp_path, "start", measured, sha256="b" * 64, base_sha256=None, method="none")
    put(tmp_path, "other", measured, sha256="c" * 64, base_sha256="b" * 64, method="merge(0.25*aaaaaaaa)")
    put(tmp_path, "far", measured, sha256="d" * 64, base_sha256="e" * 64, method="fare")
    found = cards_below(tmp_path, model)
    text = model_card(model, "hf", FORMATS["hf"], head(), False, found, Provenance(), {})
    own, curve = text.split("On the way between")
    assert "the base, and the factors times" in own and "| eps in training | of a sum: those of its parts |" in curve
    assert len(found) == 3 and own.count("| cifar10/test") == 1 and curve.count("| cifar10/test") == 3
    assert all(f"`{name}`" in curve for name in ("merge(0.5*aaaaaaaa)", "merge(0.25*aaaaaaaa)", "none")) and "dddddddd" not in text


def test_front_matter_hashes_and_what_is_missing(model: ZeroShotModel, tmp_path: Path) -> None:
    """A hub reads the front matter; every file but the card itself has its hash; nobody's licence is guessed."""
    export(model, "hf", tmp_path / "a")
    export(model, "open_clip", tmp_path / "b", told=Provenance("A name", "apache-2.0", "Trained on squares (public domain)."))
    bare, told = ((tmp_path / name / "README.md").read_text() for name in "ab")
    front = [yaml.safe_load(text.split("---")[1]) for text in (bare, told)]
    assert front[0] == {"license": "other", "license_name": "not-stated", "library_name": "transformers",
                        "tags": ["clip", "adversarial-robustness"], "pipeline_tag": "zero-shot-image-classification"}  # fmt: skip
    assert front[1]["license"] == "apache-2.0" and "# A name\n" in told and "Trained on squares" in told and "not stated" not in told
    assert bare.count("not stated") == 1 and bare.count("not known") == 1 and "nothing is claimed of its accuracy or its robustness" in bare
    hashes = dict(re.findall(r"\| `(\S+)` \| `([0-9a-f]{64})` \|", bare))
    files = {path.name for path in (tmp_path / "a").iterdir()} - {"README.md"}
    assert set(hashes) == files and all(file_hash(tmp_path / "a" / name) == sha for name, sha in hashes.items())
    inside = json.loads((tmp_path / "a" / "export.json").read_text())["files"]
    assert set(inside) == files - {"export.json"}


@pytest.mark.parametrize("kind", ["open_clip", "hf", "llava_tower", "torch_export"])
def test_the_lines_on_the_card_load_it(kind: str, model: ZeroShotModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, in the folder."""
    export(model, kind, tmp_path / "out")
    (block,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), flags=re.S)
    monkeypatch.chdir(tmp_path / "out")
    made: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), made)
    assert {"model", "tower", "image"} & set(made)
