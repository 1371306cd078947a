"""Every published layout gives the source's logits; what is no known layout, or holds two models, is refused."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aft.clip import ModelSpec, ZeroShotModel, load_model, weights
from aft.clip.layouts import detect, without_prefixes
from aft.clip.pack import pack
from aft.errors import WeightsError
from tests.conftest import TINY

State = dict[str, Tensor]
NAMES, TEMPLATES = ("cat", "dog", "ship"), ("a {}", "the {}.")
SIZE = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 2}


def logits(model: ZeroShotModel) -> Tensor:
    """Of fixed random images."""
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return model(images, model.text_bank(NAMES, TEMPLATES))


def assert_same(loaded: ZeroShotModel, expected: ZeroShotModel) -> None:
    """The same logits, in fp32."""
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=1e-6, atol=1e-6)
    assert {value.dtype for value in loaded.clip.state_dict().values() if value.is_floating_point()} == {torch.float32}


@pytest.fixture
def robust(model: ZeroShotModel) -> ZeroShotModel:
    """The tiny CLIP with another image tower: what a fine-tuning leaves behind."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.visual.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return changed


def tower(model: ZeroShotModel) -> State:
    """The image tower alone, bare names."""
    return dict(model.visual.state_dict())


VISUAL: dict[str, tuple[str, Callable[[State], Mapping[str, Any]]]] = {
    "TeCoA": ("vision_encoder_state_dict/vit_visual", lambda s: {"epoch": 3, "optimizer": {}, "vision_encoder_state_dict": s}),
    "TeCoA, first of two": (
        "vision_encoder_state_dict/vit_visual", lambda s: {"state_dict": {"x": torch.ones(1)}, "vision_encoder_state_dict": s},
    ),
    "AdvFLYP": ("partial_state_dict/vit_visual", lambda s: {"partial_state_dict": {f"visual.{k}": v for k, v in s.items()}}),
    "AGFT": ("modules.clip.visual/vit_visual", lambda s: {"modules": {"clip.visual": s}, "params": {"image_prompt": torch.ones(2)}}),
    "RobustVLM": ("vit_visual", lambda s: s),
    "model": ("vit_visual", lambda s: {"model": s, "epoch": 1}),
}


@pytest.mark.parametrize("kind", VISUAL)
def test_an_image_tower_alone_takes_the_rest_from_the_base(kind: str, tmp_path: Path, model: ZeroShotModel, robust: ZeroShotModel) -> None:
    """New image tower, the base's text tower, logit scale and preprocessing; both files are in the record."""
    layout, wrap = VISUAL[kind]
    torch.save(wrap(tower(robust)), tmp_path / "x.pt")
    loaded = load_model(ModelSpec("tiny", str(tmp_path / "x.pt")))
    assert_same(loaded, robust)
    assert not torch.allclose(logits(loaded), logits(model), atol=1e-3)
    assert (loaded.record.layout, loaded.record.base_sha256) == (layout, model.record.sha256)
    assert loaded.record.sha256 == weights.file_hash(tmp_path / "x.pt")
    assert replace(loaded.record, layout="", sha256="", base_sha256=None) == replace(model.record, layout="", sha256="")


PREFIXES = ["", "module.", "model.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.model.", "visual.", "module.visual.",
            "visual.module."]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_an_image_tower_come_off(prefix: str, tmp_path: Path, robust: ZeroShotModel) -> None:
    """In any order and number, before and after ``visual.``."""
    torch.save({prefix + key: value for key, value in tower(robust).items()}, tmp_path / "x.pt")
    assert_same(load_model(ModelSpec("tiny", str(tmp_path / "x.pt"))), robust)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "model."])
def test_prefixes_of_a_whole_model_come_off_and_visual_stays(prefix: str, tmp_path: Path, robust: ZeroShotModel) -> None:
    """A whole CLIP has ``visual.`` in its names; nothing is taken from a base."""
    torch.save({"state_dict": {prefix + key: value for key, value in robust.clip.state_dict().items()}}, tmp_path / "x.pt")
    loaded = load_model(ModelSpec("tiny", str(tmp_path / "x.pt")))
    assert_same(loaded, robust)
    assert (loaded.record.layout, loaded.record.base_sha256) == ("open_clip", None)


def test_the_logit_scale_of_a_partial_file_wins_over_the_bases(tmp_path: Path, robust: ZeroShotModel) -> None:
    """A file of trained parameters may hold the scale beside the image tower."""
    state = {f"visual.{key}": value for key, value in tower(robust).items()} | {"logit_scale": torch.tensor(7.0).log()}
    torch.save({"partial_state_dict": state}, tmp_path / "x.pt")
    assert load_model(ModelSpec("tiny", str(tmp_path / "x.pt"))).record.logit_scale == pytest.approx(7.0)


def test_openais_own_names_in_fp16(tmp_path: Path, robust: ZeroShotModel) -> None:
    """The numbers beside the tensors are dropped, the tensors become fp32."""
    state = {key: value.half() for key, value in robust.clip.state_dict().items()}
    extra = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(16), "vocab_size": torch.tensor(49408)}
    torch.save(state | extra, tmp_path / "x.pt")
    loaded = load_model(ModelSpec("tiny", str(tmp_path / "x.pt")))
    robust.clip.load_state_dict({key: value.float() for key, value in state.items()})
    assert_same(loaded, robust)
    assert loaded.record.layout == "openai"


def with_config(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Path:
    """An embedded model of the tiny configuration with changes, its weights random."""
    target = folder / name
    target.mkdir()
    config = copy.deepcopy(TINY["model_cfg"]) | {key: value for key, value in changes.items() if key != "vision_cfg"}
    config["vision_cfg"] |= changes.get("vision_cfg", {})
    (target / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": TINY["preprocess_cfg"]}))
    save_file(weights.build_clip(config).state_dict(), target / "open_clip_model.safetensors")
    monkeypatch.setitem(weights.EMBEDDED, name, target)
    return target


@pytest.mark.parametrize("custom", [True, False])
def test_text_towers_under_text_load_into_both_classes(
    custom: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, robust: ZeroShotModel
) -> None:
    """open_clip has two classes for one model; a file of either loads into either."""
    with_config("other", tmp_path, monkeypatch, custom_text=custom)
    state = robust.clip.state_dict()
    names = {key: key if key.startswith(("visual.", "logit_scale")) else f"text.{key}" for key in state}
    for layout, contents in (("open_clip", state), ("custom_text", {names[key]: value for key, value in state.items()})):
        torch.save(contents, tmp_path / "x.pt")
        loaded = load_model(ModelSpec("other", str(tmp_path / "x.pt")))
        assert isinstance(loaded.clip, open_clip.CustomTextCLIP) == custom and loaded.record.layout == layout
        assert_same(loaded, robust)


def test_a_resnet_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ModifiedResNet with its running statistics, as in the RN50 weights of APT and CLIP_AFT."""
    with_config("rn", tmp_path, monkeypatch, vision_cfg={"layers": [1, 1, 1, 1], "width": 16, "patch_size": None})
    source = load_model("rn")
    with torch.no_grad():
        for name, value in source.visual.state_dict().items():
            if value.is_floating_point() and "running_var" not in name:
                value.add_(0.05 * torch.rand(value.shape, generator=torch.Generator().manual_seed(3)))
    torch.save({"vision_encoder_state_dict": tower(source)}, tmp_path / "x.pth.tar")
    loaded = load_model(ModelSpec("rn", str(tmp_path / "x.pth.tar")))
    assert_same(loaded, source)
    assert loaded.record.layout == "vision_encoder_state_dict/resnet_visual"


def transformers_clip(activation: str, folder: Path, eps: float = 1e-5) -> Any:
    """A random CLIPModel of transformers at the tiny model's sizes, saved."""
    transformers = pytest.importorskip("transformers")
    both = SIZE | {"hidden_act": activation, "projection_dim": 16, "layer_norm_eps": eps}
    torch.manual_seed(4)
    config = transformers.CLIPConfig(
        vision_config=both | {"image_size": 32, "patch_size": 8},
        text_config=both | {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 1, "max_position_embeddings": 16},
        projection_dim=16,
    )
    clip = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    clip.save_pretrained(folder)
    return clip


@pytest.mark.parametrize(("activation", "eps"), [("gelu", 1e-5), ("quick_gelu", 1e-5), ("quick_gelu", 1e-2)])
def test_a_transformers_folder_gives_transformers_embeddings(activation: str, eps: float, tmp_path: Path) -> None:
    """Images, texts and logits; sizes, activation and normalisation come from the folder's own files."""
    theirs = transformers_clip(activation, tmp_path / "small-clip", eps)
    (tmp_path / "small-clip" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    ours = load_model(ModelSpec(pretrained=str(tmp_path / "small-clip")))
    images, texts = torch.rand(4, 3, 32, 32), ours.tokenizer(["a cat", "the dog.", "a ship at sea"])
    expected = theirs(input_ids=texts, pixel_values=(images - 0.5) / 0.25)
    unit_text = ours.encode_text(["a cat", "the dog.", "a ship at sea"])
    torch.testing.assert_close(ours.encode(images).unit_BD, expected.image_embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(unit_text, expected.text_embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(images, unit_text), expected.logits_per_image, rtol=1e-5, atol=1e-4)
    record = ours.record
    assert (record.name, record.layout, record.activation, record.mean) == ("small-clip", "transformers", activation, (0.5, 0.5, 0.5))


def test_a_transformers_folder_with_two_activations_is_refused(tmp_path: Path) -> None:
    """open_clip's towers share one."""
    transformers_clip("gelu", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["hidden_act"] = "quick_gelu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"activations \['gelu', 'quick_gelu'\]"):
        load_model(ModelSpec(pretrained=str(tmp_path)))


def test_transformers_image_tower_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIPVisionModelWithProjection's names, with the old position numbers, over a base."""
    clip = transformers_clip("gelu", tmp_path / "hf")
    with_config("other", tmp_path, monkeypatch, vision_cfg={"mlp_ratio": 2.25})
    state = {key: value for key, value in clip.state_dict().items() if key.startswith(("vision_model.", "visual_projection."))}
    torch.save(state | {"vision_model.embeddings.position_ids": torch.arange(17)}, tmp_path / "x.bin")
    loaded, images = load_model(ModelSpec("other", str(tmp_path / "x.bin"))), torch.rand(2, 3, 32, 32)
    expected = clip.get_image_features(pixel_values=loaded.pixels(images))
    expected = expected if isinstance(expected, Tensor) else expected.pooler_output
    torch.testing.assert_close(loaded.encode(images).embedding_BD, expected, rtol=1e-5, atol=1e-5)
    assert loaded.record.layout == "transformers_visual"


def test_a_query_without_its_key_is_reported(tmp_path: Path) -> None:
    """Nothing is fused from parts, and nothing is left out without a word."""
    transformers_clip("gelu", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("vision_model.encoder.layers.1.self_attn.k_proj.weight")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"1 missing: visual.transformer.resblocks.1.attn.in_proj_weight; 2 unexpected: .*q_proj"):
        load_model(ModelSpec(pretrained=str(tmp_path)))


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt"])
def test_an_open_clip_folder_brings_its_own_architecture(suffix: str, tiny_folder: Path, tmp_path: Path, model: ZeroShotModel) -> None:
    """Whatever the default name is; what ``pack`` writes is such a folder."""
    folder = tmp_path / "my-clip"
    pack(model, folder)
    half = load_model(ModelSpec(pretrained=str(folder)))
    if suffix != "safetensors":
        torch.save(load_file(folder / "open_clip_model.safetensors"), folder / f"open_clip_pytorch_model.{suffix}")
        (folder / "open_clip_model.safetensors").unlink()
    loaded = load_model(ModelSpec(pretrained=str(folder)))
    assert_same(loaded, half)
    assert replace(loaded.record, sha256="") == replace(half.record, sha256="") and loaded.record.name == "my-clip"
    assert loaded.record.mean == model.record.mean and loaded.record.config == model.record.config


def test_a_folder_must_fit_the_name_that_it_is_given(tiny_folder: Path) -> None:
    """A wrong name would bring a wrong tokenizer and a wrong card; an unknown one is not passed over."""
    with pytest.raises(WeightsError, match="the file has width 32, ViT-B-32 has 768"):
        load_model(ModelSpec("ViT-B-32", str(tiny_folder)))
    with pytest.raises(WeightsError, match="did you mean .*ViT-B-32"):
        load_model(ModelSpec("ViT-B32", str(tiny_folder)))


def test_a_folder_without_weights_or_with_damaged_settings_is_named(tmp_path: Path) -> None:
    """The message lists the files looked for."""
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"should hold one of open_clip_model\.safetensors"):
        load_model(ModelSpec(pretrained=str(tmp_path)))
    torch.save({"visual.proj": torch.ones(1), "token_embedding.weight": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"config\.json cannot be read as JSON"):
        load_model(ModelSpec(pretrained=str(tmp_path)))


def test_the_base_may_be_a_folder_or_a_file(tiny_folder: Path, tmp_path: Path, robust: ZeroShotModel) -> None:
    """The base's folder decides the architecture, whatever the name."""
    torch.save(tower(robust), tmp_path / "x.pt")
    for name, base in (("miniclip32", tiny_folder), ("tiny", tiny_folder / "open_clip_model.safetensors")):
        assert_same(load_model(ModelSpec(name, str(tmp_path / "x.pt"), base=str(base))), robust)


def test_the_base_is_asked_for_and_not_passed_over(tmp_path: Path, tiny_folder: Path, robust: ZeroShotModel) -> None:
    """Without a text side there is no zero-shot model; with one, a base would be ignored."""
    torch.save(tower(robust), tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="holds an image tower alone: set base .* a tag such as openai"):
        load_model(ModelSpec("ViT-B-32", str(tmp_path / "x.pt"), activation="quick_gelu"))
    for spec in (ModelSpec("tiny", base="openai"), ModelSpec("tiny", str(tiny_folder), base="openai")):
        with pytest.raises(WeightsError, match="leave base out"):
            load_model(spec)


def test_an_image_tower_of_another_input_size_is_interpolated_when_asked(tmp_path: Path, robust: ZeroShotModel) -> None:
    """From the file's grid to the one asked for, over the base's text side."""
    larger = load_with_warning(ModelSpec("tiny", image_size=48))
    torch.save(tower(larger), tmp_path / "x.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the file's own size: nothing is interpolated
        loaded = load_model(ModelSpec("tiny", str(tmp_path / "x.pt"), image_size=48))
    assert_same(loaded, larger)
    assert load_with_warning(ModelSpec("tiny", str(tmp_path / "x.pt"), image_size=64)).record.resolution == 64


def load_with_warning(spec: ModelSpec) -> ZeroShotModel:
    """Loads a model whose positions are interpolated."""
    with pytest.warns(UserWarning, match="position embedding is interpolated"):
        return load_model(spec)


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ({"add_prompter": {}, "state_dict": {"module.pad_up": torch.ones(2)}}, "inside: module.pad_up"),  # TeCoA's visual prompts
        ({"weights": {"a": torch.ones(2)}, "epoch": 3}, "First names found: weights, epoch"),
        ({}, "First names found: nothing"),
        ({"class_embedding": 3, "conv1.weight": "x"}, "First names found: class_embedding, conv1.weight"),
    ],
)
def test_an_unknown_layout_says_what_was_looked_for_and_found(contents: dict[str, Any], words: str) -> None:
    """The names tell a user what kind of file this is."""
    with pytest.raises(WeightsError, match=r"Looked for the parts vision_encoder_state_dict, partial_state_dict.*" + words):
        detect(contents, "x.pt")


def test_nothing_beside_a_known_layout_is_dropped(tmp_path: Path, robust: ZeroShotModel) -> None:
    """A tensor that no model has is reported, not ignored."""
    torch.save({f"visual.{key}": value for key, value in tower(robust).items()} | {"head.weight": torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="1 unexpected: head.weight"):
        load_model(ModelSpec("tiny", str(tmp_path / "x.pt")))


def test_a_file_with_two_models_is_refused() -> None:
    """Taking prefixes off must not let one overwrite the other."""
    with pytest.raises(WeightsError, match="holds visual.proj twice, once under module.visual.proj"):
        without_prefixes({"visual.proj": 1, "module.visual.proj": 2}, "x.pt")


def test_a_compiled_part_inside_a_tower_is_found() -> None:
    """torch.compile of the transformer alone leaves its mark in the middle of names."""
    state = {"module.visual.transformer._orig_mod.resblocks.0.ln_1.bias": 1}
    assert list(without_prefixes(state, "x.pt")) == ["visual.transformer.resblocks.0.ln_1.bias"]
