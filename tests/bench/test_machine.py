"""Where figures come from and where they go."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from types import ModuleType

import pytest

from aft.errors import ConfigError
from bench import loader, machine, memory, scaling
from bench.page import fenced, fill


def test_a_machine_is_described_without_its_name() -> None:
    """Processor, cores and versions are there; host name and paths are not."""
    text = json.dumps(machine.machine())
    assert '"torch"' in text and '"cores"' in text
    assert platform.node() not in text and str(Path.home()) not in text


def test_every_piece_of_work_is_done_in_each_repeat() -> None:
    """In turn, and the first round does not count."""
    done: list[str] = []
    found = machine.interleaved({"a": lambda: done.append("a"), "b": lambda: done.append("b")}, repeats=3)
    assert done == ["a", "b"] * 4 and {name: len(seconds) for name, seconds in found.items()} == {"a": 3, "b": 3}
    assert machine.ratios([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == {"median": 3.0, "quarter": 2.5, "three_quarters": 3.5, "n": 3}


def test_tables_go_to_their_place_and_nowhere_else(tmp_path: Path) -> None:
    """Again and again; a page without the place is refused."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x -->\n<!-- end of x -->\nafter\n")
    for text in ("one", "two"):
        fill(page, "x", fenced(text))
    assert page.read_text() == "before\n<!-- x -->\n\n```\ntwo\n```\n\n<!-- end of x -->\nafter\n"
    with pytest.raises(ValueError, match="no place for the figures of y"):
        fill(page, "y", "three")


@pytest.mark.parametrize("program", [loader, memory, scaling])
def test_a_trial_overwrites_no_figures(program: ModuleType) -> None:
    """Neither file nor page; it is refused before anything is measured."""
    files = [file.read_bytes() if file.exists() else None for file in (program.OUT, program.PAGE)]
    with pytest.raises(ConfigError, match="--out"):
        program.main(["--quick"])
    assert files == [file.read_bytes() if file.exists() else None for file in (program.OUT, program.PAGE)]


@pytest.mark.parametrize(("page", "name"), [
    *(("performance", f"bench.{name}") for name in ("speed", "loader", "memory", "curves", "profile")),
    ("scaling", "bench.scaling"), ("scaling", "bench.pretraining_cost"),
    ("methods", "bench.methods_table"), ("defenses", "bench.defenses_report"),
])  # fmt: skip
def test_the_pages_have_the_places(page: str, name: str, tmp_path: Path) -> None:
    """A measurement of minutes must not end in an error."""
    text = (Path(__file__).resolve().parents[2] / "docs" / f"{page}.md").read_text(encoding="utf-8")
    (tmp_path / "page.md").write_text(text, encoding="utf-8")
    fill(tmp_path / "page.md", name, "figures")
    assert "figures" in (tmp_path / "page.md").read_text()
