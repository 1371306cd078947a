"""Which test-time defences a graph holds: those it holds say what the defended model says, the others are refused with the reason."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from aft.clip import ZeroShotModel
from aft.defenses import DEFENSES, defend
from aft.errors import ConfigError
from aft.export import export
from aft.export.__main__ import load as load_given
from aft.export.__main__ import main, parser
from tests.export.test_graphs import HEAD, assert_graph

Make = Callable[[str], ZeroShotModel]
HELD = ("low_pass", "clipure_cos_closed")


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in HELD for kind in ("onnx", "torch_export")])
def test_a_defence_goes_with_the_graph(name: str, kind: str, make: Make, tmp_path: Path) -> None:
    """Embedding and logits are the defended model's, not the plain one's; name and settings are in the metadata and on the card."""
    model = make("vit")
    defended = defend(model, name)
    export(defended, kind, tmp_path / "out", head=HEAD)
    said = assert_graph(defended, kind, tmp_path / "out", HEAD)
    assert json.loads(said["aft"])["defense"] == json.loads(json.dumps(defended.defense))
    assert f"behind the test-time defence `{name}`" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(AssertionError, match="not close"):
        assert_graph(model, kind, tmp_path / "out", HEAD)


def test_random_and_coupled_defences_are_refused(make: Make, tmp_path: Path) -> None:
    """Every defence that declares it, by what it declares."""
    model, found = make("vit"), set()
    for name in DEFENSES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                stages = defend(model, name).stages.declared.values()
            except ConfigError:  # it needs a prior of this model, or another size
                continue
            if any(stage.random or stage.batch_coupled for stage in stages):
                with pytest.raises(ConfigError, match="is random|depends on its neighbours"):
                    export(defend(model, name), "torch_export", tmp_path / "out")
                found.add(name)
    assert {"noise", "ttc", "clipure_cos_release"} <= found and not found & set(HELD) and not list(tmp_path.glob("*out*"))


def test_a_defence_that_takes_gradients_is_refused(make: Make, tmp_path: Path) -> None:
    """Anti-adversary is neither random nor coupled; tracing it would fail deep inside torch, or freeze one image's gradient."""
    with pytest.raises(ConfigError, match="anti_adversary takes gradients"):
        export(defend(make("vit"), "anti_adversary"), "torch_export", tmp_path / "out", head=HEAD)
    assert not list(tmp_path.glob("*out*"))


def test_the_command_takes_a_defence_and_its_settings(tmp_path: Path) -> None:
    """As a name and JSON; what is no JSON object is said before anything is read or written."""
    given = parser().parse_args(["tiny", "--format", "onnx", "--out", "x", "--defense", "low_pass", "--settings", '{"sigma": 1.5}'])
    assert load_given(given).defense == {"name": "low_pass", "settings": {"sigma": 1.5}}
    for text in ("sigma", "[1]"):
        with pytest.raises(ConfigError, match="write a JSON object"):
            main(["tiny", "--format", "torch_export", "--out", str(tmp_path / "x"), "--defense", "low_pass", "--settings", text])
    with pytest.raises(ConfigError, match="did you mean 'low_pass'"):
        main(["tiny", "--format", "torch_export", "--out", str(tmp_path / "x"), "--defense", "lowpass"])
