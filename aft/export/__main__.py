"""``python -m aft.export CHECKPOINT --format NAME --out FOLDER``: see ``-h``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aft.clip.merge import add_files
from aft.clip.model import ZeroShotModel
from aft.clip.weights import load_model, named
from aft.defenses import DefenseSpec
from aft.errors import ConfigError, ending_calmly
from aft.export.folder import refuse_taken
from aft.export.formats import FORMATS, Head
from aft.export.model_card import Provenance, cards_below
from aft.export.write import export, refuse_request

ADD = "model is the base, and FACTOR times what the fine-tuning FILE changed is added to it (merges and soups; more than once)"


def parser() -> argparse.ArgumentParser:
    """All options."""
    made = argparse.ArgumentParser(prog="python -m aft.export", description="Writes a model for another library, with a model card.")
    made.add_argument("model", help="a checkpoint, a weights file, a folder of the hub, NAME/TAG, or the name of an embedded model")
    made.add_argument("--format", required=True, metavar="NAME", help=", ".join(FORMATS))
    made.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="not there yet, or empty")
    made.add_argument("--name", help="architecture of a weights file: an open_clip name")
    made.add_argument("--base", help="where the text side of a file comes from that holds an image tower alone")
    made.add_argument("--activation", choices=["gelu", "quick_gelu"], help="of a weights file that does not say")
    made.add_argument("--add", action="append", default=[], metavar="FILE=FACTOR", help=ADD)
    made.add_argument("--classes", nargs="+", default=[], metavar="CLASS", help="onnx and torch_export: bake these into logits")
    made.add_argument("--templates", nargs="+", metavar="TEXT", help=f"prompts of the classes ({Head().templates[0]!r})")
    made.add_argument("--defense", metavar="NAME", help="onnx and torch_export: put this test-time defence into the graph")
    made.add_argument("--settings", metavar="JSON", help="of the defence, such as '{\"sigma\": 1.0}'")
    made.add_argument("--half", action="store_true", help="store weights in fp16")
    made.add_argument("--cards", type=Path, metavar="FOLDER", help="cards of these weights, for the model card")
    made.add_argument("--title", help="of the model card")
    made.add_argument("--license", help="of the weights, as model hubs call it, such as apache-2.0")
    made.add_argument("--data", help="what it was trained on, on what terms: a sentence for the model card; else what the weights say")
    return made


def load(given: argparse.Namespace) -> ZeroShotModel:
    """The model that the options mean.

    Raises:
        AftError: there is none.
    """
    spec = named(given.model)
    changes = {key: value for key in ("name", "base", "activation") if (value := getattr(given, key)) is not None}
    spec = replace(spec, **changes)
    model = load_model(spec)
    model = add_files(model, spec.name, given.add) if given.add else model
    return model if given.defense is None else DefenseSpec(given.defense, settings_in(given.settings or "{}")).build(model)


def refuse_lonely(given: argparse.Namespace) -> None:
    """Raises ConfigError for an option that does nothing without another one."""
    for option, needed in (("templates", "classes"), ("settings", "defense")):
        if getattr(given, option) is not None and not getattr(given, needed):
            raise ConfigError(f"--{option} without --{needed} would do nothing: give --{needed} too, or leave it out.")


def settings_in(text: str) -> dict[str, Any]:
    """A defence's settings.

    Raises:
        ConfigError: the text is no JSON object.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--settings {text}: write a JSON object, such as '{{\"sigma\": 1.0}}' ({error}).") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--settings {text}: write a JSON object, such as '{{\"sigma\": 1.0}}'.")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
        AftError: whatever a user can mend.
    """
    given = parser().parse_args(arguments)
    head = Head(tuple(given.classes), tuple(given.templates or Head().templates))
    refuse_lonely(given)
    refuse_request(given.format, head, given.half)
    refuse_taken(given.out)
    model = load(given)
    cards = cards_below(given.cards, model) if given.cards is not None else []
    told = Provenance(given.title, given.license, given.data)
    files = export(model, given.format, given.out, head=head, half=given.half, cards=cards, told=told)
    print(f"{given.out}: {model.record.name}, {model.record.method}, as {given.format}; {len(cards)} cards")
    for name, sha in files.items():
        print(f"{sha}  {name}")


if __name__ == "__main__":
    with ending_calmly():
        main()
