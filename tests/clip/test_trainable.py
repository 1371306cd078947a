"""What learns: exact sets, low-rank updates and their merging, visual prompts, and what is refused."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aft.clip import ModelSpec, TrainableSpec, ZeroShotModel, load_model
from aft.clip.pack import pack
from aft.clip.trainable import LowRank, make_trainable, merge_low_rank
from aft.errors import ConfigError
from tests import towers


@pytest.fixture(autouse=True)
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small towers by name."""
    (tmp_path / "towers").mkdir()
    towers.register(monkeypatch, tmp_path / "towers")


def build(tower: str, dtype: torch.dtype = torch.float64, **settings: Any) -> ZeroShotModel:
    """A small tower in which ``settings`` learn; the same weights for the same name."""
    torch.manual_seed(0)
    model = load_model(ModelSpec(tower, "random"))
    towers.shake(model.visual)
    make_trainable(model, TrainableSpec(**settings))
    return model.to(dtype)


def learning(model: ZeroShotModel) -> set[str]:
    return {name for name, parameter in model.clip.named_parameters() if parameter.requires_grad}


def images(model: ZeroShotModel, count: int = 2) -> Tensor:
    dtype = next(model.parameters()).dtype
    side = model.record.resolution
    return torch.rand(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def randomise(model: ZeroShotModel) -> None:
    """As after some training: nothing that learns is zero."""
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.visual.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))


BLOCK = {
    "ln_1.weight", "ln_1.bias", "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias",
    "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
}  # fmt: skip
MATRICES = {
    "attention": ("attn.parametrizations.in_proj_weight", "attn.out_proj.parametrizations.weight"),
    "mlp": ("mlp.c_fc.parametrizations.weight", "mlp.c_proj.parametrizations.weight"),
}


def blocks(*places: int) -> set[str]:
    return {f"visual.transformer.resblocks.{place}.{name}" for place in places for name in BLOCK}


def low_rank(*targets: str) -> set[str]:
    prefix = "visual.transformer.resblocks."
    return {f"{prefix}{i}.{name}.0.{p}" for i in range(3) for t in targets for name in MATRICES[t] for p in ("up_OR", "down_RI")}


STEM = {"visual." + name for name in ("class_embedding", "positional_embedding", "conv1.weight", "ln_pre.weight", "ln_pre.bias")}
HEAD = {"visual." + name for name in ("proj", "ln_post.weight", "ln_post.bias")}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, STEM | blocks(0, 1, 2) | HEAD),
        ({"name": "first", "blocks": 2}, STEM | blocks(0, 1)),
        ({"name": "last"}, blocks(2) | HEAD),
        ({"name": "last", "blocks": 3}, blocks(0, 1, 2) | HEAD),
        ({"name": "lora"}, low_rank("attention", "mlp")),
        ({"name": "lora", "targets": ["attention"]}, low_rank("attention")),
        ({"name": "prompts", "pad": 4}, {"visual.prompts.pad_3E", "visual.prompts.tokens_LW.0"}),
        ({"name": "prompts", "pad": 0, "deep": True}, {f"visual.prompts.tokens_LW.{i}" for i in range(3)}),
        ({"name": "prompts", "pad": 4, "tokens": 0}, {"visual.prompts.pad_3E"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",  # a set is printed in another order in each process
)
def test_exactly_these_parameters_learn(settings: dict[str, Any], expected: set[str]) -> None:
    """On a ViT of three blocks; text tower and logit scale never."""
    assert learning(build("vit", **settings)) == expected


@pytest.mark.parametrize("tower", ["vit", "resnet", "timm_vit", "convnext"])
def test_first_and_last_blocks_complete_each_other(tower: str) -> None:
    """The first n and the last depth - n are the whole tower, without overlap."""
    depth = {"vit": 3, "resnet": 4, "timm_vit": 6, "convnext": 4}[tower]
    first, last = learning(build(tower, name="first")), learning(build(tower, name="last", blocks=depth - 1))
    assert first | last == learning(build(tower)) and not first & last


def gradients(model: ZeroShotModel) -> dict[str, Tensor | None]:
    model.encode(images(model)).unit_BD[:, 0].sum().backward()
    return {name: parameter.grad for name, parameter in model.clip.named_parameters()}


@pytest.mark.parametrize("settings", [{"name": "first", "blocks": 1}, {"name": "last", "blocks": 2}], ids=str)
@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_blocks_get_the_gradient_that_they_get_when_all_learn(tower: str, settings: dict[str, Any]) -> None:
    """In float64 to 1e-10; what is frozen gets none."""
    model = build(tower, **settings)
    some, whole = gradients(model), gradients(build(tower))
    for name, gradient in some.items():
        assert (gradient is not None) == (name in learning(model))
        if gradient is not None:
            torch.testing.assert_close(gradient, whole[name], rtol=1e-10, atol=1e-13)


OPTIONS: list[dict[str, Any]] = [
    {}, {"name": "first"}, {"name": "last"}, {"name": "lora", "rank": 2},
    {"name": "prompts", "pad": 3, "tokens": 2}, {"name": "prompts", "pad": 3, "tokens": 2, "deep": True},
]  # fmt: skip


def options_of(tower: str) -> list[dict[str, Any]]:
    """What each tower can do."""
    if tower == "resnet":
        return [*OPTIONS[:3], {"name": "lora", "targets": ["attention"]}, {"name": "prompts", "pad": 3, "tokens": 0}]
    if tower == "convnext":
        return [*OPTIONS[:3], {"name": "lora", "targets": ["mlp"]}, {"name": "prompts", "pad": 3, "tokens": 0}]
    return OPTIONS if tower == "vit" else [*OPTIONS[:4], {"name": "prompts", "pad": 3, "tokens": 0}]


CASES = [(tower, settings) for tower in ("vit", "resnet", "timm_vit", "siglip", "convnext") for settings in options_of(tower)]


@pytest.mark.parametrize(("tower", "settings"), CASES, ids=str)
def test_every_parameter_that_learns_is_used(tower: str, settings: dict[str, Any]) -> None:
    """Else DDP waits for a gradient that never comes (R20); pixels have a gradient too, which the attack needs."""
    model = build(tower, **settings)
    x = images(model).requires_grad_()
    model.encode(x).embedding_BD.square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert {name for name, p in model.clip.named_parameters() if p.grad is not None} == learning(model)


@pytest.mark.parametrize(("tower", "targets"), [("vit", None), ("resnet", ["attention"]), ("timm_vit", None), ("convnext", ["mlp"])])
def test_low_rank_updates_start_at_the_base_model_and_merge_into_a_plain_tower(tower: str, targets: list[Any] | None) -> None:
    """Zero at the start, to the bit; after training the merged weights give the same logits (fp32, 1e-5) under plain names."""
    base = build(tower, torch.float32)
    model = build(tower, torch.float32, name="lora", targets=targets)
    x = images(base)
    assert torch.equal(model.encode(x).embedding_BD, base.encode(x).embedding_BD)
    randomise(model)
    trained = model.encode(x).embedding_BD
    assert not torch.allclose(trained, base.encode(x).embedding_BD, atol=1e-3)
    assert merge_low_rank(model.visual) > 0 and merge_low_rank(model.visual) == 0
    torch.testing.assert_close(model.encode(x).embedding_BD, trained, rtol=1e-5, atol=1e-5)
    assert model.clip.state_dict().keys() == base.clip.state_dict().keys()
    assert not any(isinstance(part, LowRank) for part in model.modules())


def test_low_rank_gradients_follow_from_the_full_gradient() -> None:
    """``dL/dup = (alpha / rank) dL/dW down^T`` and ``dL/ddown = (alpha / rank) up^T dL/dW``, in float64."""
    model, base = build("vit", name="lora", rank=2, alpha=6.0), build("vit")
    randomise(model)
    merged = copy.deepcopy(model)
    merge_low_rank(merged.visual)
    base.load_state_dict(merged.state_dict())
    found, full = gradients(model), gradients(base)
    for at, weight in (
        ("attn.parametrizations.in_proj_weight", "attn.in_proj_weight"),
        ("mlp.c_fc.parametrizations.weight", "mlp.c_fc.weight"),
    ):
        prefix = "visual.transformer.resblocks.1."
        up, down = (model.clip.get_parameter(f"{prefix}{at}.0.{part}") for part in ("up_OR", "down_RI"))
        whole = full[prefix + weight]
        assert whole is not None
        torch.testing.assert_close(found[f"{prefix}{at}.0.up_OR"], 3.0 * whole @ down.T, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(found[f"{prefix}{at}.0.down_RI"], 3.0 * up.T @ whole, rtol=1e-10, atol=1e-13)


def test_low_rank_updates_are_peft_s_where_peft_is_right() -> None:
    """On the layers of the MLP: same outputs and input gradients for the same factors."""
    peft = pytest.importorskip("peft")
    ours, base = build("vit", name="lora", rank=2, alpha=6.0, targets=["mlp"]), build("vit")
    randomise(ours)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=r".*mlp\.(c_fc|c_proj)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        visual = peft.inject_adapter_in_model(config, base.visual)
    visual.double().eval()
    with torch.no_grad():
        for name, layer in visual.named_modules():
            if hasattr(layer, "lora_A"):
                factors = ours.visual.get_submodule(name).parametrizations.weight[0]
                layer.lora_A["default"].weight.copy_(factors.down_RI)
                layer.lora_B["default"].weight.copy_(factors.up_OR)
    x = images(ours).requires_grad_()
    outputs = [tower(x) for tower in (ours.visual, visual)]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in outputs), rtol=1e-10, atol=1e-12)


def test_low_rank_updates_keep_the_weight_s_precision_under_autocast() -> None:
    """The sum is the weight's; half precision comes in when it is used."""
    update = LowRank(torch.rand(8, 8), 2, 4.0, torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        update.up_OR.fill_(1 / 3)
        weight = torch.rand(8, 8)
        assert update(weight).dtype == torch.float32
        torch.testing.assert_close(update(weight), weight + 2 * (update.up_OR.double() @ update.down_RI.double()).float())


def test_prompt_tokens_come_last_and_have_no_position() -> None:
    """What ``ln_pre`` sees: class token and patches as without prompts, then the prompts as they are."""
    model, base = build("vit", name="prompts", pad=0, tokens=3), build("vit")
    seen: list[Tensor] = []
    for each in (base, model):
        each.visual.transformer.resblocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        each.encode(images(base))
    prompts = model.visual.prompts.tokens_LW[0]
    assert torch.equal(seen[1][:, :17], seen[0]) and seen[1].shape == (2, 20, 32)
    torch.testing.assert_close(seen[1][1, 17:], model.visual.ln_pre.forward(prompts))


def test_deep_prompts_replace_those_of_the_block_before() -> None:
    """Each later block sees its own prompts, and the class token and patches of the block before."""
    model = build("vit", name="prompts", pad=0, tokens=3, deep=True)
    came: list[Tensor] = []
    left: list[Tensor] = []
    for block in model.visual.transformer.resblocks:
        block.register_forward_pre_hook(lambda module, inputs: came.append(inputs[0]))
        block.register_forward_hook(lambda module, inputs, output: left.append(output))
    model.encode(images(model))
    for place in (1, 2):
        assert torch.equal(came[place][:, :17], left[place - 1][:, :17])
        assert torch.equal(came[place][1, 17:], model.visual.prompts.tokens_LW[place])
        assert not torch.equal(left[place - 1][:, 17:], came[place][:, 17:])


@pytest.mark.parametrize("deep", [False, True])
def test_prompts_are_no_patches(deep: bool) -> None:
    """Tokens on demand are the patches', also in a copy of the model, whose hooks are its own."""
    model = build("vit", name="prompts", pad=4, tokens=3, deep=deep)
    twin = copy.deepcopy(model)
    encoding = model.encode(images(model), tokens=True)
    assert encoding.tokens_BND is not None and encoding.tokens_BND.shape == (2, 16, 16)
    with torch.no_grad():
        twin.visual.prompts.pad_3E.zero_()
        twin.visual.prompts.tokens_LW[0].zero_()
    assert torch.equal(model.encode(images(model)).embedding_BD, encoding.embedding_BD)
    assert not torch.allclose(twin.encode(images(model)).embedding_BD, encoding.embedding_BD)


@pytest.mark.parametrize("tower", ["vit", "resnet", "timm_vit", "convnext"])
def test_the_border_is_added_to_normalised_pixels(tower: str) -> None:
    """After the resize, not clamped, zero inside; and it has as many entries as the border has pixels."""
    model, base = build(tower, name="prompts", pad=3, tokens=0), build(tower)
    side = model.record.resolution
    pad, seen = model.visual.prompts.pad_3E, []
    assert pad.shape == (3, side**2 - (side - 6) ** 2)
    with torch.no_grad():
        pad.mul_(5)  # far outside what normalised pixels can be
    frame = model.visual.prompts.frame()
    assert (frame[:, 3:-3, 3:-3] == 0).all() and torch.equal(frame[frame != 0], pad.flatten())
    model.visual.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.rand(2, 3, 20, 20, dtype=torch.float64)
    torch.testing.assert_close(model.encode(x).embedding_BD, base.visual(base.pixels(x) + frame))
    torch.testing.assert_close(seen[0], base.pixels(x) + frame)


def test_prompts_start_from_a_standard_normal_and_move_no_stream() -> None:
    """Another seed gives other values; the global stream stays where it is."""
    model = load_model(ModelSpec("vit", "random"))
    before = torch.get_rng_state()
    make_trainable(model, TrainableSpec("prompts", pad=10, tokens=100), seed=3)
    assert torch.equal(before, torch.get_rng_state())
    for values in (model.visual.prompts.pad_3E, model.visual.prompts.tokens_LW[0]):
        assert abs(float(values.mean())) < 0.1 and abs(float(values.std()) - 1) < 0.1
    other = load_model(ModelSpec("vit", "random"))
    make_trainable(other, TrainableSpec("prompts", pad=10, tokens=100), seed=4)
    assert not torch.equal(other.visual.prompts.pad_3E, model.visual.prompts.pad_3E)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "lorra"}, "unknown trainable name 'lorra': did you mean 'lora'"),
        ({"name": "all", "rank": 8}, "trainable.rank = 8 belongs to lora, not to all"),
        ({"name": "lora", "blocks": 2}, "trainable.blocks = 2 belongs to first or last, not to lora"),
        ({"name": "lora", "targets": ["atention"]}, "did you mean 'attention'"),
        ({"name": "lora", "targets": []}, "targets is empty"),
        ({"name": "lora", "rank": 0}, "trainable.rank = 0 is not above 0"),
        ({"name": "last", "blocks": 0}, "trainable.blocks = 0 is not above 0"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], words: str) -> None:
    """Nothing is ignored."""
    with pytest.raises(ConfigError, match=words):
        TrainableSpec(**settings)


@pytest.mark.parametrize(
    ("tower", "settings", "words"),
    [
        ("vit", {"name": "first", "blocks": 4}, "VisionTransformer has 3: use at most 3"),
        ("resnet", {"name": "lora"}, "ModifiedResNet has no weight matrices of 'mlp'; it has attention"),
        ("convnext", {"name": "lora", "targets": ["attention"]}, "ConvNeXt of timm has no weight matrices of 'attention'; it has mlp"),
        ("resnet", {"name": "prompts", "pad": 3, "tokens": 2}, "ModifiedResNet has no place for prompt tokens"),
        ("siglip", {"name": "prompts", "pad": 3}, "VisionTransformer of timm has no place for prompt tokens"),
        ("vit", {"name": "prompts"}, "pad = 30 is more than half of the tower's 32 pixels: use at most 16"),
        ("vit", {"name": "prompts", "pad": 0, "tokens": 0}, "one must be above 0"),
        ("vit", {"name": "prompts", "pad": -1, "tokens": 5}, "neither may be negative"),
    ],
    ids=str,
)
def test_what_a_tower_has_not_got_is_refused(tower: str, settings: dict[str, Any], words: str) -> None:
    """The tower is named, and what it has."""
    with pytest.raises(ConfigError, match=words):
        build(tower, **settings)


def test_fixed_position_embeddings_stay_fixed() -> None:
    """What the architecture does not train, no option trains."""
    model = load_model(ModelSpec("vit", "random"))
    model.visual.positional_embedding.requires_grad_(False)
    make_trainable(model, TrainableSpec("first"))
    assert "visual.positional_embedding" not in learning(model)


def test_a_tower_with_prompts_is_not_packed_as_a_plain_one(tmp_path: Path) -> None:
    """open_clip's layout has no place for them: the folder would be another model."""
    with pytest.raises(ConfigError, match="visual prompts"):
        pack(build("vit", name="prompts", pad=4), tmp_path / "out")


def test_prompts_that_are_there_go_on_with_their_settings() -> None:
    """Or are refused; another option freezes them."""
    model = build("vit", name="prompts", pad=4, tokens=2)
    values = model.visual.prompts.pad_3E.detach().clone()
    make_trainable(model, TrainableSpec("prompts", pad=4, tokens=2), seed=9)
    assert torch.equal(model.visual.prompts.pad_3E, values)
    with pytest.raises(ConfigError, match="has visual prompts .*already"):
        make_trainable(model, TrainableSpec("prompts", pad=5, tokens=2))
    make_trainable(model, TrainableSpec("lora"))
    assert not any("prompts" in name for name in learning(model))
