"""Writes a checkpoint in fp16 for others: ``python -m aft.clip.pack CHECKPOINT FOLDER`` (open_clip's layout), or ``... FILE.safetensors``
(the image tower alone, to be loaded over its base). ``python -m aft.export`` writes whole folders for other libraries, with a model card.

This is how the embedded MiniCLIP and ``results/weights`` were made from their runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from aft.clip.files import file_hash
from aft.clip.model import ModelRecord, ZeroShotModel
from aft.clip.weights import ModelSpec, load_model
from aft.errors import AftError, ConfigError


def pack(model: ZeroShotModel, folder: Path, half: bool = True) -> str:
    """Writes ``open_clip_config.json`` and ``open_clip_model.safetensors``.

    Args:
        model: a plain model.
        folder: made if it is not there.
        half: in fp16, to halve the size; else the weights' own type.

    Returns:
        sha256 of the weights file.

    Raises:
        ConfigError: the model has visual prompts or a text transformation, which this layout has no place for.
    """
    refuse_extras(model, "open_clip's layout")
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": list(model.record.mean), "std": list(model.record.std), "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": model.record.config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return save(model.clip.state_dict(), model.record, folder / "open_clip_model.safetensors", half)


def pack_tower(model: ZeroShotModel, file: Path) -> str:
    """Writes the image tower alone, in fp16: ``ModelSpec(BASE, FILE)`` loads it over the text side of its base.

    Returns:
        sha256 of the file.

    Raises:
        ConfigError: the model has visual prompts or a text transformation, which this layout has no place for.
    """
    refuse_extras(model, "a plain image tower")
    file.parent.mkdir(parents=True, exist_ok=True)
    return save(model.visual.state_dict(), model.record, file)


def refuse_extras(model: ZeroShotModel, layout: str) -> None:
    """Raises ConfigError for a model with more than two towers: visual prompts, or a text transformation that does something."""
    name, transform, graphs = model.record.name, model.text_transform, "a graph can (python -m aft.export --format onnx or torch_export"
    if model.record.prompts is not None:
        raise ConfigError(f"{name} has visual prompts {model.record.prompts}: {layout} cannot hold them; {graphs}).")
    if not transform.idle:
        raise ConfigError(f"{name} has text_transform {transform.name}, not linear: {layout} cannot hold it; {graphs}, with --classes).")


def stored(state: Mapping[str, Tensor], half: bool = False) -> dict[str, Tensor]:
    """Tensors as files take them: detached, contiguous, each with memory of its own (tied ones twice), in fp16 if asked for."""
    kinds = {name: torch.float16 if half and value.dtype == torch.float32 else value.dtype for name, value in state.items()}
    fresh = {name: value.detach().cpu().to(kinds[name]) for name, value in state.items()}
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in fresh.items()}


def save(state: Mapping[str, Tensor], record: ModelRecord, file: Path, half: bool = True) -> str:
    """One safetensors file that all may read, with the recipe in its metadata; its sha256."""
    recipe = {"method": record.method, "eps_trained": str(record.eps_trained), "base_sha256": str(record.base_sha256)}
    told = {"data": json.dumps(record.data, ensure_ascii=False)} if record.data else {}
    metadata = {"format": "pt"} | {f"aft.{key}": value for key, value in {**recipe, **told}.items()}
    save_file(stored(state, half), file, metadata=metadata)
    file.chmod(0o644)
    return file_hash(file)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m aft.clip.pack CHECKPOINT FOLDER|FILE.safetensors")
    try:
        target = Path(sys.argv[2])
        write = pack_tower if target.suffix == ".safetensors" else pack
        print(f"{target}: sha256 {write(load_model(ModelSpec(pretrained=sys.argv[1])), target)}")
    except AftError as error:
        sys.exit(f"error: {error}")
