"""Keeps the whole split on the device as uint8. CIFAR-10's training split is 154 MB."""

from collections.abc import Iterator

import numpy as np
import torch

from runner.data.stream import BatchStream, StreamOptions


class ResidentBatches(BatchStream):
    """A stream over images that are stored on the device.

    Args:
        images: (N, H, W, 3) uint8.
        labels: (N,) int64.
        options: how the batches are made.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, options: StreamOptions) -> None:
        super().__init__(labels, options)
        self.images = torch.from_numpy(images).to(self.device)

    def read(self, samples: np.ndarray, sizes: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields all images of the split, without copying them, and the indices of each batch."""
        for index in torch.from_numpy(samples).to(self.device).split(sizes):
            yield self.images, index
