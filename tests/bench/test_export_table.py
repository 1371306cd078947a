"""bench.export_table: what it measures holds, its page shows every cell, and the table in git is whole and within its tolerances."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aft.errors import ConfigError
from aft.export import FORMATS
from bench import export_table as bench
from tests.export.foreign import TOLERANCES
from tests.export.models import CONFIGS, HELD
from tests.methods.recipes import RECIPES

LAYOUTS = [kind for kind in FORMATS if not FORMATS[kind].graph]


def row_of(tower: str, what: str) -> bench.Row:
    """The one of this name."""
    (found,) = (row for row in bench.rows() if (row.tower, row.what) == (tower, what))
    return found


def test_a_part_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal by what there is to compare, or refused in short words; what is there is not measured again, and is shown with the rest."""
    bench.main(["--only", "tima", "--formats", *LAYOUTS, "--out", str(tmp_path)])
    told = json.loads((tmp_path / "table.json").read_text())["rows"]["openai_vit: tima"]
    assert told["hf"] == {"refused": "has text_transform residual, not linear: transformers' CLIPModel cannot hold it"}
    assert max(told["llava_tower"]["differences"].values()) <= 1e-5 and told["llava_tower"]["differences"].keys() == {"image", "features"}
    assert "| `tima` | a | a | a |" in capsys.readouterr().out
    bench.main(["--only", "tima", "--formats", "hf", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "table.json").read_text())["rows"]["openai_vit: tima"] == told
    assert "* **a** has text_transform residual, not linear: the layout cannot hold it" in (tmp_path / "README.md").read_text()


def test_a_method_that_leaves_weights_alone_has_the_plain_graph() -> None:
    """What has prompts, transforms texts or defends has not."""
    assert bench.measure(row_of("openai_vit", "fare"), ["onnx"]) == {"onnx": {bench.AS_PLAIN: True}}
    for what in ("behind noise", "tecoa, trainable prompts"):
        assert bench.AS_PLAIN not in bench.measure(row_of("openai_vit", what), ["open_clip"])["open_clip"]
    refused = bench.measure(row_of("openai_vit", "behind noise"), ["torch_export"])["torch_export"]["refused"]
    assert refused.startswith("the pixels stage is random: a graph has no counted noise")


def test_a_difference_beyond_its_tolerance_ends_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is not a number."""
    for value in (1.1e-5, float("nan")):
        monkeypatch.setattr(bench, "measure", lambda row, kinds, value=value: {kind: {"differences": {"image": value}} for kind in kinds})
        with pytest.raises(SystemExit, match="beyond the tolerance:\nvit: plain as hf"):
            bench.main(["--only", "vit", "--formats", "hf", "--out", str(tmp_path / str(value))])


def test_other_libraries_begin_anew(tmp_path: Path) -> None:
    """A number belongs to the versions that it was measured with."""
    (tmp_path / "table.json").write_text(json.dumps({"versions": {"torch": "1"}, "rows": {"vit: plain": {}}}))
    assert bench.kept(tmp_path, {"torch": "1"}) == {"vit: plain": {}} and not bench.kept(tmp_path, {"torch": "2"})


def test_a_wrong_name_lists_near_ones(tmp_path: Path) -> None:
    """Before anything is measured."""
    with pytest.raises(ConfigError, match="unknown tower or method 'convnet': did you mean 'convnext'"):
        bench.main(["--only", "convnet", "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


@pytest.fixture
def stored() -> dict[str, Any]:
    """What is in git."""
    told: dict[str, Any] = json.loads((bench.RESULTS / "table.json").read_text())
    return told


def test_the_table_in_git_is_whole(stored: dict[str, Any]) -> None:
    """Every tower, method and format; within the tolerances; the page is what the cells say."""
    found = stored["rows"]
    assert list(found) == [bench.key(row) for row in bench.rows()] and set(TOLERANCES) == set(FORMATS)
    assert all(set(cells) == set(FORMATS) for cells in found.values()) and not bench.beyond(found)
    assert {name.split(": ")[1] for name in found} >= {*RECIPES, "visual prompts"}
    assert (bench.RESULTS / "README.md").read_text() == bench.page(found, stored["versions"])


def test_the_table_in_git_says_what_layouts_hold(stored: dict[str, Any]) -> None:
    """The same towers as ``HELD``, on which the tests of each layout rest; graphs hold all."""
    plain = {tower: stored["rows"][f"{tower}: plain"] for tower in CONFIGS}
    for kind in FORMATS:
        assert {tower for tower, cells in plain.items() if "differences" in cells[kind]} == HELD.get(kind, set(CONFIGS))
    prompted = [stored["rows"][f"{tower}: visual prompts"] for tower in bench.PROMPTED]
    assert all(("differences" in cells[kind]) == FORMATS[kind].graph for cells in prompted for kind in FORMATS)
