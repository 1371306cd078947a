"""Writes a checkpoint as a folder in open_clip's layout: ``python -m aft.clip.pack CHECKPOINT FOLDER``.

This is how the embedded MiniCLIP was made from its pre-training run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from aft.clip.files import file_hash
from aft.clip.model import ZeroShotModel
from aft.clip.weights import ModelSpec, load_model
from aft.errors import AftError, ConfigError


def pack(model: ZeroShotModel, folder: Path) -> str:
    """Writes ``open_clip_config.json`` and ``open_clip_model.safetensors``, in fp16 to halve the size.

    Returns:
        sha256 of the weights file.

    Raises:
        ConfigError: the model has visual prompts or a text transformation, which this layout has no place for.
    """
    if model.record.prompts is not None:
        raise ConfigError(f"{model.record.name} has visual prompts {model.record.prompts}: open_clip's layout cannot hold them.")
    if model.text_transform.name != "identity":
        raise ConfigError(f"{model.record.name} has text_transform {model.text_transform.name}: open_clip's layout cannot hold it.")
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": list(model.record.mean), "std": list(model.record.std), "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": model.record.config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {name: value.half().contiguous() if value.dtype == torch.float32 else value for name, value in model.clip.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return file_hash(folder / "open_clip_model.safetensors")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m aft.clip.pack CHECKPOINT FOLDER")
    try:
        print(f"{sys.argv[2]}: sha256 {pack(load_model(ModelSpec(pretrained=sys.argv[1])), Path(sys.argv[2]))}")
    except AftError as error:
        sys.exit(f"error: {error}")
