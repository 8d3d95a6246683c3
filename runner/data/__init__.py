"""Batches of images on the device, read from .beton files; identical for any number of ranks."""

from runner.data.open import Batches, open_split

__all__ = ["Batches", "open_split"]
