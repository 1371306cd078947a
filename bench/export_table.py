"""Every export, loaded elsewhere and compared: ``python -m bench.export_table [--only NAME ...] [--formats NAME ...]``.

Small random towers of every kind and MiniCLIP-32, one of each family with visual prompts, and on one tower a checkpoint of every method, go
out in every format; the library that the format is for loads them (``tests/export/foreign.py``), and the largest difference is noted, or
the words of the refusal. ``results/export/table.json`` keeps every cell with what was compared, ``results/export/README.md`` is the table.
What is there is not done again, unless a library has changed since. All of it takes some three minutes of one core; it needs the extras
test, hf and onnx.

Where a method leaves nothing but weights in the tower, its graphs are those of the plain tower, and are not written again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aft.cards import write_whole
from aft.clip import ModelSpec, TrainableSpec, ZeroShotModel, load_model
from aft.clip.merge import add_task_vectors
from aft.defenses import defend
from aft.errors import ConfigError, ending_calmly, unknown_name
from aft.export import FORMATS, Head, export
from tests.conftest import MemoryData
from tests.export.foreign import OVER_TEXTS, TOLERANCES, differences
from tests.export.models import CONFIGS, as_clip_load_rounds, folder_of, images_of, trained, with_prompts
from tests.methods.recipes import RECIPES

RESULTS = Path(__file__).resolve().parents[1] / "results" / "export"
LIBRARIES = ("torch", "open_clip_torch", "transformers", "timm", "onnx", "onnxscript", "onnxruntime")
#: The tower that every format holds: what a method makes of it shows what a method's exports need.
FITS_ALL = "openai_vit"
MINI = "miniclip32"
#: What is inside a tower, whichever method put it there. Text transformations stand behind it and do not know which one it is.
PLAIN, PROMPTS = "plain", "visual prompts"
AS_PLAIN = "as_plain"
#: Prompts are hooks in front of a tower: one of each family (open_clip's ViT takes tokens too).
PROMPTED = ("vit", "resnet", "timm_vit")
#: How refusals call a format: the table's column says which one it is.
LAYOUT = re.compile(r"open_clip's layout|OpenAI's layout|transformers' CLIP\w*Model")
WAYS = {"lora": TrainableSpec("lora", rank=2), "last": TrainableSpec("last"), "prompts": TrainableSpec("prompts", pad=2, tokens=1)}
DEFENDED = ("low_pass", "clipure_cos_closed", "noise", "ttc", "anti_adversary")

HEAD = """# Exports, loaded elsewhere and compared

Written by `python -m bench.export_table`; `table.json` has each cell with all that was compared. Small towers with random weights, and
MiniCLIP-32; of methods a checkpoint after two steps. The library that a format is for loads the folder with its own configuration,
preprocessing and tokenizer, on the CPU in fp32.

* A number is the largest difference from the model: over unit image and text embeddings, logits in units of the logit scale, the scale
  itself (relative), and for `llava_tower` the tokens before the last block (relative to the largest entry). Graphs have texts as classes.
* A letter is a refusal, in the words below; nothing was written.
* `plain`: the method leaves nothing but weights, so that its graph is the plain tower's.
* All weights here are such as fp16 holds, since `clip.load` rounds to fp16 itself.
"""


@dataclass(frozen=True)
class Row:
    """One model.

    Args:
        tower: a name of ``tests/export/models.py``, or ``miniclip32``.
        what: a change, a method, a way to train, a sum or a defence.
        build: makes it, with a folder to work in.
    """

    tower: str
    what: str
    build: Callable[[Path], ZeroShotModel]


def rows() -> Iterator[Row]:
    """All models: methods and what else happens to weights on one tower, then every tower plain, then some with prompts."""
    for name in RECIPES:
        yield Row(FITS_ALL, name, lambda folder, name=name: after(name, folder))
    for way, spec in WAYS.items():
        yield Row(FITS_ALL, f"tecoa, trainable {way}", lambda folder, spec=spec: after("tecoa", folder, trainable=spec))
    yield Row(FITS_ALL, "soup of tecoa and fare", soup)
    for name in DEFENDED:
        yield Row(FITS_ALL, f"behind {name}", lambda folder, name=name: defend(bare(FITS_ALL, folder), name))
    for tower in (*CONFIGS, MINI):
        yield Row(tower, PLAIN, lambda folder, tower=tower: bare(tower, folder))
    for tower in PROMPTED:
        yield Row(tower, PROMPTS, lambda folder, tower=tower: with_prompts(bare(tower, folder)))


def bare(tower: str, folder: Path) -> ZeroShotModel:
    """The tower with its weights as they are."""
    return load_model(MINI) if tower == MINI else load_model(ModelSpec(pretrained=str(folder_of(tower, folder))))


def after(name: str, folder: Path, **settings: object) -> ZeroShotModel:
    """What is in a checkpoint of this method, two steps from the bare tower."""
    start = folder / FITS_ALL
    spec = ModelSpec(pretrained=str(start if start.exists() else folder_of(FITS_ALL, folder)))
    return load_model(ModelSpec(pretrained=str(trained(name, spec, MemoryData(), folder, **settings))))


def soup(folder: Path) -> ZeroShotModel:
    """Half of what each of two methods changed."""
    tuned = [(after(name, folder), 0.5) for name in ("tecoa", "fare")]
    return add_task_vectors(load_model(ModelSpec(pretrained=str(folder / FITS_ALL))), tuned)


def cell(model: ZeroShotModel, kind: str, out: Path) -> dict[str, Any]:
    """What came of one export: the differences, or the words of the refusal."""
    head = OVER_TEXTS if FORMATS[kind].graph else Head()
    try:
        export(model, kind, out, head=head)
    except ConfigError as error:
        return {"refused": in_short(str(error), model.record.name)}
    return {"differences": differences(model, kind, out, images_of(model))}


def in_short(words: str, name: str) -> str:
    """The reason of a refusal, without the remedy, the model's name and its settings."""
    reason = re.split(r"; (?:use|a graph|export)|\. ", words.rstrip("."))[0]
    return re.sub(r" \{[^}]*\}", "", reason.replace(f"{name} ", "", 1) if reason.startswith(name) else reason)


def measure(row: Row, kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """One model in these formats."""
    with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(work)
        model = as_clip_load_rounds(row.build(folder))
        same = row.what != PLAIN and only_weights(model)
        return {kind: {AS_PLAIN: True} if same and FORMATS[kind].graph else cell(model, kind, folder / f"out_{kind}") for kind in kinds}


def only_weights(model: ZeroShotModel) -> bool:
    """Whether nothing but the values of its weights sets it apart from its plain tower."""
    return model.record.prompts is None and model.text_transform.idle and not model.stages.declared


def key(row: Row) -> str:
    """Under which a row is kept."""
    return f"{row.tower}: {row.what}"


def kept(results: Path, versions: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The cells that are there, by row; none where a library is another."""
    path = results / "table.json"
    told = json.loads(path.read_text()) if path.exists() else {}
    return dict(told["rows"]) if told.get("versions") == versions else {}


def page(found: dict[str, dict[str, Any]], versions: dict[str, str]) -> str:
    """``README.md``: a table of what happens to one tower, and one for each change over all towers."""
    notes: list[str] = []
    tables = {f"Methods, ways to train, sums and defences, on `{FITS_ALL}`": (FITS_ALL, None)}
    tables |= {"Every tower, plain": (None, PLAIN), "One tower of each family, with visual prompts": (None, PROMPTS)}
    allowed = ", ".join(f"{value:g} ({kind})" for kind, value in TOLERANCES.items())
    lines = [HEAD, f"Allowed: {allowed}.", f"Libraries: {', '.join(f'{name} {number}' for name, number in versions.items())}.", ""]
    for title, (tower, what) in tables.items():
        chosen = {name: cells for name, cells in found.items() if belongs(name, tower, what)}
        if chosen:
            lines += [f"## {title}", "", f"| {'method' if tower else 'tower'} | {' | '.join(FORMATS)} |", "|---" * (1 + len(FORMATS)) + "|"]
            lines += [f"| {shown(name, tower)} | {' | '.join(said(cells.get(kind), notes) for kind in FORMATS)} |"
                      for name, cells in chosen.items()] + [""]  # fmt: skip
    return "\n".join([*lines, "## Refusals", "", *(f"* **{letter(place)}** {words}" for place, words in enumerate(notes))]) + "\n"


def belongs(name: str, tower: str | None, what: str | None) -> bool:
    """Whether a row is of this table."""
    row_tower, _, row_what = name.partition(": ")
    return row_what == what if what else row_tower == tower and row_what not in (PLAIN, PROMPTS)


def shown(name: str, tower: str | None) -> str:
    """The first column."""
    return f"`{name.partition(': ')[0 if tower is None else 2]}`"


def said(told: dict[str, Any] | None, notes: list[str]) -> str:
    """One cell; a refusal is noted once."""
    if told is None:
        return "-"
    if AS_PLAIN in told:
        return PLAIN
    if "differences" in told:
        largest = max(told["differences"].values())
        return f"{largest:.0e}" if largest else "0"
    words = LAYOUT.sub("the layout", told["refused"])
    if words not in notes:
        notes.append(words)
    return letter(notes.index(words))


def letter(place: int) -> str:
    """a to z, then aa."""
    return chr(ord("a") + place) if place < 26 else letter(place // 26 - 1) + letter(place % 26)


def beyond(found: dict[str, dict[str, Any]]) -> list[str]:
    """Cells whose difference is larger than it may be."""
    return [f"{name} as {kind}: {told['differences']}" for name, cells in found.items() for kind, told in cells.items()
            if "differences" in told and not max(told["differences"].values()) <= TOLERANCES[kind]]  # fmt: skip


def chosen_rows(only: Sequence[str]) -> list[Row]:
    """Rows whose tower or method is named; all if none is.

    Raises:
        ConfigError: a name is none.
    """
    every = list(rows())
    known = {name for row in every for name in (row.tower, row.what)}
    for name in only:
        if name not in known:
            raise ConfigError(unknown_name("tower or method", name, sorted(known)))
    return [row for row in every if not only or row.tower in only or row.what in only]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is missing, writes the table and prints it; what is beyond its tolerance ends in an error.

    Raises:
        ConfigError: a name is none.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="towers or methods; none: all")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS), metavar="NAME", help=", ".join(FORMATS))
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="for README.md and table.json")
    given = parser.parse_args(arguments)
    versions = {name: version(name) for name in LIBRARIES}
    chosen, every = chosen_rows(given.only), [key(row) for row in rows()]
    found = kept(given.out, versions)
    given.out.mkdir(parents=True, exist_ok=True)
    for row in chosen:
        missing = [kind for kind in given.formats if kind not in found.get(key(row), {})]
        if missing:
            found[key(row)] = {**found.get(key(row), {}), **measure(row, missing)}
            found = {name: found[name] for name in every if name in found}
            write_whole(given.out / "table.json", (json.dumps({"versions": versions, "rows": found}, indent=1) + "\n").encode())
    write_whole(given.out / "README.md", page(found, versions).encode())
    print(page({key(row): found[key(row)] for row in chosen}, versions))
    if wrong := beyond(found):
        sys.exit("\n".join(["beyond the tolerance:", *wrong]))


if __name__ == "__main__":
    with ending_calmly():
        main()
