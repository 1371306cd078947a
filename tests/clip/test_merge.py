"""Weight space: ends of the interpolation to the bit, linearity, what cannot be merged, and the command."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aft.clip import ModelSpec, ZeroShotModel, load_model
from aft.clip.merge import add_task_vectors, interpolate, main
from aft.clip.pack import pack_tower
from aft.clip.text_transform import Expansion
from aft.errors import ConfigError, WeightsError


@pytest.fixture
def tuned(tiny: ModelSpec) -> list[ZeroShotModel]:
    """Two models that have moved from the base in other directions."""
    models = [load_model(tiny), load_model(tiny)]
    for seed, model in enumerate(models):
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.visual.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=noise))
    return models


def test_ends_are_exact_and_the_middle_is_the_mean(model: ZeroShotModel, tuned: list[ZeroShotModel]) -> None:
    """Share 0 is the base, 1 the tuned model; neither input is changed; the text side is the base's."""
    before = {name: value.clone() for name, value in model.visual.state_dict().items()}
    other = tuned[0].visual.state_dict()
    for share, expected in ((0.0, before), (1.0, other), (0.5, {name: (value + other[name]) / 2 for name, value in before.items()})):
        merged = interpolate(model, tuned[0], share)
        for name, value in merged.visual.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0 if share in (0, 1) else 1e-7)
        assert merged.record.base_sha256 == model.record.sha256 and merged.record.layout == "merged"
    assert all(torch.equal(value, before[name]) for name, value in model.visual.state_dict().items())
    assert interpolate(model, tuned[0], 0.3).record.sha256 != interpolate(model, tuned[0], 0.4).record.sha256


def test_task_vectors_add_up_in_any_order(model: ZeroShotModel, tuned: list[ZeroShotModel]) -> None:
    """Base plus both differences; a negative factor takes one away again."""
    one = add_task_vectors(model, [(tuned[0], 0.5), (tuned[1], 0.25)]).visual.state_dict()
    two = add_task_vectors(model, [(tuned[1], 0.25), (tuned[0], 0.5)]).visual.state_dict()
    back = add_task_vectors(model, [(tuned[0], 1.0), (tuned[0], -1.0)]).visual.state_dict()
    base, a, b = (m.visual.state_dict() for m in (model, *tuned))
    for name in base:
        torch.testing.assert_close(one[name], base[name] + 0.5 * (a[name] - base[name]) + 0.25 * (b[name] - base[name]), rtol=0, atol=1e-6)
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(back[name], base[name], rtol=0, atol=1e-6)


def test_what_cannot_be_merged_is_refused(model: ZeroShotModel, tuned: list[ZeroShotModel]) -> None:
    """Another architecture, another normalisation, nothing to add, a factor without end."""
    wider = load_model(ModelSpec("miniclip32", mean=model.record.mean, std=model.record.std))
    with pytest.raises(WeightsError, match="differs from the base in"):
        add_task_vectors(model, [(wider, 0.5)])
    with pytest.raises(WeightsError, match="mean"):
        add_task_vectors(load_model(ModelSpec("tiny", mean=(0.5, 0.5, 0.5))), [(tuned[0], 0.5)])
    for given in ([], [(tuned[0], float("inf"))]):
        with pytest.raises(ConfigError):
            add_task_vectors(model, given)


def test_the_command_writes_a_tower_that_loads(model: ZeroShotModel, tuned: list[ZeroShotModel], tmp_path: Path, capsys) -> None:
    """In fp16, over its base; a factor that is no number is refused."""
    pack_tower(tuned[0], tmp_path / "a.safetensors")
    main([str(tmp_path / "half.safetensors"), "--base", "tiny", "--add", f"{tmp_path / 'a.safetensors'}=0.5"])
    assert "sha256" in capsys.readouterr().out
    half = load_model(ModelSpec("tiny", str(tmp_path / "half.safetensors")))
    expected = interpolate(model, tuned[0], 0.5).visual.state_dict()
    for name, value in half.visual.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=1e-3)
    assert half.record.method.startswith("merge(0.5*") and half.record.base_sha256 == model.record.sha256
    with pytest.raises(ConfigError, match="FILE=FACTOR"):
        main([str(tmp_path / "x.safetensors"), "--base", "tiny", "--add", f"{tmp_path / 'a.safetensors'}=half"])


def test_a_name_that_nothing_would_read_is_refused(tmp_path: Path) -> None:
    """Safetensors under the name of a checkpoint would be taken for a damaged one."""
    with pytest.raises(ConfigError, match="x.ckpt: the image tower is written as safetensors"):
        main([str(tmp_path / "x.ckpt"), "--base", "tiny", "--add", "y.ckpt=0.5"])


def test_models_of_another_start_or_with_other_texts_are_told_apart(tiny: ModelSpec, tuned: list[ZeroShotModel]) -> None:
    """Two expansions of other classes are no one text side; a model that began elsewhere is mixed, and that is said."""
    expanded = [load_model(tiny) for _ in range(3)]
    for model, count in zip(expanded, (3, 3, 4), strict=True):
        model.text_transform = Expansion(model.width)
        model.text_transform.fit(torch.eye(model.width)[:count])
    add_task_vectors(expanded[0], [(expanded[1], 0.5)])
    with pytest.raises(WeightsError, match="both have text_transform = expansion, of other values"):
        add_task_vectors(expanded[0], [(expanded[2], 0.5)])
    with pytest.raises(WeightsError, match="text_transform = expansion, the base has identity: towers cannot be mixed"):
        add_task_vectors(load_model(tiny), [(expanded[0], 0.5)])
    base = load_model(tiny)
    for sha256, warned in ((base.record.sha256, False), ("0" * 64, True)):
        tuned[0].record = replace(tuned[0].record, base_sha256=sha256)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            add_task_vectors(base, [(tuned[0], 0.5)])
        assert any("fine-tuned from weights of sha256 00000000" in str(one.message) for one in caught) == warned
