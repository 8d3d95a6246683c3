"""The whole split on the device as uint8. CIFAR-10's training split is 154 MB."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from runner.batches.stream import BatchStream


class ResidentBatches(BatchStream):
    """A stream over images that lie on the device.

    Args:
        images: (N, H, W, 3) uint8.
        labels: (N,) int64.
        settings: see BatchStream.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, **settings: Any) -> None:
        super().__init__(labels, **settings)
        self.images = torch.from_numpy(images).to(self.device)

    def read(self, samples: np.ndarray, sizes: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Gives the split itself, and the samples as they are."""
        for index in torch.from_numpy(samples).to(self.device).split(sizes):
            yield self.images, index
