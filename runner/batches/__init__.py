"""Batches of images on the device, from .beton files; the same for any number of ranks."""

from runner.batches.protocol import Batches, open_split

__all__ = ["Batches", "open_split"]
