"""Small image towers of every kind, with random weights, in open_clip's folder layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from aft.clip import weights

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
TIMM = {"timm_proj": "linear", "timm_pool": "", "image_size": 32}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 32, "layers": 3, "width": 32, "patch_size": 8, "head_width": 16},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "timm_vit": {**TIMM, "timm_model_name": "test_vit"},  # a class token
    "timm_avg": {**TIMM, "timm_model_name": "test_vit2", "timm_pool": "avg"},  # a mean over patches, beside a register token
    "siglip": {**TIMM, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160},  # an attention pool
    "convnext": {**TIMM, "timm_model_name": "test_convnext2", "timm_pool": "avg", "image_size": 64},
}
WIDTH = {"siglip": 96}  # without a projection the embedding is as wide as the tower


def register(patch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """Makes the towers known by name for one test."""
    for name, vision in VISION.items():
        config = {"embed_dim": WIDTH.get(name, 16), "vision_cfg": vision, "text_cfg": TEXT}
        (folder / name).mkdir()
        stored = {"model_cfg": config, "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}}
        (folder / name / "open_clip_config.json").write_text(json.dumps(stored))
        patch.setitem(weights.EMBEDDED, name, folder / name)
    return list(VISION)


def shake(module: nn.Module, seed: int = 0) -> None:
    """Random norms, biases and statistics: zeros and ones of a new network would hide faults."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.3 * torch.rand(buffer.shape, generator=noise))
