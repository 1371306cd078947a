"""A defence by its name: near matches, kinds, and a spec that a command line can fill."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from aft.clip import load_model
from aft.defenses import DEFENSES, Defended, DefenseSpec, defend, settings_of
from aft.errors import ConfigError


def test_the_ids_are_those_of_cards():
    """Fixed: cards of different times must agree."""
    assert set(DEFENSES) == {
        "noise", "clipure_cos_release", "clipure_cos_sane", "clipure_cos_closed", "clipure_diff", "aom", "ttc", "anti_adversary",
        "low_pass", "tte",
    }  # fmt: skip


@pytest.mark.parametrize("make, words", [
    (lambda model: defend(model, "tcc"), "did you mean 'ttc'"),
    (lambda model: defend(model, "aom", sigm=1), "setting of aom 'sigm': did you mean 'sigma'"),
    (lambda model: DefenseSpec("low_pas"), "did you mean 'low_pass'"),
    (lambda model: defend(model, "ttc", steps="two"), "of the wrong kind"),
    (lambda model: DefenseSpec("ttc", {"model": "x"}), "unknown setting of ttc 'model'"),
])  # fmt: skip
def test_what_does_not_exist_is_named(vit, make, words):
    """Names, settings, kinds of value."""
    with pytest.raises(ConfigError, match=words):
        make(vit)


def test_settings_stand_on_the_card_as_they_hold(vit):
    """Defaults included, lengths as numbers."""
    defended = DefenseSpec("noise", {"scale": "8/255"}).build(vit)
    assert isinstance(defended, Defended)
    assert defended.defense == {"name": "noise", "settings": {"scale": 8 / 255, "distribution": "uniform"}}
    assert settings_of("noise") == {"scale": "4/255", "distribution": "uniform"}


def test_a_command_line_can_fill_the_spec():
    """As ``--defense.name`` and ``--defense.settings``, or as YAML."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--defense", type=DefenseSpec | None, default=None)
    words = ["--defense.name", "ttc", "--defense.settings", "{eps: 4/255, steps: 3}"]
    assert parser.instantiate(parser.parse_args(words)).defense == DefenseSpec("ttc", {"eps": "4/255", "steps": 3})
    given = ["--defense", "{name: aom, settings: {sigma: 8/255}}"]
    assert parser.instantiate(parser.parse_args(given)).defense == DefenseSpec("aom", {"sigma": "8/255"})


PAGE = (Path(__file__).parents[2] / "docs" / "defenses.md").read_text(encoding="utf-8")


def test_the_page_tells_of_every_defence():
    """Each id has a row in the table with what a look costs, as its defaults say."""
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (\d+, \d+)[^|]*\|[^|]*\|$", PAGE, flags=re.M))
    assert set(rows) == set(DEFENSES)


@pytest.mark.filterwarnings("ignore:clipure_cos_release")
@pytest.mark.parametrize("name", sorted(DEFENSES))
def test_the_page_has_the_costs_of_the_defaults(name, miniclip):
    """Of MiniCLIP-32, for which a prior ships."""
    made = defend(miniclip, name)
    assert re.search(rf"^\| `{name}` \|.*\| {made.forwards_per_image}, {made.backwards_per_image}\b", PAGE, flags=re.M)


def test_the_pages_example_runs():
    """As it stands, with nothing added."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    names: dict[str, object] = {}
    exec(block, names)
    assert names["logits"].shape == (8, 2)


@pytest.fixture(scope="module")
def miniclip():
    """The embedded model."""
    return load_model("miniclip32")
