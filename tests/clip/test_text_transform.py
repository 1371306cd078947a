"""Text transformations: LAAT's expansion by its worked examples and laws, TIMA's residual, and their way through a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from aft.attacks import PGD
from aft.clip import ModelSpec, load_model
from aft.clip.pack import pack
from aft.clip.text_transform import Expansion, Residual, TextTransform, TextTransformSpec, make_transform, stored_transform
from aft.errors import ConfigError, WeightsError
from aft.methods import LAAT, TIMA
from tests.conftest import MemoryData, make_trainer


def polar(degrees: float, azimuth: float) -> list[float]:
    """A unit vector at an angle from +z."""
    a, b = math.radians(degrees), math.radians(azimuth)
    return [math.sin(a) * math.cos(b), math.sin(a) * math.sin(b), math.cos(a)]


TRAIN = torch.tensor([polar(30, 0), polar(30, 180), polar(20, 90), polar(20, 270)], dtype=torch.float64)


def expansion(quantile: float = 1.0) -> Expansion:
    """Fitted on four vectors about +z, at 30 and 20 degrees: its gain is 3."""
    transform = Expansion(3, quantile).double()
    transform.fit(TRAIN)
    return transform


def test_the_worked_example_of_expansion() -> None:
    """Angles 30 and 20 become 90 and 60; a new class at 25 becomes 75, one at 40 goes past 90; azimuths stay."""
    transform = expansion()
    expected = [[1, 0, 0], [-1, 0, 0], [0, 0.75**0.5, 0.5], [0, -(0.75**0.5), 0.5]]
    wide = transform(TRAIN)
    torch.testing.assert_close(wide, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)
    assert [round(float(wide[i] @ wide[j]), 6) for i, j in ((0, 1), (0, 2), (2, 3))] == [-1, 0, -0.5]
    new = torch.tensor([polar(25, 45)], dtype=torch.float64)
    torch.testing.assert_close(transform(new)[0], torch.tensor([0.683013, 0.683013, 0.258819], dtype=torch.float64), rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="1 of 1 class texts lie farther"):
        beyond = transform(torch.tensor([polar(40, 45)], dtype=torch.float64))
    torch.testing.assert_close(beyond[0], torch.tensor([0.612372, 0.612372, -0.5], dtype=torch.float64), rtol=0, atol=1e-6)


def test_an_angle_is_never_stretched_past_180_degrees() -> None:
    """At 70 degrees the gain of 3 would come back on the near side: it stays opposite to the mean. The mean itself stays."""
    with pytest.warns(UserWarning, match="1 of 2 class texts would turn past 180 degrees"):
        far, mean = expansion()(torch.tensor([polar(70, 45), [0, 0, 1]], dtype=torch.float64))
    torch.testing.assert_close(far, torch.tensor([0, 0, -1.0], dtype=torch.float64), rtol=0, atol=1e-7)
    torch.testing.assert_close(mean, torch.tensor([0, 0, 1.0], dtype=torch.float64), rtol=0, atol=1e-7)


def test_rows_need_not_be_unit_vectors_and_angles_scale() -> None:
    """Second worked example: rows (1,0,2), (-1,0,2), (0,.5,2), (0,-.5,2)."""
    rows = torch.tensor([[1, 0, 2], [-1, 0, 2], [0, 0.5, 2], [0, -0.5, 2]], dtype=torch.float64)
    unit = rows / rows.norm(dim=1, keepdim=True)
    transform = Expansion(3).double()
    transform.fit(unit)
    assert float(transform.get_buffer("gain")) == pytest.approx(3.387910, abs=1e-5)
    torch.testing.assert_close(transform(unit)[0], torch.tensor([1.0, 0, 0], dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(transform(unit)[2], torch.tensor([0, 0.737908, 0.674901], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_laws_of_expansion_on_random_vectors(seed: int) -> None:
    """The farthest training class is orthogonal to the mean, all are unit vectors, azimuths and the order of angles stay."""
    noise = torch.Generator().manual_seed(seed)
    centre = torch.randn(8, generator=noise, dtype=torch.float64)
    text = torch.nn.functional.normalize(centre + 0.7 * torch.randn(12, 8, generator=noise, dtype=torch.float64), dim=1)
    transform = Expansion(8).double()
    transform.fit(text)
    wide, mean = transform(text), transform.get_buffer("mean_D")
    before, after = (text @ mean).acos(), (wide @ mean).clamp(-1, 1).acos()
    assert float(after.max()) == pytest.approx(math.pi / 2, abs=1e-6)
    torch.testing.assert_close(after, before * math.pi / 2 / before.max(), rtol=0, atol=1e-6)
    torch.testing.assert_close(wide.norm(dim=1), torch.ones(12, dtype=torch.float64), rtol=0, atol=1e-7)

    def azimuth(t: torch.Tensor) -> torch.Tensor:
        across = t - (t @ mean)[:, None] * mean
        return across / across.norm(dim=1, keepdim=True)

    torch.testing.assert_close(azimuth(wide), azimuth(text), rtol=0, atol=1e-6)


def test_a_quantile_keeps_one_odd_class_from_deciding() -> None:
    """With the median angle (25 degrees) at 90, the gain is 3.6."""
    assert float(expansion(0.5).get_buffer("gain")) == pytest.approx(90 / 25, rel=1e-6)


def test_a_quantile_is_kept_with_the_checkpoint(recwarn: pytest.WarningsRecorder) -> None:
    """Classes beyond 90 degrees were meant, so that no loaded model warns of them; what knew no quantile had the largest angle."""
    fitted = expansion(0.5).float()
    loaded = stored_transform("expansion", fitted.state_dict())
    assert isinstance(loaded, Expansion) and loaded.quantile == 0.5
    assert torch.equal(loaded(TRAIN), fitted(TRAIN)) and not recwarn.list
    older = {name: value for name, value in fitted.state_dict().items() if name != "share"}
    assert stored_transform("expansion", older).quantile == 1
    resumed = Expansion(3, 0.5)
    resumed.load_state_dict(older)  # a run that goes on: with the quantile of its settings
    assert resumed.quantile == 0.5 and torch.equal(resumed.get_buffer("mean_D"), fitted.get_buffer("mean_D"))


def test_what_cannot_be_expanded_is_refused() -> None:
    """One class, equal texts, a map that was never fitted, settings out of range."""
    with pytest.raises(ConfigError, match="fitted on 1 class"):
        Expansion(3).fit(TRAIN[:1])
    with pytest.raises(ConfigError, match="all 3 class texts are alike"):
        Expansion(3).fit(TRAIN[:1].expand(3, 3))
    with pytest.raises(ConfigError, match="not fitted yet"):
        Expansion(3)(TRAIN)
    for settings in ({"name": "expand"}, {"quantile": 0.0}, {"quantile": 1.5}, {"hidden": 0}):
        with pytest.raises(ConfigError):
            TextTransformSpec(**settings)


def test_a_residual_starts_as_the_identity_and_learns() -> None:
    """Unit vectors in, unit vectors out; its first weights depend on the seed alone."""
    spec = TextTransformSpec("residual", hidden=5)
    first, again, other = (make_transform(spec, 3, seed) for seed in (0, 0, 1))
    torch.testing.assert_close(first(TRAIN.float()), TRAIN.float(), rtol=0, atol=1e-7)
    assert isinstance(first, Residual) and isinstance(again, Residual) and isinstance(other, Residual)
    assert torch.equal(first.down.weight, again.down.weight) and not torch.equal(first.down.weight, other.down.weight)
    (gradient,) = torch.autograd.grad(first(TRAIN.float())[:, 0].sum(), first.up.weight)
    assert gradient.any()


@pytest.mark.parametrize("method", [LAAT, TIMA])
def test_it_travels_with_the_checkpoint(
    method: type[LAAT], tiny: ModelSpec, data: MemoryData, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """The file alone classifies *new* classes as the trained model does, to the bit; a plain layout refuses it."""
    trained = method(tiny, attack=PGD(eps="2/255", step_size="2/255", steps=1))
    trainer = make_trainer(tmp_path, limit_val_batches=0, enable_checkpointing=True)
    trainer.fit(trained, datamodule=data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded, names = load_model(ModelSpec(pretrained=str(tmp_path / "x.ckpt"))), ["horse", "frog"]
    assert loaded.record.text_transform == loaded.text_transform.name == trained.model.text_transform.name != "identity"
    bank = loaded.text_bank(names, data.templates)
    assert torch.equal(bank, trained.model.text_bank(names, data.templates))
    assert not torch.allclose(bank, loaded.raw_bank(names, data.templates), atol=1e-6)
    assert not any(p.requires_grad for p in loaded.text_transform.parameters())
    with pytest.raises(ConfigError, match="text_transform"):
        pack(loaded, tmp_path / "packed")
    further = method(ModelSpec(pretrained=str(tmp_path / "x.ckpt")), attack=PGD(eps="2/255", step_size="2/255", steps=1))
    further._trainer = make_trainer(tmp_path)
    further._trainer.datamodule = MemoryData(names=("horse", "car", "frog", "plane"))  # type: ignore[attr-defined]
    further.setup("fit")
    assert torch.equal(further.model.text_bank(names, data.templates), bank)  # not fitted or drawn anew


def test_a_checkpoint_without_its_transformation_is_refused() -> None:
    """An unknown name, or tensors that are not there."""
    assert type(stored_transform("identity", {})) is TextTransform
    for name in ("rotation", "expansion", "residual"):
        with pytest.raises(WeightsError):
            stored_transform(name, {})
