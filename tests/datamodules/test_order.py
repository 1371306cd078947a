"""The order of training repeats, splits over ranks and resumes; evaluation sees every sample once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import lightning
import pytest
import torch
from torch import Tensor, nn

from aft.batch import Batch
from aft.errors import ConfigError, RunError
from datamodules import ImageFolder
from datamodules.images import in_unit_range
from datamodules.order import Batches, BatchKey, ExactOrder, TrainLoader, TrainOrder


def indices(loader: TrainLoader, epoch: int = 0) -> list[list[int]]:
    loader.sampler.set_epoch(epoch)
    return [batch.index.tolist() for batch in loader]


def test_same_seed_and_epoch_repeat_and_epochs_differ(make_folder) -> None:
    """Order and augmentation are functions of (seed, epoch): equal for equal, different for another epoch or seed."""
    folder = str(make_folder(per_class=8))

    def run(seed: int, epoch: int) -> list[Batch]:
        loader = ImageFolder(folder, batch_size=24, augment="crop_flip", padding=2, seed=seed).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return list(loader)

    first, again = run(3, 1)[0], run(3, 1)[0]
    assert torch.equal(first.index, again.index) and torch.equal(first.images, again.images)
    for other in (run(3, 2)[0], run(4, 1)[0]):
        assert not torch.equal(first.index, other.index)
        assert not torch.equal(first.images[first.index.argsort()], other.images[other.index.argsort()])


def test_augmentation_has_its_own_draws_each_epoch_step_and_seed(make_folder) -> None:
    """The same images in the same order look different in another epoch, step or run, and alike in the same."""
    data = ImageFolder(str(make_folder(per_class=8)), batch_size=24)
    part = data._train_parts["train"]

    def images(epoch: int, step: int, seed: int) -> Tensor:
        batches = Batches(data.store("train"), part.rows_N, part.labels_N, part.index_N, augment="crop_flip", padding=2, seed=seed)
        return batches[BatchKey(torch.arange(24), epoch, step, 0, 24)].images

    assert torch.equal(images(1, 2, 3), images(1, 2, 3))
    assert not any(torch.equal(images(1, 2, 3), other) for other in (images(0, 2, 3), images(1, 0, 3), images(1, 2, 0)))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_partition_each_global_batch(make_folder, as_rank, world: int) -> None:
    """W ranks of batch 12 / W see, step by step, the images (and the augmentation) of one process of batch 12, each once an epoch."""
    folder = str(make_folder(per_class=9))
    alone = list(ImageFolder(folder, batch_size=12, augment="crop_flip", padding=2).train_dataloader())
    ranks = [list(as_rank(ImageFolder(folder, batch_size=12 // world, augment="crop_flip", padding=2), rank, world).train_dataloader())
             for rank in range(world)]
    assert len(alone) == 2 and all(len(batches) == 2 for batches in ranks)
    for step, whole in enumerate(alone):
        assert torch.equal(torch.cat([batches[step].index for batches in ranks]), whole.index)
        assert torch.equal(torch.cat([batches[step].images for batches in ranks]), whole.images)
    seen = torch.cat([batch.index for batch in alone])
    assert len(set(seen.tolist())) == len(seen) == 24  # of 27: the remainder is dropped


def test_evaluation_order_is_exact() -> None:
    """5 images on 2 ranks: 0, 2, 4 and 1, 3; a DistributedSampler would repeat image 0. More ranks than images leave some empty."""
    ranks = [torch.cat([key.rows_B for key in ExactOrder(5, 2, rank, 2)]).tolist() for rank in range(2)]
    assert ranks == [[0, 2, 4], [1, 3]]
    assert [len(ExactOrder(1, 2, rank, 2)) for rank in range(2)] == [1, 0]


def test_too_large_batch_says_so() -> None:
    """No silent epoch of zero steps."""
    with pytest.raises(ConfigError, match="needs 12 training images, but there are 10"):
        TrainOrder(10, 4, 0, world=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_uncached_zip_give_the_same_batches(make_folder, zipped, workers: int) -> None:
    """Batches do not depend on who makes them: memory, or decoded from one zip by forked workers."""
    path = str(zipped(make_folder(per_class=20)))
    settings = dict(batch_size=5, augment="crop_flip", padding=2)
    cached = list(ImageFolder(path, **settings).train_dataloader())
    decoded = list(ImageFolder(path, cache_bytes=0, num_workers=workers, **settings).train_dataloader())
    assert len(cached) == len(decoded) == 12
    for one, other in zip(cached, decoded, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels) and torch.equal(one.index, other.index)


class Recorder(lightning.LightningModule):
    """Writes down which images came in which step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen, self.validated = nn.Parameter(torch.zeros(())), [], []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch_idx, batch.index.tolist(), float(batch.images.double().sum())))
        return self.weight * batch.images.mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.extend(batch.index.tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: ImageFolder, folder: Path, epochs: int, resume: Path | None = None, every: int = 1, **settings: object) -> Recorder:
    recorder = Recorder()
    keep = lightning.pytorch.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    ends = lightning.pytorch.callbacks.ModelCheckpoint(folder, filename="end-{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[keep, ends], logger=False, enable_progress_bar=False,
                                enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, **settings)
    trainer.fit(recorder, data, ckpt_path=resume)
    return recorder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_continues_where_it_stopped(make_folder, tmp_path: Path, workers: int) -> None:
    """From the checkpoint of any step, in the middle or at the end of an epoch, the rest of the run sees what the whole run saw."""
    folder = str(make_folder(per_class=6))

    def data() -> ImageFolder:
        return ImageFolder(folder, batch_size=5, augment="crop_flip", padding=2, holdout=3, num_workers=workers)

    whole = fit(data(), tmp_path / "whole", 3)
    assert [(epoch, step) for epoch, step, *_ in whole.seen] == [(epoch, step) for epoch in range(3) for step in range(3)]
    assert len(whole.validated) == 9 and len(set(whole.validated)) == 3
    assert whole.seen[0][2:] != whole.seen[3][2:]
    for file, step in {"step=1": 1, "step=3": 3, "step=5": 5, "step=6": 6, "end-epoch=0": 3, "end-epoch=1": 6}.items():
        rest = fit(data(), tmp_path / f"rest {file}", 3, tmp_path / "whole" / f"{file}.ckpt")
        assert rest.seen == whole.seen[step:], file
    twice = fit(data(), tmp_path / "twice", 3, tmp_path / "rest step=1" / "step=5.ckpt")
    assert twice.seen == whole.seen[5:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_loaders_process_does_not_end_it(make_folder, signum: int) -> None:
    """SLURM signals every process of a step; one that died would end the step in an error, before the checkpoint."""
    loader = ImageFolder(str(make_folder(per_class=8)), batch_size=2, num_workers=1).train_dataloader()
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(int(worker.pid or 0), signum)
    time.sleep(0.2)
    assert worker.is_alive() and 1 + len(list(batches)) == len(loader)


def test_resume_after_a_limited_epoch_begins_the_next(make_folder, tmp_path: Path) -> None:
    """With limit_train_batches the loader is left half drawn; the next epoch begins at its first batch all the same, also resumed."""
    folder = str(make_folder(per_class=6))
    whole = fit(ImageFolder(folder, batch_size=5), tmp_path / "whole", 3, limit_train_batches=2)
    rest = fit(ImageFolder(folder, batch_size=5), tmp_path / "rest", 3, tmp_path / "whole" / "step=2.ckpt", limit_train_batches=2)
    assert len(whole.seen) == 6 and rest.seen == whole.seen[2:]


def test_resume_in_mid_epoch_with_another_batch_is_refused(make_folder) -> None:
    """A place in the epoch means nothing under another global batch; at the start of an epoch it does not matter."""
    folder = str(make_folder(per_class=6))
    loader = ImageFolder(folder, batch_size=3).train_dataloader()
    next(iter(loader))
    other = ImageFolder(folder, batch_size=2).train_dataloader()
    other.load_state_dict(loader.state_dict())
    with pytest.raises(RunError, match="middle of an epoch"):
        next(iter(other))
    other.sampler.set_epoch(1)
    assert len(indices(other, 1)) == 9


@pytest.mark.filterwarnings("ignore")
def test_two_processes_under_lightning(make_folder, tmp_path: Path) -> None:
    """DDP on two processes: epochs get their own order, global batches are those of one process, 5 held-out images count once."""
    folder = str(make_folder(per_class=7))
    whole = fit(ImageFolder(folder, batch_size=8, holdout=5), tmp_path / "one", 2)
    trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=2, logger=False, enable_checkpointing=False,
                                enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
                                num_sanity_val_steps=0, callbacks=[WriteSeen(tmp_path)])
    trainer.fit(Recorder(), ImageFolder(folder, batch_size=4, holdout=5))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    both = [(epoch, step, a + b) for (epoch, step, a, _), (_, _, b, _) in zip(ranks[0]["seen"], ranks[1]["seen"], strict=True)]
    assert both == [row[:3] for row in whole.seen] and len(both) == 4
    validated = ranks[0]["validated"] + ranks[1]["validated"]
    assert sorted(validated) == sorted(whole.validated) and len(validated) == 10


class WriteSeen(lightning.Callback):
    """Saves what a rank saw."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: Recorder) -> None:
        torch.save({"seen": pl_module.seen, "validated": pl_module.validated}, self.folder / f"rank{trainer.global_rank}.pt")


def test_lightnings_sampler_is_refused(make_folder, as_rank) -> None:
    """use_distributed_sampler on several processes would split each share again, in silence."""
    data = as_rank(ImageFolder(str(make_folder())), 0, 2)
    data.trainer._accelerator_connector = type("Connector", (), {"use_distributed_sampler": True})()
    with pytest.raises(ConfigError, match="use_distributed_sampler is true"):
        data.setup("fit")


class Spy(lightning.Callback):
    """The images as a step gets them, and as the loader's processes sent them."""

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Batch, batch_idx: int) -> None:
        self.seen = batch.images


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("64-true", torch.float64)])
def test_bytes_become_floats_where_they_are_used(make_folder, tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    """A loader's process sends bytes; a step gets floats in the trainer's precision, the same as the loader gives without a trainer."""
    data, spy = ImageFolder(str(make_folder()), batch_size=12, augment="none", holdout=0), Spy()
    trainer = lightning.Trainer(accelerator="cpu", max_steps=1, callbacks=[spy], logger=False, enable_checkpointing=False,
                                enable_progress_bar=False, use_distributed_sampler=False, precision=precision)
    trainer.fit(Recorder(), data)
    assert trainer.train_dataloader.as_bytes and trainer.train_dataloader.dataset.as_bytes
    (alone,) = data.train_dataloader()
    assert alone.images.dtype == torch.float32 and spy.seen.dtype == dtype
    assert torch.equal(spy.seen, alone.images.to(dtype)) and float(alone.images.max()) > 0.5


def test_a_grey_level_is_its_255th_part() -> None:
    """The same bits as in float32 arithmetic, for every level."""
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(in_unit_range(levels), levels.float() / 255) and torch.equal(in_unit_range(levels.double()), levels.double())
