"""Streams a split from disk through FFCV's Loader during training, for splits that do not fit on the device.

FFCV reads ahead and decodes. Order, augmentation and ranks come from BatchStream, so that the batches are bit-identical
to those of the resident loader. FFCV's own order pads the epoch and depends on the number of ranks, and its
augmentation depends on the number of workers, so neither is used.
"""

import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runner.common.errors import UserError
from runner.data import augment
from runner.data.kernels import crop
from runner.data.stream import BatchStream, StreamOptions
from runner.system import cpu

BATCH_TIMEOUT = 60.0  # seconds to wait for a batch; a reader that takes longer has hung


class ReaderError(RuntimeError):
    """FFCV's reader died, or produced no batch within BATCH_TIMEOUT."""


class StreamingBatches(BatchStream):
    """A stream over a .beton file that stays on disk.

    Args:
        path: the .beton file, whose hash and layout the caller has checked.
        labels: (N,) int64, of the split's images, in the order of `indices`.
        options: how the batches are made.
        indices: (N,) int64, the indices of the file that form the split; None for all.
        workers: decoding threads.

    Raises:
        UserError: `workers` is not between 1 and the usable cores; FFCV decodes in numba's threads.
    """

    def __init__(
        self,
        path: Path,
        labels: np.ndarray,
        options: StreamOptions,
        indices: np.ndarray | None = None,
        workers: int = 1,
    ) -> None:
        import numba

        cpu.choose_openmp()
        config: Any = numba.config  # its attributes are set at runtime
        cores = config.NUMBA_NUM_THREADS
        if not 1 <= workers <= cores:
            raise UserError(f"--workers {workers}: expected 1 to {cores}, the usable cores")
        super().__init__(labels, options)
        if self.device.type == "cpu":
            crop.load_loop()  # must be compiled before FFCV starts threads
            if self.augment is not None:
                augment.load_loops(self.augment)
        self.path, self.workers, self.indices = path, workers, indices
        self.loader: Any = None  # compiled at the first read

    def read(self, samples: np.ndarray, sizes: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields the images (n, H, W, 3) uint8 of each batch and their indices in it, all of them, on the device."""
        if len(samples) == 0:  # FFCV cannot read an empty epoch
            empty = torch.empty((0, *self.options.image_size, 3), dtype=torch.uint8, device=self.device)
            yield from ((empty, torch.arange(0, device=self.device)) for _ in sizes)
            return
        with cpu.preserve_torch_num_threads():
            loader = self._ffcv_loader()
            order = samples if self.indices is None else self.indices[samples]
            loader.traversal_order.samples = order
            # Its length ends the epoch; mixing reads more images than the file has.
            loader.first_traversal_order = order
            chunks = _iterate_with_timeout(iter(loader), self.path)
        for images in upload(self._batches(chunks, sizes), self.device):
            yield images, torch.arange(len(images), device=self.device)

    def _batches(self, chunks: Iterator[torch.Tensor], sizes: list[int]) -> Iterator[torch.Tensor]:
        """Yields the images (n, H, W, 3) uint8 of each batch in host memory, from FFCV's batches of another size."""
        images = torch.empty((0, *self.options.image_size, 3), dtype=torch.uint8)
        for size in sizes:
            buffered = [images]
            while sum(map(len, buffered)) < size:
                chunk = next(chunks, None)
                if chunk is None:
                    raise ReaderError(f"{self.path}: FFCV's reader ended before the last batch")
                buffered.append(chunk.clone())  # FFCV reuses its buffers
            images = torch.cat(buffered) if len(buffered) > 1 else images
            yield images[:size]
            images = images[size:]

    def _ffcv_loader(self) -> Any:
        """FFCV's Loader, created and compiled once."""
        if self.loader is not None:
            return self.loader
        import ffcv.loader.loader as ffcv_loader
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.traversal_order.base import TraversalOrder

        class PrecomputedOrder(TraversalOrder):
            """Reads `samples`, which is set before each epoch."""

            def __init__(self, loader: Any) -> None:
                super().__init__(loader)
                self.samples = self.indices

            def sample_order(self, epoch: int) -> np.ndarray:
                return self.samples

        # FFCV 1.0.2 is meant to accept such a class, but its check rejects any that is missing from this table.
        ffcv_loader.ORDER_MAP[PrecomputedOrder] = PrecomputedOrder
        self.loader = ffcv_loader.Loader(
            str(self.path),
            batch_size=max(1, self.options.batch_size // self.options.world_size),
            num_workers=self.workers,
            os_cache=True,
            order=PrecomputedOrder,
            drop_last=False,
            pipelines={"image": [SimpleRGBImageDecoder()], "label": None},
        )
        return self.loader


def upload(batches: Iterator[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """Yields batches on a device. A batch is copied to a GPU on a side stream, while the one before it is used."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    ahead: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def ready(images: torch.Tensor, copied: torch.cuda.Event) -> torch.Tensor:
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        images.record_stream(current)
        return images

    for batch in batches:
        with torch.cuda.stream(stream):
            images = batch.pin_memory().to(device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        if ahead is not None:
            yield ready(*ahead)
        ahead = images, copied
    if ahead is not None:
        yield ready(*ahead)


def _iterate_with_timeout(epoch_iterator: Any, path: Path) -> Iterator[torch.Tensor]:
    """Yields FFCV's batches, (n, H, W, 3) uint8, as views of its reused buffers: copy each one before reading the next.

    FFCV's `next` waits forever on a queue that a dead thread never fills; this one waits on it with a timeout.

    Raises:
        ReaderError: the reader died, or a batch takes longer than BATCH_TIMEOUT.
    """
    try:
        while True:
            deadline = time.monotonic() + BATCH_TIMEOUT
            while True:
                alive = epoch_iterator.is_alive()  # checked first, because it may deliver its last batch and end
                try:
                    item = epoch_iterator.output_queue.get(timeout=0.5)
                    break
                except queue.Empty:
                    if not alive:
                        raise ReaderError(f"{path}: FFCV's reader died; see its message above") from None
                    if time.monotonic() > deadline:
                        raise ReaderError(
                            f"{path}: no batch within {BATCH_TIMEOUT:.0f} s; is the disk available?"
                        ) from None
            if item is None:
                return
            _, (images,) = item
            yield torch.from_numpy(np.asarray(images))
    finally:
        epoch_iterator.close()
