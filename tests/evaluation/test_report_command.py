"""Laws of ``eval.py report``: folders in any way, files where they are looked for, a comparison, and one line where something is wrong."""

from __future__ import annotations

import pytest

import eval as command
from aft.errors import AftError, RunError
from aft.evaluation.pages import build
from tests.made_up_cards import made_up, stored

FILES = {"report.html", "report.md", "table.csv", "accuracy.png"}


def files(folder):
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_folders_are_given_by_place_or_by_name(tmp_path, capsys):
    """Several in turn; the same cards either way. The files lie in the first folder, or above it where it is called cards."""
    stored(tmp_path / "a", "m", made_up())
    stored(tmp_path / "b", "n", made_up(data="else"))
    by_place = command.main(["report", str(tmp_path / "a"), str(tmp_path / "b")])
    assert files(tmp_path / "a") == FILES and files(tmp_path / "b") == set() and [label for label, _ in by_place] == ["m", "n"]
    said = capsys.readouterr().out
    assert f"page: {tmp_path}/a/report.html (" in said and "kB)" in said and "±" in said
    by_name = command.main(["report", "--cards", f"[{tmp_path}/b/cards, {tmp_path}/a]"])
    assert files(tmp_path / "b") == FILES and sorted(by_name, key=str) == sorted(by_place, key=str)
    command.main(["report", str(tmp_path / "a"), "--out", str(tmp_path / "c")])
    assert files(tmp_path / "c") == FILES


def test_against_another_report(tmp_path, capsys):
    """On screen, on the page and in Markdown."""
    stored(tmp_path / "new", "m", made_up(robust=0.45))
    stored(tmp_path / "old", "m", made_up(robust=0.1))
    command.main(["report", str(tmp_path / "new"), "--against", str(tmp_path / "old")])
    assert "  better: m, toy all, apgd 2/255, robust 10.0 ±3.0 -> 45.0 ±5.0 (difference 35.0 ±5.8, unpaired, n = 100, reliable)" in (
        capsys.readouterr().out
    )
    assert f"Against {tmp_path}/old" in (tmp_path / "new" / "report.html").read_text()
    assert "## Against" in (tmp_path / "new" / "report.md").read_text()


def test_examples_are_of_the_weights_that_are_named(tmp_path):
    """On the embedded sample; without the option no model is loaded."""
    stored(tmp_path, "m", made_up())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "load_model", None)
        patch.setattr(command, "Sample", None)
        command.main(["report", str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png" not in page
    command.main(["report", str(tmp_path), "--examples", "[miniclip32]"])
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == 30 and "attention under attack" in page and 'id="examples-1">miniclip32<' in page


@pytest.mark.parametrize(
    ("words", "message"),
    [(["gone"], "gone does not exist"), (["new", "--against", "gone"], "gone does not exist"), (["empty"], "no cards below"),
     (["new", "--againts", "x"], "did you mean 'against'"), (["new", "--examples", "[no_such_model]"], "no_such_model")],
)  # fmt: skip
def test_mistakes_are_one_line(words, message, tmp_path, monkeypatch):
    """Nothing is written then."""
    stored(tmp_path / "new", "m", made_up())
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AftError, match=message):
        command.main(["report", *words])
    assert files(tmp_path / "new") == set()


def test_without_jinja_it_says_what_to_install(tmp_path, monkeypatch):
    """The rest is written before."""
    import sys

    stored(tmp_path, "m", made_up())
    build._template.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(RunError, match=r"no page without jinja2: install it with pip install 'aft\[eval\]'"):
        command.main(["report", str(tmp_path)])
    assert files(tmp_path) == FILES - {"report.html"}
