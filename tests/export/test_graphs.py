"""Graphs in ONNX and of torch.export: pixels in [0, 1] in, the model's embedding and logits out, defence and normalisation inside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aft.clip import ZeroShotModel
from aft.clip.stages import Gate, Stage, Stages, encode_in_stages
from aft.errors import ConfigError, WeightsError
from aft.export import Head, export, graphs
from tests.export.foreign import TEXTS, TOLERANCES, run_onnx, run_torch_export
from tests.export.models import CONFIGS, images_of, with_expansion, with_prompts, with_residual

Make = Callable[[str], ZeroShotModel]
HEAD = Head(("cat", "dog", "ship"), ("a {}.", "the {}."))


RUN = {"onnx": (run_onnx, TOLERANCES["onnx"]), "torch_export": (run_torch_export, TOLERANCES["torch_export"])}


@torch.no_grad()
def assert_graph(model: ZeroShotModel, kind: str, folder: Path, head: Head) -> dict[str, str]:
    """Five images and one, on graphs that were traced with two; the image graph's metadata."""
    run, tolerance = RUN[kind]
    for n in (5, 1):
        images = images_of(model, n)
        found, said = run(folder, "image", images)
        expected = encode_in_stages(model, images)
        torch.testing.assert_close(F.normalize(found[0], dim=-1), expected.unit_BD, rtol=0, atol=tolerance)
        assert len(found) == (2 if head.classes else 1)
        if head.classes:
            logits = model.undefended.logits(expected, model.text_bank(head.classes, head.templates))
            torch.testing.assert_close(found[1], logits, rtol=0, atol=tolerance * float(model.logit_scale))
    return said


# Both runtimes on one tower of each family; torch.export, which is what the ONNX graph is made from, on all.
@pytest.mark.parametrize(
    ("kind", "tower"), [("onnx", "vit"), ("onnx", "resnet"), ("onnx", "timm_avg"), *(("torch_export", name) for name in CONFIGS)]
)
def test_a_graph_says_what_the_model_says(kind: str, tower: str, make: Make, tmp_path: Path) -> None:
    """Embedding, logits over baked classes, and text embeddings, at any batch size; and it says what it takes."""
    model = make(tower)
    export(model, kind, tmp_path / "out", head=HEAD)
    said = assert_graph(model, kind, tmp_path / "out", HEAD)
    side = model.record.resolution
    assert said["aft.input"].startswith(f"pixels: float32 [batch, 3, {side}, {side}], RGB in [0, 1]; normalisation is inside")
    facts = json.loads(said["aft"])
    assert facts["model"]["mean"] == list(model.record.mean) and facts["classes"] == list(HEAD.classes)
    assert float(said["aft.logit_scale"]) == pytest.approx(float(model.logit_scale), rel=1e-6)
    run, tolerance = RUN[kind]
    tokens = model.tokenizer(TEXTS)
    found = F.normalize(run(tmp_path / "out", "text", tokens)[0][0], dim=-1)
    torch.testing.assert_close(found, model.encode_text(TEXTS), rtol=0, atol=tolerance)


@pytest.mark.parametrize("change", [with_expansion, with_residual])
def test_transformed_texts_are_baked_into_the_head(change: Callable[[ZeroShotModel], ZeroShotModel], make: Make, tmp_path: Path) -> None:
    """Their logits are the model's own; without classes there is nothing to bake them into, and no text graph gives raw texts away."""
    model = change(make("vit"))
    with pytest.raises(ConfigError, match="text_transform .* is not linear: give --classes"):
        export(model, "torch_export", tmp_path / "out")
    export(model, "torch_export", tmp_path / "out", head=HEAD)
    assert_graph(model, "torch_export", tmp_path / "out", HEAD)
    raw = model.undefended.logits(model.encode(images_of(model)), model.raw_bank(HEAD.classes, HEAD.templates))
    found, _ = run_torch_export(tmp_path / "out", "image", images_of(model))
    assert (found[1] - raw).abs().max() > 0.1 and not (tmp_path / "out" / "text.pt2").exists()


def test_visual_prompts_are_inside(make: Make, tmp_path: Path) -> None:
    """Hooks of the tower are part of its graph."""
    model = with_prompts(make("vit"))
    export(model, "torch_export", tmp_path / "out")
    assert_graph(model, "torch_export", tmp_path / "out", Head())


class Staged(ZeroShotModel):
    """A model with stages of the test's choice around it."""

    def __init__(self, model: ZeroShotModel, stages: Stages) -> None:
        super().__init__(model.clip, model.tokenizer, model.record, model.text_transform)
        self.plain, self.around = model, stages
        self.eval()

    @property
    def stages(self) -> Stages:
        """As given."""
        return self.around

    @property
    def undefended(self) -> ZeroShotModel:
        """Without them."""
        return self.plain


def darker(x: Tensor, draw: object) -> Tensor:
    """A pixels stage."""
    return x * 0.5


def towards_a_text(model: ZeroShotModel) -> Callable[..., Tensor]:
    """An embedding stage that asks for a text bank, as CLIPure does."""

    def run(z: Tensor, x: Tensor, draw: object) -> Tensor:
        """Half of the way."""
        return z + torch.linalg.vector_norm(z, dim=-1, keepdim=True) * model.text_bank([""], ("a photo of a {}.",))

    return run


@pytest.mark.parametrize("kind", ["onnx", "torch_export"])
def test_stages_are_part_of_the_graph(kind: str, make: Make, tmp_path: Path) -> None:
    """Pixels stage behind a gate, tower, embedding stage: as ``encode_in_stages`` runs them, with the gate open for some images alone."""
    model = make("vit")
    bright = Stage(darker, gate=lambda x, draw: Gate(x[:, 0, 0, 0], 0.5))
    staged = Staged(model, Stages(bright, Stage(towards_a_text(model))))
    images = images_of(model, 5)
    gate = staged.stages.pixels.gate(images, None).open_n  # type: ignore[union-attr, misc]
    assert gate.any() and not gate.all()
    export(staged, kind, tmp_path / "out", head=HEAD)
    assert_graph(staged, kind, tmp_path / "out", HEAD)
    found = RUN[kind][0](tmp_path / "out", "image", images)[0][0]
    assert (F.normalize(found, dim=-1) - model.encode(images).unit_BD).abs().max() > 0.05
    assert "Staged" in (tmp_path / "out" / "README.md").read_text() and "text_bank" not in vars(model)


def by_gradient(x: Tensor, draw: object) -> Tensor:
    """A stage that takes a gradient at test time."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return x + torch.autograd.grad(leaf.square().sum(), leaf)[0]


REFUSED = {
    "random": (Stage(darker, random=True), "the pixels stage is random: a graph has no counted noise"),
    "coupled": (Stage(lambda x, draw: x - x.mean(0), batch_coupled=True), "result depends on its neighbours"),
    "decides": (Stage(lambda x, draw: x if float(x.mean()) > 2 else x / 2), "cannot be written as a graph"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_stages_that_no_graph_can_hold_are_refused(name: str, make: Make, tmp_path: Path) -> None:
    """With the reason, and no folder."""
    stage, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words):
        export(Staged(make("vit"), Stages(stage)), "torch_export", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stage_that_takes_gradients_is_right_or_refused(make: Make, tmp_path: Path) -> None:
    """Whatever a version of torch makes of it, nothing wrong leaves."""
    staged = Staged(make("vit"), Stages(Stage(by_gradient)))
    try:
        export(staged, "torch_export", tmp_path / "out")
    except (ConfigError, WeightsError):
        assert not (tmp_path / "out").exists()
    else:
        assert_graph(staged, "torch_export", tmp_path / "out", Head())


@pytest.mark.parametrize("kind", ["open_clip", "openai", "hf", "llava_tower"])
def test_weights_do_not_hold_a_defence(kind: str, make: Make, tmp_path: Path) -> None:
    """It would be lost in silence."""
    staged = Staged(make("openai_vit"), Stages(Stage(darker)))
    with pytest.raises(ConfigError, match=r"test-time defence \(pixels stage\): .* holds weights alone"):
        export(staged, kind, tmp_path / "out")


def test_a_missing_extra_is_named(model: ZeroShotModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written."""
    found = graphs.importlib.util.find_spec
    monkeypatch.setattr(graphs.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(ConfigError, match=r"needs onnxscript: install the extra onnx"):
        export(model, "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_says_something_else_does_not_leave(model: ZeroShotModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison before the folder gets its name: here the normalisation is lost on the way."""
    right = graphs.ImageGraph.forward

    def wrong(self: Any, pixels: Tensor) -> tuple[Tensor, ...]:
        """Without the model's pixels."""
        return right(self, (pixels * 0.5).clamp(0, 1))

    monkeypatch.setattr(graphs.ImageGraph, "forward", wrong)
    with pytest.raises(WeightsError, match="differs from the model by"):
        export(model, "torch_export", tmp_path / "out")
    assert not list(tmp_path.iterdir())
