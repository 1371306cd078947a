"""Prompts: each name in each template, and doubtful lists are named."""

import pytest

from aft.clip.prompts import fill_templates, text_hash, warn_of_duplicates
from aft.errors import ConfigError


def test_every_name_meets_every_template() -> None:
    """Braces in a name are text, not a place."""
    assert fill_templates(["a{b}", "c"], ["{}", "x {}"]) == [["a{b}", "x a{b}"], ["c", "x c"]]


@pytest.mark.parametrize(
    ("names", "templates", "words"), [([], ["{}"], "no class names"), (["a"], [], "no templates"), (["a"], ["x"], "0 places")]
)
def test_unusable_lists_are_refused(names: list[str], templates: list[str], words: str) -> None:
    """The message says what is missing."""
    with pytest.raises(ConfigError, match=words):
        fill_templates(names, templates)


def test_names_of_two_classes_are_listed() -> None:
    """ImageNet's crane and maillot cap accuracy silently; here they warn."""
    with pytest.warns(UserWarning, match="crane, maillot"):
        assert warn_of_duplicates(["crane", "Maillot", "cat", "crane ", "maillot"]) == ["crane", "maillot"]


def test_the_hash_tells_order_names_and_templates_apart() -> None:
    """What changes logits changes the hash."""
    hashes = {text_hash(*lists) for lists in [(["a", "b"], ["{}"]), (["b", "a"], ["{}"]), (["a", "b"], ["x {}"]), (["ab"], ["{}"])]}
    assert len(hashes) == 4
