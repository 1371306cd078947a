"""Writes a checkpoint in fp16 for others: ``python -m aft.clip.pack CHECKPOINT FOLDER`` (open_clip's layout), or ``... FILE.safetensors``
(the image tower alone, to be loaded over its base).

This is how the embedded MiniCLIP and ``results/weights`` were made from their runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from aft.clip.files import file_hash
from aft.clip.model import ModelRecord, ZeroShotModel
from aft.clip.weights import ModelSpec, load_model
from aft.errors import AftError, ConfigError


def pack(model: ZeroShotModel, folder: Path) -> str:
    """Writes ``open_clip_config.json`` and ``open_clip_model.safetensors``, in fp16 to halve the size.

    Returns:
        sha256 of the weights file.

    Raises:
        ConfigError: the model has visual prompts or a text transformation, which this layout has no place for.
    """
    _refuse_extras(model)
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": list(model.record.mean), "std": list(model.record.std), "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": model.record.config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return _save(model.clip, model.record, folder / "open_clip_model.safetensors")


def pack_tower(model: ZeroShotModel, file: Path) -> str:
    """Writes the image tower alone, in fp16: ``ModelSpec(BASE, FILE)`` loads it over the text side of its base.

    Returns:
        sha256 of the file.

    Raises:
        ConfigError: the model has visual prompts or a text transformation, which this layout has no place for.
    """
    _refuse_extras(model)
    file.parent.mkdir(parents=True, exist_ok=True)
    return _save(model.visual, model.record, file)


def _refuse_extras(model: ZeroShotModel) -> None:
    if model.record.prompts is not None:
        raise ConfigError(f"{model.record.name} has visual prompts {model.record.prompts}: open_clip's layout cannot hold them.")
    if model.text_transform.name != "identity":
        raise ConfigError(f"{model.record.name} has text_transform {model.text_transform.name}: open_clip's layout cannot hold it.")


def _save(module: nn.Module, record: ModelRecord, file: Path) -> str:
    """In fp16, readable by all, with the recipe in the file's metadata; the file's sha256."""
    state = {name: value.half() if value.dtype == torch.float32 else value for name, value in module.state_dict().items()}
    recipe = {"method": record.method, "eps_trained": str(record.eps_trained), "base_sha256": str(record.base_sha256)}
    metadata = {f"aft.{key}": value for key, value in recipe.items()}
    save_file({name: value.contiguous() for name, value in state.items()}, file, metadata=metadata)
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
