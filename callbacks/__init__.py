"""Lightning callbacks: what a person sees while a run goes on."""

from callbacks.farewell import Farewell
from callbacks.image_log import ImageLog
from callbacks.progress import PlainProgress
from callbacks.throughput import Throughput

__all__ = ["Farewell", "ImageLog", "PlainProgress", "Throughput"]
