"""Loss curves without and with a speed-up: equal where the mathematics is the same, and seen where they are not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from aft.clip import ModelSpec, matmul
from aft.errors import ConfigError, DataError
from aft.methods import AdversarialFineTuning
from aft.methods.teacher_cache import TeacherCache
from bench import curves


@pytest.fixture(autouse=True)
def small(tiny: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model in MiniCLIP-32's place."""
    monkeypatch.setattr(curves, "MINI", tiny)


@pytest.mark.parametrize("name", ["folded", "patches"])
def test_another_order_of_products_leaves_the_curve_where_it_is(name: str, tmp_path: Path) -> None:
    out = tmp_path / "curves.json"
    assert curves.main(["--only", name, "--steps", "2", "--seeds", "1", "--out", str(out)]) == 0
    told = json.loads(out.read_text())["speed_ups"][name]
    assert told["holds"] and len(told["with"][0]) == 2 and told["with"][0][0] > 0


def test_channels_last_leaves_the_curve_where_it_is() -> None:
    """On a ResNet, whose weights lie otherwise in memory on the two sides."""
    orders = [curves.tecoa_resnet(0, 2)[0] for _ in range(2)]
    curves.in_usual_order(orders[0])
    last = [any(w.dim() == 4 and not w.is_contiguous() for w in method.model.visual.parameters()) for method in orders]
    told = curves.compared("channels_last", range(1), 2)
    assert last == [False, True] and told["holds"] and told["without"][0][0] > 0


def test_a_cache_leaves_the_curve_where_it_is_and_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the second epoch of the sample's 2,000 images, where the teacher is asked no more; FARE, without augmentation."""
    asked: list[int] = []
    call = TeacherCache.__call__

    def counted(self: TeacherCache, index: Any, images: Any, encode: Any) -> Any:
        """How many images the teacher encodes."""
        return call(self, index, images, lambda rows: (asked.append(len(rows)), encode(rows))[1])

    monkeypatch.setattr(TeacherCache, "__call__", counted)
    told = curves.compared("cache_teacher", range(1), 66)
    assert told["holds"] and sum(asked) <= 2000 and len(asked) < 66 and told["precision"] == "64-true"


def test_another_curve_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def heated(method: AdversarialFineTuning) -> list[L.Callback]:
        method.logit_scale = 7.0
        return []

    monkeypatch.setitem(curves.SPEED_UPS, "folded", curves.SpeedUp(curves.untouched, heated))
    assert curves.main(["--only", "folded", "--steps", "1", "--seeds", "1", "--out", str(tmp_path / "curves.json")]) == 1


@pytest.mark.parametrize(("with_it", "holds"), [
    ([1.01, 2.01, 3.01], True),  # a hundredth each time, where seeds differ by 1
    ([3.1, 4.1, 5.1], False),  # surely apart, by more than twice the noise
    ([1.0, 4.0, 1.0], False),  # equal on the average, but not known to be: a standard error of 1.2
])  # fmt: skip
def test_a_difference_is_judged_by_pairs_and_noise(with_it: list[float], holds: bool) -> None:
    told = curves.differences([[9.0, end] for end in (1.0, 2.0, 3.0)], [[9.0, end] for end in with_it], 1)
    assert told["noise_over_seeds"] == 1 and curves.within_noise(told) == holds


def test_the_mean_difference_has_its_standard_error() -> None:
    told = curves.differences([[1.0, 3.0], [2.0, 6.0]], [[2.0, 4.0], [2.0, 12.0]], 2)
    assert told == pytest.approx({"end_without": 3, "end_with": 5, "noise_over_seeds": 2**0.5, "difference": 2, "standard_error": 1})


def test_nothing_is_compared_where_there_is_one_way_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """With oneDNN switched off both would be torch's products."""
    monkeypatch.setenv(matmul.SWITCH, "0")
    assert "not_measured" in curves.compared("onednn", range(1), 1)


def test_each_way_multiplies_as_it_says_and_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch, on_amd: None) -> None:
    """Torch's products without, oneDNN's with."""
    used: list[str] = []

    class Seen(L.Callback):
        """Whose products a step has."""

        def on_train_batch_end(self, *args: Any) -> None:
            """One step."""
            used.append(matmul.products())

    one, before = curves.SPEED_UPS["onednn"], matmul.products()

    def seen(change: curves.Change) -> curves.Change:
        """The same, watched."""
        return lambda method: [*change(method), Seen()]

    watched = replace(one, here=lambda: True, with_it=seen(one.with_it), without=seen(one.without))
    monkeypatch.setitem(curves.SPEED_UPS, "onednn", watched)
    curves.compared("onednn", range(2), 1)
    assert used == ["torch"] * 2 + ["onednn"] * 2 and matmul.products() == before


def test_curves_are_merged_by_name_and_never_over_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other steps or seeds go to another file; one speed-up leaves the others where they are, if they were measured alike."""
    out, page = tmp_path / "curves.json", tmp_path / "page.md"
    page.write_text("<!-- bench.curves -->\n<!-- end of bench.curves -->\n")
    monkeypatch.setattr(curves, "OUT", out)
    monkeypatch.setattr(curves, "PAGE", page)
    one = {"unchanged": True, "largest_difference": 0.0, "end_without": 1.0, "difference": 0.0, "standard_error": 0.0,
           "noise_over_seeds": 0.1, "holds": True}  # fmt: skip
    monkeypatch.setattr(curves, "compared", lambda name, seeds, steps: {**one, "name": name})
    for other in ("--steps", "--seeds"):
        with pytest.raises(ConfigError, match="--out"):
            curves.main(["--only", "bf16", other, "2"])
    for name in ("bf16", "folded"):
        assert curves.main(["--only", name]) == 0
    assert list(json.loads(out.read_text())["speed_ups"]) == ["folded", "bf16"] and "bf16" in page.read_text()
    whole = out.read_text()
    for fact, there, instead in (("versions", '"torch":', '"another":'), ("threads", '"threads": ', '"threads": 1'),
                                 ("products", '"products": "', '"products": "by hand, '),
                                 ("images_a_step", '"images_a_step": [', '"images_a_step": [1')):  # fmt: skip
        out.write_text(whole.replace(there, instead, 1))
        with pytest.raises(DataError, match=f"another {fact}"):
            curves.main(["--only", "bf16"])
