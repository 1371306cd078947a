"""What a weights file says that it was trained on is words of a stranger: what cannot be read is not known."""

from __future__ import annotations

import pytest

from aft.clip.training_data import UNSAID, data_in


@pytest.mark.parametrize("words", ["no json", '{"name": "a"}', "[1]", '[["name"]]', '[{"name": 3, "terms": null}]', '[{"name": "a"}]'])
def test_what_is_no_history_is_not_known(words: str) -> None:
    """The weights load all the same, after what is known of those before them."""
    assert data_in({"data": words, "method": "tecoa"}, ({"name": "a", "terms": None},)) == ({"name": "a", "terms": None}, UNSAID)


def test_a_history_is_taken_as_it_is() -> None:
    """In its order, with what nobody said."""
    assert data_in({"data": '[{"name": null, "terms": null}, {"name": "b", "terms": "CC"}]'}, ()) == (UNSAID, {"name": "b", "terms": "CC"})
