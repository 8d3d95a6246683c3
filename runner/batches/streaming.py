"""Reads the split through FFCV's Loader while training goes on, for what does not fit on the device.

FFCV decodes and reads ahead; order, augmentation and ranks are ours, so that the batches are those of the
resident loader to the bit. Its own order would pad and depend on the ranks, its own augmentation on workers.
"""

import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.console import UserError
from runner import cpu
from runner.batches import pixels
from runner.batches.stream import BatchStream

BATCH_SECONDS = 60.0  # longer than this for a batch, and the reader counts as hung


class ReaderError(RuntimeError):
    """FFCV's reader died, or gave no batch in time. Without a limit the iterator would wait for ever."""


class StreamingBatches(BatchStream):
    """A stream over a .beton that stays on disk.

    Args:
        path: the file, whose hash and layout the caller has checked.
        labels: (N,) int64, of the records that are read.
        records: (N,) int64, which records of the file these are; None for all.
        workers: threads that decode.
        settings: see BatchStream.

    Raises:
        UserError: more workers than cores; FFCV's threads are numba's, and there are no more.
    """

    def __init__(
        self,
        path: Path,
        labels: np.ndarray,
        records: np.ndarray | None = None,
        workers: int = 1,
        **settings: Any,
    ) -> None:
        import numba

        cpu.choose_openmp()
        most = numba.config.NUMBA_NUM_THREADS
        if not 1 <= workers <= most:
            raise UserError(f"--workers {workers}: expected 1 to {most}, the usable cores")
        super().__init__(labels, **settings)
        if self.device.type == "cpu":
            pixels.load_loop()
        self.path, self.workers, self.records = path, workers, records
        self.loader: Any = None  # compiled at the first epoch

    def read(self, samples: np.ndarray, sizes: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Streams the samples in their order, cut into the batches."""
        if not sizes:
            return
        with cpu.torch_threads_kept():
            loader = self._open()
            loader.traversal_order.samples = samples if self.records is None else self.records[samples]
            chunks = _within_time(iter(loader), self.path)
        left: list[torch.Tensor] = []
        for size in sizes:
            while sum(map(len, left)) < size:
                # FFCV uses its buffers again: what waits for a later batch must be a copy of ours.
                left.append(next(chunks).clone())
            images = torch.cat(left) if len(left) != 1 else left[0]
            left = [images[size:]] if len(images) > size else []
            yield images[:size].to(self.device), torch.arange(size, device=self.device)

    def _open(self) -> Any:
        """FFCV's Loader, made and compiled once."""
        if self.loader is not None:
            return self.loader
        import ffcv.loader.loader as ffcv_loader
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.traversal_order.base import TraversalOrder

        class GivenOrder(TraversalOrder):
            """The samples that the next epoch is to read, set from outside."""

            def __init__(self, loader: Any) -> None:
                super().__init__(loader)
                self.samples = self.indices

            def sample_order(self, epoch: int) -> np.ndarray:
                return self.samples

        # FFCV 1.0.2 means to take such a class, but its check refuses any that is not in this table.
        ffcv_loader.ORDER_MAP[GivenOrder] = GivenOrder
        self.loader = ffcv_loader.Loader(
            str(self.path),
            batch_size=max(1, self.batch_size // self.world_size),
            num_workers=self.workers,
            os_cache=True,
            order=GivenOrder,
            drop_last=False,
            pipelines={"image": [SimpleRGBImageDecoder()], "label": None},
        )
        return self.loader


def _within_time(iterator: Any, path: Path) -> Iterator[torch.Tensor]:
    """The batches of FFCV's iterator, (n, H, W, 3) uint8 in its own buffers, each within a limited time.

    Its own `next` waits without limit on a queue that a dead thread never fills; this waits on the same queue.
    """
    try:
        while True:
            limit = time.monotonic() + BATCH_SECONDS
            while True:
                try:
                    item = iterator.output_queue.get(timeout=0.5)
                    break
                except queue.Empty:
                    if not iterator.is_alive():
                        raise ReaderError(f"{path}: FFCV's reader died; its own message stands above") from None
                    if time.monotonic() > limit:
                        raise ReaderError(
                            f"{path}: no batch within {BATCH_SECONDS:.0f} s; is the disk there?"
                        ) from None
            if item is None:
                return
            _, (images,) = item
            yield torch.from_numpy(np.asarray(images))
    finally:
        iterator.close()


def example_loader(
    path: Path, batch_size: int, workers: int, padding: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Any:
    """FFCV's own Loader over a .beton with FFCV's own order and augmentation, for benchmarks to compare with.

    Flip, translation with zero fill, to a float32 tensor, normalised: the operations of its CIFAR example.
    """
    cpu.choose_openmp()
    from ffcv import transforms
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    image = [
        SimpleRGBImageDecoder(),
        transforms.RandomHorizontalFlip(),
        transforms.RandomTranslate(padding=padding, fill=(0, 0, 0)),
        transforms.NormalizeImage(np.array(mean), np.array(std), np.float32),
        transforms.ToTensor(),
        transforms.ToTorchImage(convert_back_int16=False),
    ]
    label = [IntDecoder(), transforms.ToTensor(), transforms.Squeeze()]
    return Loader(
        str(path),
        batch_size=batch_size,
        num_workers=workers,
        order=OrderOption.RANDOM,
        drop_last=True,
        pipelines={"image": image, "label": label},
    )
