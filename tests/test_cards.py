"""Laws of result files: what is written is read, what is not of the schema is refused, files are whole, names follow identity alone."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from aft import cards
from aft.errors import DataError


def card():
    """A card with nothing but its keys."""
    filled = {key: None for key in cards.KEYS}
    blocks = {block: {key: None for key in keys} for block, keys in cards.BLOCKS.items() if block not in ("attacks", "defense")}
    filled.update(blocks, schema=cards.SCHEMA, status="complete", attacks=[{key: None for key in cards.BLOCKS["attacks"]}])
    filled["verdict"] = {"status": "unchecked", "failed_checks": []}
    return filled


def test_what_is_written_is_read(tmp_path):
    """JSON and arrays come back as they were, and nothing else lies in the folder."""
    verdicts = {"row": np.arange(3), "right": np.ones((3, 0), bool)}
    cards.write(tmp_path / "a.json", card(), verdicts)
    assert cards.read(tmp_path / "a.json") == card()
    back = cards.read_arrays(tmp_path / "a.npz")
    assert all(np.array_equal(back[name], verdicts[name]) and back[name].dtype == verdicts[name].dtype for name in verdicts)
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.npz"]


@pytest.mark.parametrize("block", [None, "model", "data", "threat", "verdict"])
def test_unknown_and_missing_keys_are_refused(tmp_path, block):
    """At the top and in each block, with the near match named; on reading as on writing."""
    bad = card()
    part = bad if block is None else bad[block]
    known = next(iter(part)) if block else "task"
    part[known + "x"] = 1
    (tmp_path / "a.json").write_text(json.dumps(bad))
    with pytest.raises(DataError, match=f"unknown key '{known}x': did you mean .*'{known}'"):
        cards.read(tmp_path / "a.json")
    with pytest.raises(DataError, match="unknown key"):
        cards.write(tmp_path / "b.json", bad)
    del part[known + "x"], part[known]
    if known != "schema":
        with pytest.raises(DataError, match=f"lacks {known}"):
            cards.validate(bad)
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("text, words", [
    ("{", "cannot be read as a card"), ("[]", "holds a list"), ('{"schema": "aft.card/9"}', "aft.card/9"),
])  # fmt: skip
def test_what_is_no_card_is_refused(tmp_path, text, words):
    """Damaged JSON, other JSON, another schema."""
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=words):
        cards.read(tmp_path / "a.json")


def test_statuses_are_checked():
    """A status or verdict that does not exist is an error with the near match."""
    with pytest.raises(DataError, match="did you mean 'reliable'"):
        cards.validate({**card(), "verdict": {"status": "relyable", "failed_checks": []}})
    with pytest.raises(DataError, match="unknown status"):
        cards.validate({**card(), "status": "done"})


def test_a_write_that_breaks_off_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch):
    """The target is only ever replaced by a whole file."""
    path = tmp_path / "a.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        cards.write_whole(path, b"new" * 10000)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_damaged_arrays_are_named(tmp_path):
    """A half-copied part is an error that says what to do."""
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 half")
    with pytest.raises(DataError, match="delete it and run the same command"):
        cards.read_arrays(tmp_path / "a.npz")


def test_join_gives_each_row_once_in_order():
    """In whatever order the parts come, and where two hold the same rows."""
    parts = [{"row": np.array(rows), "index": np.array(rows) + 10} for rows in ([5, 3], [0, 1], [3, 2, 4], [1])]
    for order in (parts, parts[::-1]):
        whole = cards.join(order)
        assert whole["row"].tolist() == list(range(6)) and whole["index"].tolist() == list(range(10, 16))
    with pytest.raises(DataError, match="same columns"):
        cards.join([parts[0], {"row": np.array([9])}])
    with pytest.raises(DataError, match="one table or more"):
        cards.join([])


def test_a_cell_is_named_by_values_not_by_their_order():
    """Canonical JSON: the order of keys does not matter, any value does."""
    assert cards.cell_of({"a": 1, "b": [1, 2]}) == cards.cell_of({"b": [1, 2], "a": 1})
    assert len({cards.cell_of({"a": 1, "b": b}) for b in ([1, 2], [2, 1], None, {"c": 1})}) == 4
    with pytest.raises(ValueError, match="JSON"):
        cards.cell_of({"a": float("nan")})


def test_standard_error_is_that_of_a_binomial_share():
    """Against the spread of 20,000 simulated shares."""
    shares = np.random.default_rng(0).binomial(400, 0.3, 20000) / 400
    assert cards.standard_error(0.3, 400) == pytest.approx(shares.std(), rel=0.03)
    assert cards.standard_error(1.0, 5) == 0
