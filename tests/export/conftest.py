"""Small CLIPs of every kind that an export may meet, with random weights that hide no fault."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from aft.clip import ZeroShotModel, load_model, weights
from tests.towers import TEXT, VISION, WIDTH, shake

OPENAI = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
OTHER = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
OPENAI_TEXT = TEXT | {"width": 64, "heads": 1}
QUICK = {"text_cfg": OPENAI_TEXT, "quick_gelu": True}
#: name -> what differs from a configuration with open_clip's activation and the small text tower.
CONFIGS: dict[str, dict[str, Any]] = {name: {"vision_cfg": vision} for name, vision in VISION.items()} | {
    "quick_vit": {"vision_cfg": VISION["vit"], "quick_gelu": True},
    "openai_vit": {"vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}, **QUICK},
    "openai_resnet": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}, **QUICK},
    "custom_text": {"vision_cfg": VISION["vit"], "custom_text": True},
}


def folder_of(name: str, folder: Path) -> Path:
    """A model of this name in open_clip's layout, written by hand."""
    changes = copy.deepcopy(CONFIGS[name])
    config = {"embed_dim": WIDTH.get(name, 16), "text_cfg": copy.deepcopy(TEXT), **changes}
    (folder / name).mkdir()
    preprocess = OPENAI if name.startswith("openai") else OTHER
    (folder / name / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = weights.build_clip(config)
    shake(clip)
    with torch.no_grad():
        clip.get_parameter("logit_scale").fill_(torch.tensor(20.0).log())
        for name_, parameter in clip.named_parameters():
            if "proj" in name_ and parameter.ndim == 2:
                parameter.mul_(3)
    save_file(clip.state_dict(), folder / name / "open_clip_model.safetensors")
    return folder / name


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ZeroShotModel]:
    """``make(name)``: that model, which is also known by its name."""

    def made(name: str) -> ZeroShotModel:
        """Loaded."""
        monkeypatch.setitem(weights.EMBEDDED, name, folder_of(name, tmp_path))
        return load_model(name)

    return made


def images_of(model: ZeroShotModel, n: int = 3) -> torch.Tensor:
    """Fixed random pixels in [0, 1] at the model's own size."""
    side = model.record.resolution
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(5))


TEXTS = ["a photo of a cat.", "waves on the sea at night, and a ship", "two dogs"]
