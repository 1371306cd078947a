"""Where a figure comes from: versions, commit, and the card's blocks on model and data."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch

from aft.batch import EvaluationSet
from aft.cards import digest
from aft.clip.matmul import products
from aft.clip.model import ModelRecord

CHECKOUT = Path(__file__).resolve().parents[2]
NAMED = ("aft", "torch", "open_clip_torch", "numpy")


@cache
def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide the figures; none for what is not installed as a package."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in NAMED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@cache
def commit() -> tuple[str | None, bool | None]:
    """The commit that this code was checked out at, and whether tracked files differ from it; none outside a checkout."""
    head = _git("rev-parse", "HEAD")
    if head is None or Path(_git("rev-parse", "--show-toplevel") or "/") != CHECKOUT:
        return None, None
    return head, bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(CHECKOUT), *arguments], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def now() -> str:
    """The time in UTC, to the second, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def device_name(device: torch.device) -> str:
    """``cpu``, with whose fp32 products where they are not torch's own, or the accelerator's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, fp32 products by oneDNN" if device.type == "cpu" and products() == "onednn" else device.type


def model_block(record: ModelRecord) -> dict[str, Any]:
    """A card's ``model``."""
    return {
        "name": record.name, "method": record.method, "sha256": record.sha256, "base_sha256": record.base_sha256, "layout": record.layout,
        "resolution": record.resolution, "mean": list(record.mean), "std": list(record.std), "activation": record.activation,
        "logit_scale": record.logit_scale, "text_transform": record.text_transform, "eps_trained": record.eps_trained,
    }  # fmt: skip


def data_block(data: EvaluationSet) -> dict[str, Any]:
    """A card's ``data``: ``index_sha256`` is over the samples' stable numbers in order, ``classes`` is the number of classes."""
    return {
        "name": data.name, "split": data.split, "n": len(data), "index_sha256": digest(data.index_N.tolist()),
        "classes": len(data.class_names), "classes_sha256": digest(list(data.class_names)), "label_space": data.label_space,
        "templates_sha256": digest(list(data.templates)),
    }  # fmt: skip

