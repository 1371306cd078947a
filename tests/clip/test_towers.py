"""Image towers: logits, tokens by one rule, and BatchNorm statistics that nothing moves."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models.eva import Eva
from torch import Tensor, nn

from aft.attacks import PGD
from aft.clip import ModelSpec, ZeroShotModel, load_model
from aft.clip.model import state_hash
from aft.clip.pack import pack_tower
from aft.clip.towers import encode_with_tokens, has_tokens, keep_statistics, tower_parts
from aft.errors import ConfigError
from aft.methods import ContrastivePretraining, OptimizerSpec, TeCoA
from tests import towers
from tests.conftest import Calls, MemoryData, make_trainer

WITH_TOKENS = {"vit": 16, "resnet": 4, "timm_vit": 4, "timm_avg": 4, "siglip": 100}


@pytest.fixture(autouse=True)
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small towers by name."""
    (tmp_path / "towers").mkdir()
    towers.register(monkeypatch, tmp_path / "towers")


def build(name: str) -> ZeroShotModel:
    """A tower in float64 with random norms and statistics."""
    torch.manual_seed(0)
    model = load_model(ModelSpec(name, "random"))
    towers.shake(model.visual)
    return model.double()


def pixels_of(model: ZeroShotModel) -> Tensor:
    return torch.rand(
        2, 3, model.record.resolution, model.record.resolution, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("name", towers.VISION)
def test_every_tower_takes_pixels_and_gives_logits(name: str) -> None:
    """Images of another size are resized in the graph; logits are fp32 or wider, one a class."""
    model = build(name)
    x = torch.rand(2, 3, 40, 40, dtype=torch.float64, requires_grad=True)
    logits = model(x, model.text_bank(("cat", "dog", "ship"), ("{}",)))
    assert logits.shape == (2, 3)
    assert torch.autograd.grad(logits.sum(), x)[0].abs().sum() > 0


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_tokens_come_from_one_pass_and_leave_the_embedding_alone(name: str) -> None:
    """One call of the tower; shapes; no hook stays behind."""
    model, hooks = build(name), 0
    calls = Calls(model.visual)
    plain, full = model.encode(pixels_of(model)), model.encode(pixels_of(model), tokens=True)
    assert calls.count == 2 and plain.tokens_BND is None
    assert torch.equal(full.embedding_BD, plain.embedding_BD)
    assert full.tokens_BND is not None and full.tokens_BND.shape == (2, WITH_TOKENS[name], full.embedding_BD.shape[1])
    hooks = sum(len(part._forward_hooks) for part in model.visual.modules())
    assert hooks == 0


def test_a_resnet_s_embedding_is_the_mean_of_its_tokens_under_even_attention() -> None:
    """With zero queries and no positions, ``attnpool`` averages the values of all places and of their mean."""
    model = build("resnet")
    pool = model.visual.attnpool
    with torch.no_grad():
        for parameter in (*pool.q_proj.parameters(), pool.positional_embedding):
            parameter.zero_()
    embedding, tokens = encode_with_tokens(model.visual, pixels_of(model))
    assert tokens.std(1).min() > 0
    torch.testing.assert_close(tokens.mean(1), embedding)


def test_a_resnet_s_token_is_the_embedding_where_all_attention_is_on_its_place() -> None:
    """The value and output projections, position embedding included: a pool whose other values are all equal to it."""
    model = build("resnet")
    visual = model.visual
    x = pixels_of(model)
    with torch.no_grad():
        _, tokens = encode_with_tokens(visual, x)
        place = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(x)))))[:, :, 0, 1]
        visual.attnpool.positional_embedding[:] = visual.attnpool.positional_embedding[2].clone()
        alone = visual.attnpool(place[:, :, None, None].expand(-1, -1, 2, 2))
    torch.testing.assert_close(tokens[:, 1], alone)


@pytest.mark.parametrize("name", ["timm_vit", "timm_avg"])
def test_a_token_of_timm_is_what_its_head_says_of_that_patch_alone(name: str) -> None:
    """timm's own head on a sequence of one patch."""
    model = build(name)
    trunk, head = model.visual.trunk, model.visual.head
    _, tokens = encode_with_tokens(model.visual, pixels_of(model))
    features = trunk.forward_features(pixels_of(model))
    for patch in range(4):
        alone = features[:, [1 + patch]] if name == "timm_vit" else features[:, [0, 1 + patch]]
        torch.testing.assert_close(tokens[:, patch], head(trunk.forward_head(alone)))


def test_a_token_under_an_attention_pool_is_that_of_many_equal_patches() -> None:
    """Attention over equal values gives the value, whatever the query."""
    model = build("siglip")
    trunk = model.visual.trunk
    _, tokens = encode_with_tokens(model.visual, pixels_of(model))
    features = trunk.forward_features(pixels_of(model))
    torch.testing.assert_close(tokens[:, 7], model.visual.head(trunk.forward_head(features[:, [8]].expand(-1, 5, -1))))


def test_eva_has_tokens_too() -> None:
    """timm's other transformer, of EVA-CLIP."""
    model = build("timm_vit")
    model.visual.trunk = Eva(img_size=32, patch_size=16, embed_dim=64, depth=1, num_heads=2, num_classes=0).double()
    embedding, tokens = encode_with_tokens(model.visual.eval(), pixels_of(model))
    assert tokens.shape == (2, 4, 16) and embedding.shape == (2, 16)


def test_a_tower_without_a_projection_of_its_places_is_named() -> None:
    """ConvNeXt pools before its norm; nothing defines what one place says."""
    model = build("convnext")
    assert not has_tokens(model.visual)
    with pytest.raises(ConfigError, match="ConvNeXt of timm has no patch tokens"):
        model.encode(pixels_of(model), tokens=True)


@pytest.mark.parametrize(("name", "blocks"), [("vit", 3), ("resnet", 4), ("timm_vit", 6), ("siglip", 9), ("convnext", 4)])
def test_the_parts_of_a_tower_hold_every_parameter_once(name: str, blocks: int) -> None:
    """Stem, blocks, head."""
    visual = build(name).visual
    parts = tower_parts(visual)
    assert len(parts.blocks) == blocks and all(parts.blocks) and parts.stem and parts.head
    together = [*parts.stem, *(each for block in parts.blocks for each in block), *parts.head]
    assert sorted(together) == sorted(each for each, _ in visual.named_parameters())


def test_the_ends_of_the_parts() -> None:
    """What belongs to the stem and to the head, by name."""
    found = {name: tower_parts(build(name).visual) for name in ("vit", "resnet", "siglip")}
    assert found["vit"].stem == ["class_embedding", "positional_embedding", "conv1.weight", "ln_pre.weight", "ln_pre.bias"]
    assert found["vit"].head == ["proj", "ln_post.weight", "ln_post.bias"]
    assert {name.split(".")[0] for name in found["resnet"].head} == {"attnpool"}
    assert {".".join(name.split(".")[:2]) for name in found["siglip"].head} == {"trunk.norm", "trunk.attn_pool"}


def test_a_tower_without_known_blocks_is_named() -> None:
    """Named, with what can be done."""
    with pytest.raises(ConfigError, match="image tower Flatten has no blocks"):
        tower_parts(nn.Flatten())


def statistics(visual: nn.Module) -> dict[str, Tensor]:
    """All BatchNorm buffers."""
    return {name: value.clone() for name, value in visual.named_buffers()}


@pytest.mark.parametrize("name", ["resnet", "convnext", "timm_vit", "siglip"])
def test_tecoa_runs_on_every_tower(name: str, tmp_path: Path) -> None:
    """k + 1 image forwards and one of text; every tower learns; statistics are bit-equal after it (R19)."""
    data = MemoryData(count=4, batch_size=4)
    method = TeCoA(
        ModelSpec(name, "random"), attack=PGD(eps="8/255", step_size="4/255", steps=2), optimizer=OptimizerSpec(name="sgd", lr=0.01)
    )
    towers.shake(method.model.visual)
    image, text = Calls(method.model.visual), Calls(method.model.clip.transformer)
    before, weights = statistics(method.model.visual), copy.deepcopy(dict(method.model.visual.named_parameters()))
    make_trainer(tmp_path, max_steps=2, max_epochs=2, limit_val_batches=0).fit(method, datamodule=data)
    assert (image.count, text.count) == (6, 1)
    after = statistics(method.model.visual)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert (len(before) > 0) == (name == "resnet")
    assert all(p.grad is not None for p in method.model.visual.parameters())
    assert any(not torch.equal(p, weights[key]) for key, p in method.model.visual.named_parameters())


def test_batch_norm_is_in_eval_mode_in_every_forward(tmp_path: Path) -> None:
    """While the tower around it trains; also after validation."""
    method, seen = TeCoA(ModelSpec("resnet", "random"), attack=PGD(eps="8/255", step_size="4/255", steps=1)), []
    visual = method.model.visual
    visual.bn1.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, visual.training)))
    trainer = make_trainer(tmp_path, max_steps=2, val_check_interval=1, limit_val_batches=1)
    trainer.fit(method, datamodule=MemoryData(count=4, batch_size=2))
    assert seen == [(False, False), (False, True), (False, False)] * 2


def test_pre_training_learns_its_statistics(tmp_path: Path) -> None:
    """From random weights there is nothing to keep."""
    method = ContrastivePretraining(ModelSpec("resnet", "random"))
    before = statistics(method.model.visual)
    make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(method, datamodule=MemoryData(count=8))
    assert int(statistics(method.model.visual)["bn1.num_batches_tracked"]) == int(before["bn1.num_batches_tracked"]) + 1


def test_keep_statistics_leaves_other_modes_alone() -> None:
    """BatchNorm alone."""
    tower = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()).train()
    keep_statistics(tower)
    assert [part.training for part in tower] == [True, False, True]


def test_a_resnet_s_weights_lie_with_channels_last(tmp_path: Path) -> None:
    """Convolutions run in the order of the weights; values are as before, and files hold tensors as all programs expect them."""
    model = load_model(ModelSpec("resnet", "random")).double()
    usual = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    x, orders = pixels_of(model), []
    for tower in (model, usual):
        tower.visual.layer1.register_forward_hook(  # type: ignore[operator, union-attr]
            lambda _, args, out: orders.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    torch.testing.assert_close(model.encode(x).embedding_BD, usual.encode(x).embedding_BD, rtol=1e-12, atol=1e-12)
    assert orders == [True, False] and state_hash(model) == state_hash(usual)
    files = [tmp_path / "last.safetensors", tmp_path / "usual.safetensors"]
    for file, tower in zip(files, (model, usual), strict=True):
        pack_tower(tower, file)
    ours, theirs = (load_file(file) for file in files)
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
