"""Lightning callbacks and plugins: what a person sees while a run goes on, and what keeps a run safe."""

from callbacks.activations import ActivationCheckpointing
from callbacks.average import AveragedWeights
from callbacks.checkpoint_io import AtomicCheckpointIO
from callbacks.collapse_watch import CollapseWatch
from callbacks.compiled import Compiled
from callbacks.farewell import Farewell
from callbacks.image_log import ImageLog
from callbacks.interruption import Interruption, Stopped
from callbacks.probe import Probe
from callbacks.progress import PlainProgress, TerminalProgress
from callbacks.run_lock import RunLock
from callbacks.saving import KeepSaving
from callbacks.throughput import Throughput

__all__ = [
    "ActivationCheckpointing",
    "AtomicCheckpointIO",
    "AveragedWeights",
    "CollapseWatch",
    "Compiled",
    "Farewell",
    "ImageLog",
    "Interruption",
    "KeepSaving",
    "PlainProgress",
    "Probe",
    "RunLock",
    "Stopped",
    "TerminalProgress",
    "Throughput",
]
