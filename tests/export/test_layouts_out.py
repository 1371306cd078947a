"""Every format of weights, loaded by the library that it is for, gives the model's logits; what a format cannot hold is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors import safe_open
from torch import nn

from aft.clip import ModelSpec, ZeroShotModel, load_model
from aft.clip.model import ModelRecord
from aft.clip.text_transform import Expansion, Residual
from aft.errors import AftError, ConfigError
from aft.export import FORMATS, export
from tests.export.foreign import TEXTS, TOLERANCES, differences
from tests.export.models import CONFIGS, HELD, as_clip_load_rounds, images_of, with_expansion, with_prompts, with_residual

Make = Callable[[str], ZeroShotModel]
WORDS = {
    "openai": {**dict.fromkeys(CONFIGS, "runs on gelu: clip.load always builds QuickGELU")} | {"quick_vit": "has mean"},
    "hf": dict.fromkeys(CONFIGS, r"the image tower is a .*: transformers' CLIPModel holds a ViT with a class token alone"),
    "llava_tower": dict.fromkeys(CONFIGS, r"the image tower is a .*: transformers' CLIPVisionModel holds a ViT"),
}
CASES = [(kind, tower) for kind in HELD for tower in CONFIGS]


@pytest.mark.parametrize(("kind", "tower"), CASES)
@torch.no_grad()
def test_it_loads_elsewhere_and_says_the_same_or_is_refused(kind: str, tower: str, make: Make, tmp_path: Path) -> None:
    """Embeddings and logits (of a vision tower the features that LLaVA takes) by the other library's own code, and the same tensors when
    it is read back; or the reason, and no folder."""
    model, out = make(tower), tmp_path / "out"
    if tower not in HELD[kind]:
        with pytest.raises(ConfigError, match=WORDS[kind][tower]):
            export(model, kind, out)
        assert not out.exists() and not list(tmp_path.glob(".out*"))
        return
    if kind == "openai":
        as_clip_load_rounds(model)
    model.record = replace(model.record, method="tecoa", eps_trained=2 / 255, logit_scale=float(model.logit_scale))
    export(model, kind, out)
    assert_round_trip(model, kind, out)
    found = differences(model, kind, out, images_of(model))
    assert max(found.values()) <= TOLERANCES[kind], found
    assert found.keys() >= ({"image", "features"} if kind == "llava_tower" else {"image", "text", "logits", "scale"})


def again(model: ZeroShotModel, kind: str, folder: Path) -> ZeroShotModel:
    """By this project's own readers, as a user would name the export."""
    if kind in ("open_clip", "hf"):
        return load_model(ModelSpec(pretrained=str(folder)))
    file = folder / ("model.pt" if kind == "openai" else "model.safetensors")
    return load_model(ModelSpec(model.record.name, str(file)))


def assert_round_trip(model: ZeroShotModel, kind: str, folder: Path) -> None:
    """In again: every tensor to the bit, and the flags that logits would not reveal."""
    back = again(model, kind, folder)
    ours, theirs = model.clip.state_dict(), back.clip.state_dict()
    theirs = theirs if theirs.keys() == ours.keys() else {key if key in ours else f"text.{key}": value for key, value in theirs.items()}
    assert all(torch.equal(ours[key], theirs[key]) for key in ours) and ours.keys() == theirs.keys()
    same = ("resolution", "mean", "std", "activation", "logit_scale")
    assert all(getattr(back.record, key) == pytest.approx(getattr(model.record, key)) for key in same)
    if kind != "openai":
        assert (back.record.method, back.record.eps_trained) == ("tecoa", 2 / 255)


@pytest.mark.parametrize("quick", [True, False])
def test_the_activation_is_said_both_ways(quick: bool, make: Make, tmp_path: Path) -> None:
    """In the configurations, and in the modules that other libraries build from them: logits of a small tower would not show it."""
    from transformers import CLIPModel

    model = make("quick_vit" if quick else "vit")
    export(model, "open_clip", tmp_path / "a")
    export(model, "hf", tmp_path / "b")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'a'}")
    kinds = {type(block.mlp.gelu).__name__ for tower in (theirs.visual, theirs) for block in tower.transformer.resblocks}
    assert kinds == {"QuickGELU" if quick else "GELU"}
    config = CLIPModel.from_pretrained(tmp_path / "b").config
    assert config.vision_config.hidden_act == config.text_config.hidden_act == ("quick_gelu" if quick else "gelu")
    assert config.text_config.eos_token_id == 49407


def test_mean_std_and_scale_are_the_models_own(make: Make, tmp_path: Path) -> None:
    """In both configurations, not the usual ones; and where they are the usual ones, those."""
    for name in ("vit", "openai_vit"):
        model = make(name)
        export(model, "open_clip", tmp_path / f"{name}_a")
        export(model, "hf", tmp_path / f"{name}_b")
        stored = json.loads((tmp_path / f"{name}_a" / "open_clip_config.json").read_text())["preprocess_cfg"]
        processor = json.loads((tmp_path / f"{name}_b" / "preprocessor_config.json").read_text())
        assert tuple(stored["mean"]) == tuple(processor["image_mean"]) == model.record.mean
        assert tuple(stored["std"]) == tuple(processor["image_std"]) == model.record.std
        assert json.loads((tmp_path / f"{name}_b" / "export.json").read_text())["model"]["logit_scale"] == pytest.approx(20, rel=1e-6)


@pytest.mark.parametrize("kind", ["open_clip", "openai", "hf", "llava_tower"])
def test_tied_and_turned_tensors_are_written_one_by_one(kind: str, make: Make, tmp_path: Path) -> None:
    """safetensors takes neither shared memory nor other strides: a tied norm and a projection that is a view of its transpose."""
    model = make("openai_vit")
    visual: Any = model.visual
    visual.transformer.resblocks[1].ln_1 = visual.transformer.resblocks[0].ln_1
    visual.proj = nn.Parameter(visual.proj.detach().T.contiguous().T, requires_grad=False)
    assert not visual.proj.is_contiguous()
    export(model, kind, tmp_path / "out")
    back = again(model, kind, tmp_path / "out")
    images = images_of(model)
    ours, theirs = (one(images, one.encode_text(TEXTS)) for one in (model, back))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_half_halves_the_file_and_is_said(make: Make, tmp_path: Path) -> None:
    """For transformers also in its configuration."""
    model = make("vit")
    for half in (False, True):
        export(model, "hf", tmp_path / str(half), half=half)
    sizes = [(tmp_path / str(half) / "model.safetensors").stat().st_size for half in (True, False)]
    assert 0.49 < sizes[0] / sizes[1] < 0.52
    assert json.loads((tmp_path / "True" / "config.json").read_text())["dtype"] == "float16"
    assert "stored in fp16" in (tmp_path / "True" / "README.md").read_text()
    with pytest.raises(ConfigError, match="--half: torch_export is a graph in fp32"):
        export(model, "torch_export", tmp_path / "x", half=True)


def test_the_recipe_is_in_the_file(make: Make, tmp_path: Path) -> None:
    """Method and radius travel with the tensors, not only with the folder."""
    model = make("vit")
    model.record = replace(model.record, method="fare", eps_trained=4 / 255)
    export(model, "hf", tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as opened:
        said = opened.metadata()
    assert said == {"format": "pt", "aft.method": "fare", "aft.eps_trained": str(4 / 255), "aft.base_sha256": "None"}


EXTRAS = {"visual prompts": with_prompts, "text_transform expansion": with_expansion, "text_transform residual": with_residual}


@pytest.mark.parametrize("words", EXTRAS)
@pytest.mark.parametrize("kind", ["open_clip", "openai", "hf", "llava_tower"])
def test_what_a_layout_has_no_place_for_is_refused(kind: str, words: str, make: Make, tmp_path: Path) -> None:
    """Never dropped in silence; a vision tower alone has no texts to transform, and says so."""
    model = EXTRAS[words](make("openai_vit"))
    if kind == "llava_tower" and "text_transform" in words:
        export(model, kind, tmp_path / "out")
        assert "text transformation that it was trained with is not in a vision tower" in (tmp_path / "out" / "README.md").read_text()
        return
    with pytest.raises(ConfigError, match=f"{words}.*cannot hold.*--format onnx or torch_export"):
        export(model, kind, tmp_path / "out")


def test_a_transformation_that_does_nothing_needs_no_place(make: Make, tmp_path: Path) -> None:
    """A residual that has learned nothing yet is the identity; an expansion by 1 too."""
    model = make("vit")
    idle = Expansion(model.width)
    idle.get_buffer("gain").fill_(1.0)
    for number, transform in enumerate((Residual(model.width).requires_grad_(False), idle)):
        model.text_transform = transform
        export(model, "hf", tmp_path / str(number))
        assert max(differences(model, "hf", tmp_path / str(number), images_of(model)).values()) <= TOLERANCES["hf"]


@pytest.mark.parametrize(
    ("kind", "part", "settings", "words"),
    [
        ("hf", "vision_cfg", {"pool_type": "avg"}, "vision_cfg.pool_type = 'avg'"),
        ("hf", "vision_cfg", {"no_ln_pre": True}, "vision_cfg.no_ln_pre = True"),
        ("hf", "text_cfg", {"no_causal_mask": True}, "text_cfg.no_causal_mask = True"),
        ("hf", "vision_cfg", {"norm_kwargs": {"eps": 1e-6, "bias": False}}, "transformers' CLIPModel has eps alone"),
        ("hf", "text_cfg", {"vocab_size": 512}, "a vocabulary of 512"),
        ("openai", "vision_cfg", {"head_width": 32}, r"vision_cfg.head_width = 32 \(usually 64\): OpenAI's layout has no place"),
        ("openai", "vision_cfg", {"mlp_ratio": 2.0}, "vision_cfg.mlp_ratio = 2.0"),
        ("openai", "text_cfg", {"heads": 2}, "2 heads for a width of 64: OpenAI's layout always has one head for 64"),
        ("llava_tower", "vision_cfg", {"pool_type": "avg"}, "vision_cfg.pool_type = 'avg'"),
    ],
)
def test_settings_that_leave_no_tensor_are_looked_at(
    kind: str, part: str, settings: dict[str, Any], words: str, make: Make, tmp_path: Path
) -> None:
    """They change the function and no name: only the configuration tells."""
    model = make("openai_vit")
    config: Any = model.record.config
    model.record = replace(model.record, config={**config, part: {**config[part], **settings}})
    with pytest.raises(ConfigError, match=words):
        export(model, kind, tmp_path / "out")


def test_other_pixels_have_no_place_in_clip_load(make: Make, tmp_path: Path) -> None:
    """Its preprocessing is written into the package."""
    model = make("openai_vit")
    model.record = replace(model.record, std=(0.25, 0.25, 0.25))
    with pytest.raises(ConfigError, match=r"has std = \(0.25, 0.25, 0.25\): clip.load's preprocessing has"):
        export(model, "openai", tmp_path / "out")


def test_other_towers_have_no_place_in_clip_load(make: Make, tmp_path: Path) -> None:
    """Also where activation and pixels are OpenAI's: it would not find its tensors."""
    model, usual = make("timm_vit"), make("openai_vit").record
    model.record = replace(model.record, activation="quick_gelu", mean=usual.mean, std=usual.std)
    with pytest.raises(ConfigError, match="the image tower is a VisionTransformer of timm: OpenAI's layout holds OpenAI's ViT and ResNet"):
        export(model, "openai", tmp_path / "out")


def test_bad_requests(model: ZeroShotModel, tmp_path: Path) -> None:
    """Unknown format, a folder with something in it, a file in its place, classes without a head."""
    from aft.export import Head

    with pytest.raises(ConfigError, match="unknown format 'open-clip': did you mean 'open_clip'"):
        export(model, "open-clip", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        export(model, "open_clip", tmp_path / "full")
    assert (tmp_path / "full" / "x").read_text() == "mine"
    with pytest.raises(ConfigError, match="is a file"):
        export(model, "open_clip", tmp_path / "full" / "x")
    with pytest.raises(ConfigError, match="cannot be made .*: give one in a place where you may write"):
        export(model, "open_clip", tmp_path / "full" / "x" / "below")
    with pytest.raises(ConfigError, match="has no class head"):
        export(model, "hf", tmp_path / "out", head=Head(("cat", "dog")))
    (tmp_path / "empty").mkdir()
    export(model, "open_clip", tmp_path / "empty")
    assert (tmp_path / "empty" / "README.md").is_file() and set(FORMATS) == {*HELD, "onnx", "torch_export"}


def test_nothing_half_written_stays(model: ZeroShotModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full in the middle, and weights that are read back wrong: neither the folder nor what was beside it remains."""
    from aft.export import check, layouts

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(layouts, "write_processor", full)
        with pytest.raises(OSError, match="no space"):
            export(model, "hf", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    right = layouts.plain_names
    with monkeypatch.context() as patch:
        patch.setattr(layouts, "plain_names", lambda model: {key: value + 0.01 for key, value in right(model).items()})
        with pytest.raises(AftError, match="differs from the model by"):
            export(model, "hf", tmp_path / "out")
    assert not list(tmp_path.iterdir()) and check.TOLERANCE == 1e-5


def test_a_record_is_all_plain_values(model: ZeroShotModel, tmp_path: Path) -> None:
    """export.json has every field of the record but the architecture, which the layout's own configuration has."""
    export(model, "open_clip", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "export.json").read_text())
    assert set(told["model"]) == set(ModelRecord.__dataclass_fields__) - {"config", "sha256", "layout"}
    assert told["source_sha256"] == model.record.sha256 and told["largest_difference"] <= 1e-5
