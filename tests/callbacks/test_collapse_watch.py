"""The collapse watch: it sees catastrophic overfitting provoked by FGSM, says when it began, and leaves training as it was."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from aft.attacks import FGSM, PGD
from aft.clip import ModelSpec
from aft.errors import ConfigError
from aft.methods import FARE, OptimizerSpec, TeCoA
from callbacks import CollapseWatch
from tests.conftest import MemoryData, make_trainer


def test_fgsm_at_a_large_eps_overfits_and_is_seen(tiny: ModelSpec, tmp_path: Path) -> None:
    """FGSM at 32/255 learns to withstand one step and nothing else: a warning with the step; PGD at a small eps gives none.

    The step is that of the first look whose gap is too large, and the one before it is named, too.
    """
    gaps: dict[int, float] = {}

    class Noting(CollapseWatch):
        """Keeps the gap of each look."""

        def _warn(self, step: int, figures: dict[str, float]) -> None:
            gaps[step] = figures["one_step"] - figures["multi_step"]
            super()._warn(step, figures)

    def told(attack: FGSM | PGD) -> list[str]:
        method = TeCoA(tiny, attack=attack, optimizer=OptimizerSpec(lr=1e-3, warmup_steps=5, schedule="constant"))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            watch = Noting(every=10, steps=20, gap=0.57)  # 0.46 or 0.50 at step 10, 0.62 at step 20: rounding moves them no further
            trainer = make_trainer(tmp_path, max_steps=60, max_epochs=-1, limit_val_batches=0, callbacks=[watch])
            trainer.fit(method, datamodule=MemoryData(count=96, batch_size=48))
        return [str(w.message) for w in seen if "catastrophic overfitting at step" in str(w.message)]

    (warning,) = told(FGSM(eps="32/255"))
    first = min(step for step, gap in gaps.items() if gap >= 0.57)
    assert list(gaps) == [10, 20, 30, 40, 50, 60] and first > 10
    assert f"overfitting at step {first} (not yet at step {first - 10}):" in warning
    assert told(PGD(eps="2/255", step_size="1/255", steps=4)) == []


def test_it_changes_nothing_and_logs_its_figures(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Weights after four steps are the same to the bit with and without it; the four figures are shares."""
    def train(callbacks: list[CollapseWatch]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, bool]]:
        method = TeCoA(tiny, attack=PGD(eps="8/255", step_size="4/255", steps=1), optimizer=OptimizerSpec(lr=1e-3))
        trainer = make_trainer(tmp_path, max_steps=4, limit_val_batches=0, callbacks=callbacks)
        trainer.fit(method, datamodule=data)
        return method.state_dict(), trainer.callback_metrics, {name: part.training for name, part in method.model.named_modules()}

    (plain, _, modes), (watched, logged, watched_modes) = train([]), train([CollapseWatch(every=2, steps=3)])
    assert modes == watched_modes and any(modes.values())
    assert all(torch.equal(value, watched[key]) for key, value in plain.items())
    assert all(0 <= float(logged[f"watch/{name}"]) <= 1 for name in ("one_step", "multi_step", "largest_class_share"))
    assert 0 < float(logged["watch/drift"]) < 2


def test_it_looks_inside_the_ball_of_training(
    tiny: ModelSpec, data: MemoryData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its norm: an L-inf ball of the same number would break every image, and hide what there is to see."""
    lengths: list[float] = []
    attacked = PGD.__call__

    def noted(self: PGD, objective: Any, x_BCHW: torch.Tensor, *given: Any) -> Any:
        """How far the points of the watch, of 3 steps, and of FGSM, of one, are moved."""
        found = attacked(self, objective, x_BCHW, *given)
        lengths.extend((found.x_BCHW - x_BCHW).flatten(1).norm(dim=1).tolist())
        return found

    monkeypatch.setattr(PGD, "__call__", noted)
    attack = PGD(eps="128/255", step_size="64/255", steps=1, norm="l2")
    method = TeCoA(tiny, attack=attack, optimizer=OptimizerSpec(lr=1e-3))
    make_trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[CollapseWatch(every=1, steps=3)]).fit(method, datamodule=data)
    assert len(lengths) >= 2 * data.batch_size and max(lengths) <= 128 / 255 + 1e-6


def test_drift_is_from_the_teacher_and_a_warning_is_given_once_a_run(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Also after a resume: not from what the model was then. Another teacher is far away from the start on."""

    def fit(steps: int, checkpoint: Path | None = None, **settings: ModelSpec) -> tuple[float, CollapseWatch]:
        watch = CollapseWatch(every=1, steps=1, largest_share=0.01)
        kind, attack = (FARE if settings else TeCoA), PGD(eps="8/255", step_size="4/255", steps=1)
        method = kind(tiny, attack=attack, optimizer=OptimizerSpec(lr=3e-3), **settings)
        trainer = make_trainer(tmp_path, max_steps=steps, limit_val_batches=0, callbacks=[watch])
        trainer.fit(method, datamodule=data, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        return float(trainer.callback_metrics["watch/drift"]), watch

    with pytest.warns(UserWarning, match="collapse at step 1:"):
        drift, _ = fit(3)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        resumed, watch = fit(4, tmp_path / "x.ckpt")
    assert resumed > drift / 2 > 1e-4 and watch.warned == {"collapse"}
    assert not any("collapse" in str(one.message) for one in seen)
    with pytest.warns(UserWarning, match="collapse"):
        assert fit(1, teacher=ModelSpec("tiny", "random"))[0] > 0.3


def test_each_warning_is_given_once_and_below_the_threshold_not_at_all() -> None:
    """With the step and the figures."""
    watch = CollapseWatch(gap=0.2, largest_share=0.9)
    sound = {"one_step": 0.5, "multi_step": 0.4, "largest_class_share": 0.3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch._warn(5, sound)
    with pytest.warns(UserWarning, match="collapse at step 7: 95 % of the images"):
        watch._warn(7, {**sound, "largest_class_share": 0.95})
    with pytest.warns(UserWarning, match="catastrophic overfitting at step 8: 80 % .* withstand one step, 10 % withstand 10"):
        watch._warn(8, {"one_step": 0.8, "multi_step": 0.1, "largest_class_share": 0.95})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch._warn(9, {"one_step": 0.8, "multi_step": 0.1, "largest_class_share": 0.95})


@pytest.mark.parametrize("settings", [{"every": 0}, {"steps": 0}, {"gap": 0.0}, {"largest_share": 1.5}])
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    """Named."""
    with pytest.raises(ConfigError, match=next(iter(settings))):
        CollapseWatch(**settings)  # type: ignore[arg-type]
