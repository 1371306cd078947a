"""Class names and phrases come from the folders, a text file or JSON; shared names are warned of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aft.errors import DataError
from datamodules import ImageFolder

RECORD = {"names": ["tabby", "tabby cat"], "gloss": "a cat with stripes",
          "hypernyms": [["domestic cat", "house cat"], ["cat", "tabby"], ["feline"]]}


def names(folder: Path, **settings: object) -> tuple[tuple[str, ...], ...]:
    return ImageFolder(str(folder), **settings).class_phrases


def test_every_form_of_names(make_folder, tmp_path: Path) -> None:
    """Text in order, text with tabs, JSON list, JSON mapping, WordNet-like records: all mean the sorted folders."""
    folder = make_folder(("n01", "n02"))
    plain = (("tabby",), ("sea horse",))
    for name, text in (("a.txt", "tabby\nsea  horse\n\n"), ("b.txt", "n02\tsea horse\nn01\ttabby\nn99\tunused\n"),
                       ("c.json", '["tabby", "sea horse"]'), ("d.json", '{"n02": "sea horse", "n01": "tabby"}')):
        (tmp_path / name).write_text(text)
        assert names(folder, classes=str(tmp_path / name)) == plain, name
    (tmp_path / "e.json").write_text(json.dumps({"n01": RECORD, "n02": {"names": ["sea horse"]}}))
    assert names(folder, classes=str(tmp_path / "e.json")) == (
        ("tabby", "tabby cat", "domestic cat", "house cat", "cat", "a cat with stripes"), ("sea horse",))


def test_auto_takes_classes_json_beside_the_data(make_folder, tmp_path: Path) -> None:
    """``auto``: the file if it is there, else the folders' names; none: never the file."""
    folder = make_folder(("king-crab", "sea_horse"))
    assert names(folder) == (("king crab",), ("sea horse",))
    (tmp_path / "classes.json").write_text('["a", "b"]')
    assert names(folder) == (("a",), ("b",))
    assert names(folder, classes=None) == (("king crab",), ("sea horse",))


def test_shared_names_are_warned_of_once(make_folder, tmp_path: Path) -> None:
    """The warning names them (ImageNet's two cranes); they cannot be chosen to train on."""
    folder = make_folder(("bird", "machine", "dog"))
    (tmp_path / "names.txt").write_text("crane\ndog\ncrane\n")
    data = ImageFolder(str(folder), classes=str(tmp_path / "names.txt"))
    with pytest.warns(UserWarning, match="more than one class: crane") as caught:
        assert data.class_lists["train"] == ("crane", "dog", "crane")
        assert data.class_lists["train"] == ("crane", "dog", "crane")
    assert len(caught) == 1
    with pytest.warns(UserWarning), pytest.raises(DataError, match="'crane' is given twice or names two classes"):
        ImageFolder(str(folder), classes=str(tmp_path / "names.txt"), train_classes=["crane", "dog"]).setup()


@pytest.mark.parametrize(("name", "text", "message"), [
    ("x.txt", "tabby\n", "has 1 names for 2 class folders"), ("x.json", "[1, 2]", "give a name, or a record with 'names'"),
    ("x.json", '{"n01": "tabby"}', r"names no class for 1 folders \(n02\)"), ("x.json", "{", "cannot be read"),
    ("x.json", '{"n01": {"names": []}, "n02": "b"}', "'n01' has no name"), ("x.json", "3", "names for 2 class folders"),
    ("absent.txt", None, "cannot be read")])
def test_bad_classes_files_say_why(make_folder, tmp_path: Path, name: str, text: str | None, message: str) -> None:
    """Too few names, missing folders, broken JSON, no file."""
    folder = make_folder(("n01", "n02"))
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        names(folder, classes=str(tmp_path / name))
