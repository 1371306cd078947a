"""The loader's figures: every case runs, a step waits when it is faster than a worker, cores follow from the cost of the model."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import loader


def test_every_case_gives_whole_batches_of_bytes(tmp_path: Path) -> None:
    """Files made here, reduced and small shards, and the sample, each through its datamodule."""
    for name, make in loader.cases(tmp_path, 256).items():
        batch = next(loader.endless(make(0)))
        assert batch.images.dtype == torch.uint8, name
        assert tuple(batch.images.shape) == ((128, 3, 32, 32) if "32 px" in name else (64, 3, 224, 224)), name


def test_pictures_cost_what_photographs_cost() -> None:
    """Detail at all scales: neither flat nor white noise, by the bytes of the JPEG; and the same at every run."""
    data = io.BytesIO()
    loader.picture(0).save(data, "JPEG", quality=95)
    assert 20_000 < len(data.getvalue()) < 150_000 and loader.picture(0).tobytes() == loader.picture.__wrapped__(0).tobytes()


class Clock:
    """Stands for the module ``time``: it goes on by what is slept alone, however busy the machine is."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        """Now."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Later."""
        self.now += seconds


def test_a_step_waits_for_what_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a worker that takes 10 ms a batch, two batches ahead at most: steps of 5 ms wait half of the time, steps of 10 or 20 ms never."""
    clock, ends = Clock(), [0.0]

    def ready() -> None:
        """When the next batch is."""
        ends.append(max(ends[-1] + 0.01, clock.now - 0.02))
        clock.sleep(max(0.0, ends[-1] - clock.now))

    monkeypatch.setattr(loader, "time", clock)
    monkeypatch.setattr(loader, "endless", lambda data: (ready() for _ in itertools.count()))
    fast, even, slow = loader.waiting_at(lambda workers: None, loader.BATCH / 0.01, 3, 6)  # type: ignore[arg-type,return-value]
    assert fast["expected"] == 0.5 and even["expected"] == slow["expected"] == 0
    assert fast["median"] == pytest.approx(0.5) and even["median"] == pytest.approx(0) == slow["median"]


def test_a_core_is_a_core_and_training_has_them_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rates are measured in one thread; what waits in training, in as many as there were."""
    threads: dict[str, int] = {}

    def noted(name: str, result: Any) -> Any:
        """Stands for a measurement."""
        return lambda *given: (threads.__setitem__(name, torch.get_num_threads()), result)[1]

    one = {"median": 1.0, "quarter": 1.0, "three_quarters": 1.0}
    rates = {name: {"here": one, "worker": one} for name in (loader.ORIGINAL, loader.REDUCED)}
    for name, result in (("cases", dict.fromkeys(rates)), ("rates", rates), ("waiting_at", []), ("waiting_in_training", one)):
        monkeypatch.setattr(loader, name, noted(name, result))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loader.main(["--quick", "--out", str(tmp_path / "loader.json")])
        assert threads == {"cases": 1, "rates": 1, "waiting_at": 1, "waiting_in_training": 2} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("words", [["--images-per-second", "0"], ["--achieved", "-1"]])
def test_rates_that_are_none_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Zero images a second is no question."""
    with pytest.raises(SystemExit):
        loader.main(["--quick", *words])
    assert f"{words[0]} {words[1]}: give a number above 0" in capsys.readouterr().err


def test_cores_follow_from_images_a_second() -> None:
    """docs/cluster.md's example: 400 TFLOP/s train 6,500 images/s of ViT-B/32 at two attack steps; a given figure goes before."""
    assert loader.needed("ViT-B-32", 2, 400e12) == pytest.approx(6485, rel=1e-3)
    found = {name: {"worker": {"median": rate}} for name, rate in ((loader.ORIGINAL, 400.0), (loader.REDUCED, 1000.0))}
    (row,) = loader.cores(found, 1.0, given=1000.0)
    assert row["cores"] == {loader.ORIGINAL: 3, loader.REDUCED: 1}
