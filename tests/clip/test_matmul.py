"""Products by oneDNN are products: exact as fp32 is, with all gradients, and nothing but large fp32 matrices goes there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import eval as evaluation
import train
from aft.clip import matmul
from aft.defenses import fit_prior
from aft.evaluation import origin

WITH_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Other tests find what they left."""
    before = bool(matmul._libraries)
    yield
    matmul.use_torch()
    if before:
        matmul.use_onednn()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, on_amd: None) -> list[tuple[int, ...]]:
    """Replaced on any processor that can; the sides of every product that goes to oneDNN."""
    seen: list[tuple[int, ...]] = []
    product = matmul._product

    def noted(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        """The product, noted."""
        seen.append((*left.shape, right.shape[1]))
        return product(left, right, bias)

    monkeypatch.setattr(matmul, "_product", noted)
    monkeypatch.setattr(matmul, "LEAST", 1000)
    monkeypatch.setattr(matmul, "WIDE", 16)
    assert matmul.use_onednn()
    return seen


def made(*sides: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers that learn."""
    return torch.randn(*sides, dtype=dtype, generator=torch.Generator().manual_seed(sum(sides))).requires_grad_()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [None, 3])
@pytest.mark.parametrize("width", [12, 24])
def test_gradients_are_those_of_float64(calls: list[tuple[int, ...]], bias: bool, tokens: int | None, width: int) -> None:
    """A layer, its gradients, and a gradient of a gradient (an attack through a defence that climbs): to fp32's last bits."""
    given = [made(20, *([] if tokens is None else [tokens]), width), made(8, width), *([made(8)] if bias else [])]
    exact = [one.detach().double().requires_grad_() for one in given]
    found: list[list[Tensor]] = []
    for x, *layer in (given, exact):
        out = F.linear(x, *layer)
        first = torch.autograd.grad(out.pow(3).sum(), [x, *layer], create_graph=True)
        found.append([out, *first, *torch.autograd.grad(first[0].pow(2).sum(), [x, layer[0]])])
    for ours, wanted in zip(*found, strict=True):
        assert torch.allclose(ours.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.detach().abs().max()))
    rows = 20 * (tokens or 1)
    assert {(rows, width, 8), (rows, 8, width)} <= set(calls), "forward, by the input"
    assert ((8, rows, width) in calls) is (width >= matmul.WIDE), "by the weights, where they are wide"


def test_order_in_memory_does_not_matter(calls: list[tuple[int, ...]]) -> None:
    """Transposed and strided matrices, and one expanded over rows."""
    for left in (made(30, 40).t(), made(40, 60)[:, ::2], made(1, 30).expand(40, 30)):
        for right in (made(16, 30).t(), made(30, 32)[:, ::2]):
            assert torch.allclose(left @ right, (left.double() @ right.double()).float(), atol=1e-5)
    assert len(calls) == 6


@pytest.mark.parametrize("left, right", [
    (made(40, 40, dtype=torch.float64), made(40, 40, dtype=torch.float64)),
    (made(40, 40).bfloat16(), made(40, 40).bfloat16()),
    (torch.ones(40, 40, dtype=torch.int64), torch.ones(40, 40, dtype=torch.int64)),
    (made(5, 5), made(5, 5)),
    (made(41, 40).t(), made(41, 15)),
    (made(40, 0), made(0, 40)),
    (made(40, 40).detach().to_sparse(), made(40, 40)),
], ids=["float64", "bf16", "int64", "small", "transposed and narrow", "empty", "sparse"])  # fmt: skip
def test_all_else_is_left_to_torch(calls: list[tuple[int, ...]], left: Tensor, right: Tensor) -> None:
    """The very results that torch gives without us."""
    ours = left @ right, torch.addmm(right[:1, 0:1].to_dense() if right.numel() else made(1), left, right, beta=2, alpha=3)
    assert not calls
    matmul.use_torch()
    assert torch.equal(ours[0], left @ right)
    assert torch.equal(ours[1], torch.addmm(right[:1, 0:1].to_dense() if right.numel() else made(1), left, right, beta=2, alpha=3))


def test_scaled_sums_are_left_to_torch(calls: list[tuple[int, ...]]) -> None:
    """``alpha`` and ``beta`` other than 1, and what is added to a matrix and not to each row."""
    left, right = made(40, 40), made(40, 40)
    for added, scales in ((made(40), {"alpha": 2.0}), (made(40), {"beta": 0.5}), (made(40, 40), {}), (made(1), {})):
        wanted = scales.get("beta", 1.0) * added.double() + scales.get("alpha", 1.0) * (left.double() @ right.double())
        assert torch.allclose(torch.addmm(added, left, right, **scales), wanted.float(), atol=1e-4)
    assert not calls


def test_faults_are_told_by_torch(calls: list[tuple[int, ...]]) -> None:
    """Sides and kinds that do not fit raise what they always raise."""
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        torch.mm(made(40, 40), made(41, 40))
    with pytest.raises(RuntimeError, match="dtype"):
        torch.mm(made(40, 40), made(40, 40, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="must be a matrix"):
        torch.mm(made(2, 40, 40), made(40, 40))
    with pytest.raises(RuntimeError, match="dtype"):
        torch.addmm(made(40, dtype=torch.float64), made(40, 40), made(40, 40))
    assert not calls


def test_operations_are_counted_as_before(calls: list[tuple[int, ...]]) -> None:
    """The counter sits above the replacement."""
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(((images := made(40, 30)) @ made(30, 20)).sum(), images)
    assert counter.get_total_flops() == 2 * 2 * 40 * 30 * 20 and len(calls) == 2


@pytest.mark.parametrize("why", ["intel", "avx2", "switch", "mkl", "onednn"])
def test_nothing_is_replaced_without_need(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """Intel's processors, those without AVX-512, the switch, and a torch without either library."""
    matmul.use_torch()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2" if why == "avx2" else "AVX512")
    monkeypatch.setattr(matmul, "vendor", lambda: "vendor_id : GenuineIntel" if why == "intel" else "vendor_id : AuthenticAMD")
    monkeypatch.setenv(matmul.SWITCH, "0" if why == "switch" else "1")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: why != "mkl")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: why != "onednn")
    assert not matmul.use_onednn()


def test_importing_replaces_nothing() -> None:
    """The library leaves the process of its user as it is; train.py and eval.py ask for it."""
    code = "import aft.clip, aft.clip.matmul as m, aft.methods, aft.evaluation; assert not m._libraries; print('as it was')"
    assert "as it was" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("program", [train.main, evaluation.main, fit_prior.main], ids=["train", "eval", "fit_prior"])
def test_programs_ask_for_it(program: Callable[[list[str]], object], monkeypatch: pytest.MonkeyPatch, on_amd: None, tmp_path: Path) -> None:
    """Each, before it does anything: here the first thing that it makes stops it. What cards say of the machine tells it, too."""

    class Stop(Exception):
        """Far enough."""

    def stops(*args: object, **kwargs: object) -> None:
        """Instead of its work."""
        raise Stop

    monkeypatch.setattr(train, "Main", stops)
    monkeypatch.setitem(evaluation.COMMANDS, "report", stopping := type("Stopping", (evaluation.COMMANDS["report"],), {"run": stops}))
    monkeypatch.setattr(fit_prior.FitPrior, "run", stops)
    assert stopping is evaluation.COMMANDS["report"]
    prior = ["--data", "Sample", "--out", str(tmp_path / "x")]
    words = {train.main: ["fit"], evaluation.main: ["report", str(tmp_path)], fit_prior.main: prior}[program]
    matmul.use_torch()
    assert origin.device_name(torch.device("cpu")) == "cpu"
    with pytest.raises(Stop):
        program(words)
    assert matmul.products() == "onednn" and origin.device_name(torch.device("cpu")) == "cpu, fp32 products by oneDNN"


def test_inside_torchs_products_asking_for_others_lasts_no_longer(on_amd: None) -> None:
    """Afterwards as before, on both sides."""
    for before, ask in (("torch", matmul.use_torch), ("onednn", matmul.use_onednn)):
        ask()
        with matmul.torchs_products():
            assert matmul.products() == "torch"
            matmul.use_onednn()
        assert matmul.products() == before


def test_slices_go_there_without_their_gaps(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One description of several a class: rows lie apart, and oneDNN took 1,500 times as long for them."""
    bank, images, seen = made(40, 5, 30).detach(), made(20, 30).detach(), []
    monkeypatch.setattr(matmul, "dense", lambda matrix, dense=matmul.dense: seen.append(dense(matrix)) or seen[-1])
    assert torch.allclose(images @ bank[:, 1].T, images @ bank[:, 1].clone().T, atol=1e-5)
    assert len(seen) == 4 and all(one.is_contiguous() or one.t().is_contiguous() for one in seen)


def test_taking_it_back_takes_it_back(calls: list[Any]) -> None:
    """And it can be asked for again."""
    left, right = made(40, 40), made(40, 40)
    assert matmul.use_onednn() and matmul.use_onednn() and len(matmul._libraries) == 1, "twice is once"
    torch.mm(left, right)
    matmul.use_torch()
    torch.mm(left, right)
    assert len(calls) == 1
    matmul.use_onednn()
    torch.mm(left, right)
    assert len(calls) == 2


def test_torchs_own_for_a_while(calls: list[Any]) -> None:
    """Inside torch's, afterwards what was there before, also after an error and one inside the other."""
    with pytest.raises(ZeroDivisionError), matmul.torchs_products():
        with matmul.torchs_products():
            assert matmul.products() == "torch"
        assert matmul.products() == "torch"
        torch.mm(made(40, 40), made(40, 40))
        _ = 1 / 0
    assert matmul.products() == "onednn" and not calls
    matmul.use_torch()
    with matmul.torchs_products():
        pass
    assert matmul.products() == "torch"
