"""The folder that an export is: there whole or not at all, with what it holds said in ``export.json``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import torch

import aft
from aft.clip.files import file_hash
from aft.clip.model import ZeroShotModel
from aft.errors import ConfigError

SCHEMA = "aft.export/1"
FACTS = "export.json"


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to write into; it becomes ``out`` at the end, and is gone if anything failed.

    Raises:
        ConfigError: ``out`` is a file, a folder with something in it, or where none can be made.
    """
    refuse_taken(out)
    out = out.resolve()
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"the folder {out} cannot be made ({error.strerror}): give one in a place where you may write.") from error
    try:
        yield beside
        if out.is_dir():
            out.rmdir()
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def refuse_taken(out: Path) -> None:
    """Raises ConfigError for a file, and for a folder with something in it."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: give a folder that is not there yet, or is empty.")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"the folder {out} is not empty: give another, or empty it; nothing is written over.")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Plain values, indented."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def facts_of(model: ZeroShotModel, kind: str, **more: Any) -> dict[str, Any]:
    """What a program must know of an export: how pixels become logits, and which weights it was made from.

    ``source_sha256`` is that of the weights the export was made from (a card's ``model.sha256``); the architecture lies in the layout's
    own configuration.
    """
    record = {key: value for key, value in asdict(model.record).items() if key not in ("config", "sha256", "layout")}
    record["logit_scale"] = float(model.logit_scale.detach())
    versions = {"aft": aft.__version__, "torch": torch.__version__, "open_clip_torch": open_clip.__version__}
    return {"schema": SCHEMA, "format": kind, "model": record, "source_sha256": model.record.sha256, **more, "versions": versions}


def hashes_of(folder: Path) -> dict[str, str]:
    """sha256 of every file that is there, by name."""
    return {str(path.relative_to(folder)): file_hash(path) for path in sorted(folder.rglob("*")) if path.is_file()}
