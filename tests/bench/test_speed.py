"""`make bench`: what its rows mean, what is written, and that the page says what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from aft import methods
from aft.clip import cost, load_model
from aft.errors import ConfigError, DataError
from aft.evaluation.effort import span
from aft.methods import FARE, AdversarialFineTuning, TeCoA
from bench.page import placed
from bench.speed import __main__ as command
from bench.speed import counts, record, startup
from bench.speed.row import Effort, Found, NotHere, Row, Target, middle_half
from bench.speed.rows import ROWS
from bench.speed.setting import MadeUp, SideBySide, beside, tiny, trainer
from bench.speed.training import ADAMW, Bare, ColdOrKept, against_bound, attack_of, cache_teacher, text_each_step
from datamodules.zero_shot_table import table


def row_of(values: list[float], target: Target | None = None, name: str = "made_up") -> Row:
    """A row that measures nothing."""
    return Row(name, "this over that, which is said in more words than a line of the table has", lambda effort: Found(values), target)


@pytest.mark.parametrize(("bound", "below", "equal", "above"), [
    ("at most", True, True, False), ("at least", False, True, True), ("exactly", False, True, False),
])  # fmt: skip
def test_a_target_is_met_on_the_right_side(bound: str, below: bool, equal: bool, above: bool) -> None:
    target = Target(bound, 1.0)  # type: ignore[arg-type]
    assert (target.met(0.9), target.met(1.0), target.met(1.1)) == (below, equal, above)


def test_median_and_spread_are_of_the_repeats() -> None:
    told = record.measured(row_of([5.0, 1.0, 2.0, 4.0, 3.0], Target("at most", 2.9)), Found([5.0, 1.0, 2.0, 4.0, 3.0]), Effort(), 1.0, 0.0)
    assert (told["median"], told["quartiles"], told["range"], told["met"]) == (3.0, [2.0, 4.0], [1.0, 5.0], False)
    assert middle_half([7.0]) == (7.0, 7.0)


def test_a_gpu_has_its_own_target() -> None:
    for row in (row for row in ROWS if row.name.startswith("step")):
        assert row.aim(Effort(device="cuda")) == Target("at most", 1.05) and row.aim(Effort()) == Target("at most", 1.15)


def test_names_are_distinct_and_the_table_fits_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    told = [record.measured(row, Found([1.2345, 1.3456]), Effort(), 1.0, 0.0) for row in ROWS]
    record.show([*told, record.missing(ROWS[0], "two processes need two cores")])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= record.COLUMNS and "not measured" in " ".join(lines)


def test_the_tiny_clip_costs_what_the_row_says() -> None:
    """0.02 GFLOP an image, and a prompt 0.68 of that, as torch counts them."""
    model = load_model(tiny())
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        found = []
        for run in (lambda: model.encode(torch.rand(1, 3, 32, 32)), lambda: model.encode_text(["a photo of a cat"])):
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                run()
            found.append(counter.get_total_flops())
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert found[0] == pytest.approx(0.02e9, rel=0.1) and found[1] / found[0] == pytest.approx(0.68, rel=0.02)
    assert found[0] == pytest.approx(cost.vit_cost(model.record.config).forward, rel=0.01)


def test_held_counts_each_storage_once_and_no_weight() -> None:
    layer = torch.nn.Linear(4, 4)
    with counts.Held(layer) as held:
        x = torch.rand(2, 4, requires_grad=True)
        layer(x).square().sum()
    assert held.bytes == 2 * (2 * 4 * 4)  # the input of the layer and that of the square, fp32


def test_a_call_too_many_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(iter(counts.BESIDE_THE_ATTACK))
    monkeypatch.setattr(counts, "BESIDE_THE_ATTACK", {first: 1})
    assert counts.encoder_calls(Effort()).values == [0.0]
    monkeypatch.setattr(counts, "BESIDE_THE_ATTACK", {first: 2})
    assert counts.encoder_calls(Effort()).values == [1.0]


def test_every_method_is_counted() -> None:
    """A new one, too: the row says of all methods."""
    kinds = {kind for kind in vars(methods).values() if isinstance(kind, type) and issubclass(kind, AdversarialFineTuning)}
    assert counts.BESIDE_THE_ATTACK.keys() == kinds - {AdversarialFineTuning}


def test_every_second_time_the_others_come_first() -> None:
    order: list[str] = []
    watch = SideBySide({"other": lambda batch: order.append("other")}, torch.device("cpu"))
    method = next(iter(counts.BESIDE_THE_ATTACK))(tiny(), attack=attack_of(1), optimizer=ADAMW)
    step = method.training_step
    method.training_step = lambda *args: (order.append("step"), step(*args))[1]  # type: ignore[method-assign]
    trainer(Effort(), 4, [watch]).fit(method, datamodule=MadeUp(4))
    assert order == ["step", "other", "other", "step", "step", "other", "other", "step"]
    found = watch.found("other", "step", {})
    assert len(found.values) == 2 and found.values[0] == found.parts["other"][0] / found.parts["step"][0]
    assert all(a < s for a, s in zip(watch.seconds["arithmetic"], watch.seconds["step"], strict=True))


def test_what_the_trainer_does_after_a_step_is_in_the_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every second step waits for its log; the step before the others and the one after them, and the last one. By a made-up clock."""
    clock = [0.0]

    class Slow(L.pytorch.loggers.CSVLogger):
        """Takes a while to write."""

        def log_metrics(self, *args: Any, **kwargs: Any) -> None:
            """A second, for all that the clock says."""
            clock.append(clock[-1] + 1)

        def save(self) -> None:
            """Nothing to write."""

    monkeypatch.setattr(SideBySide, "clock", lambda self: (clock[-1], clock[-1]))
    method = TeCoA(tiny(), attack=attack_of(1), optimizer=ADAMW)
    watch = beside(method, MadeUp(4), {"other": lambda batch: None}, Effort(), 4, logger=Slow(tmp_path), log_every_n_steps=2)
    gone = [step - arithmetic for step, arithmetic in zip(watch.seconds["step"], watch.seconds["arithmetic"], strict=True)]
    assert set(gone[1::2]) == {1.0} and set(gone[2::2]) == {0.0} == set(watch.seconds["other"])


def test_the_teacher_is_asked_in_cold_steps_alone() -> None:
    """Cold, kept, kept, cold: a pair of steps has one of each."""
    watch, asked = ColdOrKept(torch.device("cpu")), []

    class Asked(L.Callback):
        """Watches the teacher."""

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            """Each of its forwards, with the kind of the step."""
            pl_module.teacher.visual.register_forward_pre_hook(lambda *_: asked.append(watch.kind))  # type: ignore[union-attr]

    method = FARE(tiny(), attack=attack_of(1), optimizer=ADAMW, cache_teacher=True)
    trainer(Effort(), 8, [watch, Asked()]).fit(method, datamodule=MadeUp(4))
    assert asked == ["cold"] * 4 and [len(one) for one in watch.seconds.values()] == [4, 4]
    found = cache_teacher(tiny, 4, 1, 2)(Effort(quick=True))
    assert len(found.values) == 2 and found.values[0] == found.parts["cold"][0] / found.parts["kept"][0]


def test_the_bound_of_a_whole_step_has_the_optimisers_step_in_it() -> None:
    """Seconds of both are added, repeat by repeat, and AdamW moves the bound's weights as it moves ours: by the rate at first."""
    step, whole = against_bound(Effort(quick=True), tiny(), 4, 1, 2)
    parts = zip(*(whole.parts[name] for name in ("step", "bound", "bound_optimizer")), strict=True)
    assert whole.values == [ours / (passes + optimizer) for ours, passes, optimizer in parts]
    assert step.parts["bound"] == whole.parts["bound"] and "bound_optimizer" not in step.parts
    bare, data = Bare(load_model(tiny()), 1, 10, torch.device("cpu")), MadeUp(4)
    before = [p.detach().clone() for p in bare.learning.visual.parameters()]
    bare.step(data.batch)
    bare.descend(data.batch)
    moved = [float((p.detach() - b).abs().max()) for p, b in zip(bare.learning.visual.parameters(), before, strict=True)]
    assert max(moved) == pytest.approx(ADAMW.lr, rel=0.01) and all(p.grad is None for p in bare.learning.parameters())


def test_more_classes_slow_the_published_loop_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts operations, so that other work on the machine changes nothing."""
    with FlopCounterMode(display=False) as counter:
        monkeypatch.setattr(SideBySide, "clock", lambda self: (float(counter.get_total_flops()),) * 2)
        few, many = (text_each_step(tiny, classes, 4, 1, 2)(Effort(quick=True)) for classes in (2, 64))
    assert min(many.parts["theirs"]) > 2 * max(few.parts["theirs"])
    assert max(many.parts["step"]) == pytest.approx(min(few.parts["step"]), rel=0.01)
    assert min(many.values) > max(few.values) > 1


def test_a_quick_run_writes_the_file_and_shows_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One real row and one made up, by the command; a row that is measured again takes its old place."""
    out, (held,) = tmp_path / "bench.json", (row for row in ROWS if row.name == "held")
    monkeypatch.setattr(command, "ROWS", (held, row_of([1.0, 2.0], Target("at least", 1.5))))
    command.main(["--quick", "--out", str(out)])
    told = record.read(out)
    assert [row["name"] for row in told["rows"]] == ["held", "made_up"] and told["quick"]
    assert {"processor", "cores", "system", "accelerator"} == told["machine"].keys() and told["threads"] == torch.get_num_threads()
    assert all(row["met"] for row in told["rows"]) and "median" in capsys.readouterr().out
    command.main(["--quick", "--only", "held", "--out", str(out)])
    assert [row["name"] for row in record.read(out)["rows"]] == ["held", "made_up"]


def test_rows_of_two_machines_are_not_put_into_one_table(tmp_path: Path) -> None:
    out, start = tmp_path / "bench.json", record.head(Effort())
    record.write(out, {**start, "machine": {**start["machine"], "processor": "another"}}, [], [])
    with pytest.raises(DataError, match="another machine"):
        record.older(out, start, ["calls"])


def test_rows_by_other_products_are_not_put_into_one_table(tmp_path: Path) -> None:
    """oneDNN's are twice as fast as torch's on some CPUs; a file that does not say whose it has is refused as well."""
    out, start = tmp_path / "bench.json", record.head(Effort())
    assert start["products"] in ("onednn", "torch")
    record.write(out, {**start, "products": "other"}, [], [])
    with pytest.raises(DataError, match="another products"):
        record.older(out, start, ["calls"])
    record.write(out, {key: value for key, value in start.items() if key != "products"}, [], [])
    with pytest.raises(DataError, match="another products"):
        record.older(out, start, ["calls"])


def test_a_row_that_cannot_be_measured_says_why() -> None:
    def nothing(effort: Effort) -> Found:
        raise NotHere("no such package")

    assert command.measure(Row("x", "y", nothing), Effort())["not_measured"] == "no such package"


def test_a_row_that_fails_ends_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What it said stands in its row and on the page, whatever signs are in it; the command ends with 1."""
    def broken(effort: Effort) -> Found:
        raise RuntimeError("no | more\n/place/of/somebody: line 3")

    out, page = tmp_path / "bench.json", tmp_path / "page.md"
    page.write_text("<!-- bench.speed -->\n<!-- end of bench.speed -->\n")
    seen: list[str] = []

    def after(effort: Effort) -> Found:
        seen.append(page.read_text())
        return Found([1.0])

    first, last = Row("first", "what fails", broken), Row("last", "what follows", after)
    monkeypatch.setattr(command, "ROWS", (first, last))
    for name, place in (("ROOT", tmp_path), ("OUT", out), ("PAGE", page)):
        monkeypatch.setattr(command, name, place)
    assert command.main([]) == 1
    told, other = record.read(out)["rows"]
    assert told["not_measured"] == "RuntimeError: no / more" and told["failed"] and other["median"] == 1.0
    assert "| what fails |  | not measured: RuntimeError: no / more |" in seen[0], "file and page are written after every row"
    assert "what follows" in page.read_text() and "/place/of/somebody" in capsys.readouterr().err
    assert command.main(["--only", "last"]) == 0


def test_unknown_rows_and_quick_figures_are_refused() -> None:
    with pytest.raises(ConfigError, match="step"):
        command.main(["--only", "stepp"])
    with pytest.raises(ConfigError, match="--out"):
        command.main(["--quick"])


def test_the_page_says_what_was_measured() -> None:
    """The table of docs/performance.md is that of results/bench.json, to the letter: no figure is copied by hand."""
    page = command.PAGE.read_text(encoding="utf-8")
    if not command.OUT.exists():
        pytest.skip("results/bench.json is not there: run make bench")
    assert placed(page, "bench.speed", record.page(record.read(command.OUT))) == page
    assert not json.loads(command.OUT.read_text())["quick"]


def test_what_was_measured_is_what_is_measured() -> None:
    """A row that says, reaches for or is called something else today has to be measured again: python -m bench.speed --only ROW."""
    if not command.OUT.exists():
        pytest.skip("results/bench.json is not there: run make bench")
    told = [(row["name"], row["what"], row.get("target")) for row in record.read(command.OUT)["rows"]]
    assert told == [(row.name, row.what, None if (aim := row.aim(Effort())) is None else str(aim)) for row in ROWS]


def test_the_stretches_of_a_start_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """On the screen and on the page; nothing is said where no start was measured."""
    found = Found([4.0, 6.0], {"imports": [3.0, 5.0], "first step": [1.0, 1.0]}, {"imports": {"torch": 1.25, "numpy": 0.5}})
    row = record.measured(row_of([4.0], name="start_up"), found, Effort(), 1.0, 0.0)
    said = "imports 4.0 s, first step 1.0 s. Own time of the dearest packages: torch 1.2 s, numpy 0.5 s."
    record.show([row])
    assert said in " ".join(capsys.readouterr().out.split())
    assert said in record.page({**record.head(Effort()), "rows": [row]})
    assert record.start_in_words([record.missing(row_of([1.0], name="start_up"), "no")]) == ""


def test_the_cost_of_an_evaluation_is_shown_by_its_robust_share() -> None:
    """On the page, in the order of the shares; the suite's time is that of all of its images."""
    curve = [{"robust_share": share, "forwards": 3 + 85 * share, "seconds": [one * (0.01 + 0.09 * share) for one in (1, 1, 3)]}
             for share in (0.0, 1.0, 0.25)]
    curve[0]["seconds"] = [0.02, 0.01, 0.03]
    told = {"attacks": "APGD-CE", "steps": 20, "targets": 3, "images": 4, "curve": curve}
    row = record.measured(row_of([1.0], name="along_shares"), Found([1.0], {}, told), Effort(), 1.0, 0.0)
    shown = [line for line in record.page({**record.head(Effort()), "rows": [row]}).splitlines() if "%" in line]
    images = sum(one.images for one in table().values())
    assert [line.split("|")[1:4] for line in shown] == [
        [" 0% ", " 3.0 ", " 0.10 (0.10 to 0.20) "], [" 25% ", " 24.2 ", " 0.33 (0.33 to 0.33) "],
        [" 100% ", " 88.0 ", " 1.00 (1.00 to 1.00) "],
    ]  # fmt: skip
    assert shown[0].split("|")[4].strip() == span(0.02 * images)
    assert record.shares_in_words([record.missing(row_of([1.0], name="along_shares"), "no")]) == ""


def test_what_early_exit_saves_is_shown_by_the_robust_share(capsys: pytest.CaptureFixture[str]) -> None:
    """On the screen and on the page."""
    found = Found([0.5], {}, {"by_robust_share": {"0": 0.03, "0.5": 0.5, "1": 0.99}})
    row = record.measured(row_of([0.5], name="robust_share"), found, Effort(), 1.0, 0.0)
    said = "ours over AutoAttack's own, by the robust share: 0.03 at 0%, 0.50 at 50%, 0.99 at 100%."
    record.show([row])
    assert said in " ".join(capsys.readouterr().out.split()) and said in record.page({**record.head(Effort()), "rows": [row]})


def test_a_wait_that_comes_seldom_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """All seconds of a run that wait over all of its seconds; a median over its steps would be 0."""
    runs = iter([{"waits": [0.0, 0.0, 0.0, 1.0], "steps": [1.0] * 4}, {"waits": [0.0] * 4, "steps": [1.0] * 4}])
    monkeypatch.setattr(startup, "run", lambda steps, folder: next(runs))
    assert startup.data_wait(Effort(quick=True)).values == [0.2, 0.0]


def test_a_wait_stands_beside_the_step_that_it_came_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one of the run is not counted, one between epochs is: two epochs of two steps, each step ten times as long as the last."""
    now = 0.0
    monkeypatch.setattr(startup.time, "time", lambda: now)
    watch, file = startup.FirstStep(str(tmp_path / "stamps.json")), tmp_path / "stamps.json"
    for batch_idx, wait, step in ((0, 5.0, 1.0), (1, 0.5, 10.0), (0, 7.0, 100.0), (1, 0.25, 1000.0)):
        now += wait
        watch.on_train_batch_start(None, None, None, batch_idx)  # type: ignore[arg-type]
        now += step
        watch.on_train_batch_end(None, None, None, None, batch_idx)  # type: ignore[arg-type]
    watch.on_train_end(None, None)  # type: ignore[arg-type]
    told = json.loads(file.read_text())
    assert list(zip(told["waits"], told["steps"], strict=True)) == [(0.5, 10.0), (7.0, 100.0), (0.25, 1000.0)]
