"""Adversarially robust CLIP: train it, defend it, attack it, and say honestly how robust it is."""

__version__ = "0.1.0"
