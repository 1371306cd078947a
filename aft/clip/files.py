"""Weights files: read without running code, named by their hash, loaded without leaving anything out."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import huggingface_hub
import numpy as np
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from aft.errors import WeightsError

HUB = "hf-hub:"
SUFFIXES = frozenset({".safetensors", ".pt", ".pth", ".tar", ".ckpt", ".bin"})
GRAPHS = frozenset({".onnx", ".pt2"})
IN_A_FOLDER = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pt",
               "model.safetensors", "pytorch_model.bin")  # fmt: skip


def fetched_from_hub(name: str) -> Path:
    """The folder of a model of the Hugging Face Hub, downloaded unless it is there: configuration, and weights in safetensors.

    Args:
        name: ``hf-hub:OWNER/MODEL``.

    Raises:
        WeightsError: it cannot be fetched, or has no safetensors.
    """
    try:
        return Path(huggingface_hub.snapshot_download(name.removeprefix(HUB), allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError, HfHubHTTPError) as error:  # no network, no such model, no leave
        remedy = "check name and network, or download the model and give its folder"
        raise WeightsError(f"{name} could not be fetched ({error}): {remedy}.") from error


def weights_in(folder: Path) -> Path:
    """The weights file of a hub folder; safetensors come first.

    Raises:
        WeightsError: there is none; what was looked for is listed.
    """
    for name in IN_A_FOLDER:
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(f"no weights in the folder {folder}: it should hold one of {', '.join(IN_A_FOLDER)} (in one piece, no shards).")


def read_file(path: Path) -> dict[str, Any]:
    """The contents of a weights file as tensors and plain types; never runs code.

    Raises:
        WeightsError: the file is damaged, a TorchScript archive, or a pickle of anything but tensors and plain types.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if path.suffix in GRAPHS:
            raise WeightsError(f"{path} is a graph that runs, not weights: give the checkpoint that it was exported from, or an export of "
                               "weights (python -m aft.export --format open_clip).")  # fmt: skip
        if _is_torchscript(path):
            raise WeightsError(
                f"{path} is a TorchScript archive, a program with weights in it (as OpenAI's own downloads are), and is not run. "
                "Take the tag 'openai' or a Hugging Face folder of the same model; or, if you trust the file, save its weights alone: "
                "torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(), 'weights.pt')."
            )
        with _plain_numbers():
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise WeightsError(
            f"{path} is no weights file, or holds more than tensors and plain types, which could run code: save its state_dict alone."
        ) from error
    except (SafetensorError, RuntimeError, OSError, EOFError, KeyError) as error:
        raise WeightsError(f"{path} cannot be read as weights ({error}): is the file whole? Copy or download it again.") from error
    if not isinstance(contents, Mapping):
        raise WeightsError(f"{path} holds a {type(contents).__name__}, not a dictionary of tensors.")
    return dict(contents)


def _is_torchscript(path: Path) -> bool:
    """Whether this zip holds code and constants, as torch.jit.save writes them."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(("/constants.pkl", "/code/")) or "/code/" in name for name in archive.namelist())


def _plain_numbers() -> AbstractContextManager[object]:
    """Lets numpy's numbers through: TeCoA's training code, and those made from it, store their best accuracy as one."""
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    kinds = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64")]
    allowed: list[Any] = [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype, *kinds]
    return torch.serialization.safe_globals(allowed)


def load_strictly(module: nn.Module, state: Mapping[str, Any], origin: str) -> None:
    """Loads every tensor, and nothing but what fits.

    Raises:
        WeightsError: names missing, unexpected, or of another shape; the first eight of each are listed.
    """
    own = module.state_dict()
    given = {key.removeprefix("module."): value for key, value in state.items()}
    faults = {
        "missing": [key for key in own if key not in given],
        "unexpected": [key for key in given if key not in own],
        "of another shape": [
            f"{key} {tuple(given[key].shape)} for {tuple(own[key].shape)}"
            for key in own
            if key in given and given[key].shape != own[key].shape
        ],
    }
    found = [f"{len(keys)} {what}: {', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''}" for what, keys in faults.items() if keys]
    if found:
        raise WeightsError(f"weights of {origin} do not fit the model. " + "; ".join(found) + ".")
    module.load_state_dict(given, strict=True)


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as stream:
        return (
            hashlib.file_digest(stream, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(stream.read()).hexdigest()
        )


def recipe_in(path: Path) -> dict[str, str]:
    """What a safetensors file of ours says of its training: ``method``, ``eps_trained``, ``base_sha256``; empty for other files."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata() or {}
    return {key.removeprefix("aft."): value for key, value in metadata.items() if key.startswith("aft.")}
