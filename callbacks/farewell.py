"""The last line of a run."""

from __future__ import annotations

import shlex

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class Farewell(L.Callback):
    """Says where the checkpoint is and which command evaluates it."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After the last step."""
        saver = next((c for c in trainer.callbacks if isinstance(c, ModelCheckpoint)), None)  # type: ignore[attr-defined]
        path = None if saver is None else saver.best_model_path or saver.last_model_path
        if not path or not trainer.is_global_zero:
            return
        score = "" if saver is None or saver.best_model_score is None else f" ({saver.monitor} {float(saver.best_model_score):.3f})"
        print(f"checkpoint: {path}{score}", flush=True)
        print("evaluate on the embedded sample (other data: add -c configs/data/NAME.yaml):")
        print(f"  python eval.py -c configs/eval/apgd.yaml --weights {shlex.quote(path)}", flush=True)
