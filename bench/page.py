"""Tables as text, and their places on the pages of ``docs/``: what is measured is never copied by hand."""

from __future__ import annotations

from pathlib import Path

from aft.cards import write_whole


def table(head: list[str], rows: list[list[str]]) -> str:
    """Columns under their heads, the first one to the left, the others to the right."""
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    lines = [[cell.ljust(w) if not place else cell.rjust(w) for place, (cell, w) in enumerate(zip(row, widths, strict=True))]
             for row in [head, ["-" * w for w in widths], *rows]]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def placed(page: str, name: str, block: str) -> str:
    """The text of a page with ``block`` between ``<!-- NAME -->`` and ``<!-- end of NAME -->``.

    Raises:
        ValueError: the page has no such place.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page has no place for the figures of {name}: write {begin.strip()} and {end} on lines of their own.")
    return f"{before}{begin}\n{block.strip()}\n\n{end}{after}"


def fill(page: Path, name: str, block: str) -> None:
    """Writes :func:`placed` of a Markdown file, whole or not at all."""
    write_whole(page, placed(page.read_text(encoding="utf-8"), name, block).encode())


def fenced(text: str) -> str:
    """Columns as Markdown leaves them: as they are."""
    return f"```\n{text.strip()}\n```"
