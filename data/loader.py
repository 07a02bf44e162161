"""From uint8 images to training batches: splits, subsets, and a loader without state that reads ahead."""

import contextlib
import math
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from data.ahead import Readers, ahead
from data.files import Split, in_memory
from data.generated import Auxiliary

PADDING = 4  # of the random crop, in pixels
READERS = 16  # threads that read generated images: a network's file system answers many at a time
BATCHES_AHEAD = 2  # whose generated images are read while a step runs


def random_generator(seed: int, purpose: str, epoch: int = 0, step: int = 0) -> np.random.Generator:
    """Return a generator that depends on these values only (NumPy's, as torch's uses no more than 32 bits of a seed).

    Raises ValueError for a negative seed.
    """
    if seed < 0:
        raise ValueError(f"seed {seed}: must not be negative")
    return np.random.default_rng([seed, epoch, step, zlib.crc32(purpose.encode())])


def to_input(images: torch.Tensor) -> torch.Tensor:
    """Turn images (n,H,W,3) uint8 into model input (n,3,H,W) float32 in [0,1], contiguous."""
    return in_memory(images).permute(0, 3, 1, 2).contiguous().float().div_(255)


def crop_and_flip(images: torch.Tensor, top: torch.Tensor, left: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Cut each image (n,H,W,3) out of its zero-padded self at (top, left) (n,) in [0, 8], then mirror it where flip."""
    n, height, width, _ = images.shape
    device = images.device
    padded = F.pad(images, (0, 0, PADDING, PADDING, PADDING, PADDING))
    rows = top[:, None] + torch.arange(height, device=device)
    offsets = torch.arange(width, device=device).expand(n, width)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - offsets, offsets)
    return padded[torch.arange(n, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def rows_of(n: int, part: int, parts: int) -> slice:
    """The rows of a batch of n that one of several parts of it has: every parts-th one.

    So each has its share of the generated images, which stand at the end of a batch. A part for which none is left gets
    them all, which its taker is to count for nothing.
    """
    return slice(part, n, parts) if part < n else slice(None)


class Loader:
    """Batches of (x, y): x (n,3,H,W) float32 in [0,1], y (n,) int64, both on `device`.

    The training images lie on `device` as uint8, or are read a batch at a time where they stay on disk; augmentation
    (random crop with padding 4, horizontal flip) is a gather on the whole batch. All randomness is a function of (seed,
    epoch, step): there is no state to save, and `epoch(e, start_step=k)` yields exactly what `epoch(e)` yields from
    step k on.

    An epoch is one pass over the shuffled training set, in ceil(len(train) / batch_size) steps with a smaller last
    batch. With auxiliary data, or a `steps_per_epoch` of one's own, every batch is full: round(batch_size *
    auxiliary_fraction) auxiliary rows, drawn uniformly, after those from the training set, which is shuffled again
    where it comes to its end. Auxiliary rows are read by threads, for the batches after the one that is handed out; on
    a GPU they are copied from pinned memory while the step before is computed.

    part: (which, of how many): yield only those rows of each batch, as `rows_of` has them; what is drawn is drawn for
    the whole batch.

    Raises ValueError for a batch size or number of steps below 1, and a fraction outside [0,1].
    """

    def __init__(
        self,
        train: Split,
        batch_size: int,
        *,
        seed: int,
        augment: bool = True,
        auxiliary: Auxiliary | None = None,
        auxiliary_fraction: float = 0.0,
        steps_per_epoch: int | None = None,
        device: str | torch.device = "cpu",
        part: tuple[int, int] = (0, 1),
    ):
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size}: must be at least 1")
        if not 0 <= auxiliary_fraction <= 1:
            raise ValueError(f"auxiliary fraction {auxiliary_fraction}: must lie in [0, 1]")
        if len(train.labels) == 0:
            raise ValueError("the training set is empty")
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise ValueError(f"steps per epoch {steps_per_epoch}: must be at least 1")
        self.images = train.images.to(device)
        self.labels = train.labels.to(device)
        self.seed = seed
        self.augment = augment
        self.auxiliary = auxiliary
        self.auxiliary_rows = round(batch_size * auxiliary_fraction) if auxiliary is not None else 0
        self.train_rows = batch_size - self.auxiliary_rows
        self.steps = steps_per_epoch or math.ceil(len(train.labels) / batch_size)
        full_batches = auxiliary is not None or steps_per_epoch is not None
        self.passes = max(1, math.ceil(self.steps * self.train_rows / len(train.labels))) if full_batches else 1
        self.device = torch.device(device)
        self.part = part

    def __len__(self) -> int:
        """Steps per epoch."""
        return self.steps

    def batch_rows(self, step: int) -> int:
        """How many images the whole batch of a step has, in every epoch."""
        left = self.passes * len(self.labels) - step * self.train_rows
        return min(self.train_rows, left) + self.auxiliary_rows

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches of epoch number `epoch`, from step `start_step` on."""
        generators = (random_generator(self.seed, "order", epoch, i) for i in range(self.passes))
        order = np.concatenate([generator.permutation(len(self.labels)) for generator in generators])
        steps = range(start_step, self.steps)
        rows = (order[step * self.train_rows : (step + 1) * self.train_rows] for step in steps)
        with contextlib.closing(self._auxiliary_parts(epoch, steps)) as parts:
            for batch_rows, (rng, extra) in zip(rows, parts, strict=True):
                yield self._batch(batch_rows, rng, extra)

    def _auxiliary_parts(self, epoch: int, steps: range) -> Iterator[tuple[np.random.Generator, Split | None]]:
        """Each step's generator, from which its auxiliary rows have been drawn, and these on `device`, or None."""
        generators = (random_generator(self.seed, "batch", epoch, step) for step in steps)
        if not self.auxiliary_rows:
            yield from ((rng, None) for rng in generators)
            return
        on_gpu = self.device.type == "cuda"
        stream = torch.cuda.Stream(self.device) if on_gpu else None
        with Readers(min(READERS, self.auxiliary_rows)) as readers:
            begun = ((rng, self._begin_to_read(rng, readers)) for rng in generators)
            read = ((rng, _joined(pieces)) for rng, pieces in ahead(begun, BATCHES_AHEAD))
            if not on_gpu:
                yield from read
                return
            # The copy of the next batch is under way when this one is handed out; only this thread calls CUDA, since
            # no other one may while it captures a graph.
            copied = ((rng, *_begin_to_copy(extra, stream)) for rng, extra in read)
            for rng, extra, arrived in ahead(copied, 1):
                current = torch.cuda.current_stream(self.device)
                current.wait_event(arrived)
                for tensor in extra:
                    tensor.record_stream(current)
                yield rng, extra

    def _begin_to_read(self, rng: np.random.Generator, readers: Readers) -> list["Future[Split]"]:
        """Draw the auxiliary rows of a batch, and hand ours over to be read, a piece for each reader."""
        drawn = rng.integers(len(self.auxiliary), size=self.auxiliary_rows)
        ours = np.arange(self.train_rows + self.auxiliary_rows)[rows_of(self.train_rows + len(drawn), *self.part)]
        drawn = drawn[ours[ours >= self.train_rows] - self.train_rows]
        pieces = np.array_split(drawn, max(1, min(READERS, len(drawn))))
        return [readers.submit(partial(self.auxiliary.rows, piece)) for piece in pieces]

    def _batch(
        self, rows: np.ndarray, rng: np.random.Generator, extra: Split | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n = len(rows) + self.auxiliary_rows
        mine = rows_of(n, *self.part)
        taken = np.arange(n)[mine]
        index = self._there(rows[taken[taken < len(rows)]])
        images, labels = in_memory(self.images[index]).to(self.device), self.labels[index]
        if extra is not None:
            images, labels = torch.cat([images, extra.images]), torch.cat([labels, extra.labels])
        if self.augment:
            top, left = self._there(rng.integers(2 * PADDING + 1, size=(2, n))[:, mine])
            flip = self._there((rng.random(n) < 0.5)[mine])
            images = crop_and_flip(images, top, left, flip)
        return to_input(images), labels

    def _there(self, values: np.ndarray) -> torch.Tensor:
        found = torch.from_numpy(values)
        return _copied(found, self.device) if self.device.type == "cuda" else found


def _joined(pieces: Sequence["Future[Split]"]) -> Split:
    """The pieces of a batch as one, when they have been read."""
    images, labels = zip(*(piece.result() for piece in pieces), strict=True)
    return Split(torch.cat(images), torch.cat(labels))


def _begin_to_copy(split: Split, stream: torch.cuda.Stream) -> tuple[Split, torch.cuda.Event]:
    """Let `stream` copy to its GPU: the copies, and the event after which they are there."""
    with torch.cuda.stream(stream):
        copies = Split(*(_copied(tensor, stream.device) for tensor in split))
        return copies, stream.record_event()


def _copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a GPU, which takes it from pinned memory when it comes to it, without being waited for."""
    return tensor.pin_memory().to(device, non_blocking=True)


def first_examples(split: Split, n: int, seed: int) -> Split:
    """The first n examples or, where a split is sorted by class, a seeded class-balanced choice of n, in their order.

    Raises ValueError if n is not between 1 and the size of the split.
    """
    return balanced_subset(split, n, seed) if is_sorted(split) else Split(split.images[:n], split.labels[:n])


def is_sorted(split: Split) -> bool:
    """Whether the examples of each class lie together, so that the first ones are of a few classes only.

    Also where they do so several times over, as in files that were sorted one by one: neighbours are of different
    classes less than two thirds as often as in a random order, where any two examples are as likely to be neighbours.
    """
    changes = (split.labels[1:] != split.labels[:-1]).sum().item()
    counts = split.labels.unique(return_counts=True)[1]
    in_random_order = len(split.labels) - 1 - (counts * (counts - 1)).sum().item() / len(split.labels)
    return changes < in_random_order * 2 / 3


def balanced_subset(split: Split, n: int, seed: int) -> Split:
    """Return n examples, as equally spread over the classes as the split allows, in the order they had.

    The same for the same seed. Raises ValueError if n is not between 1 and the size of the split.
    """
    if not 1 <= n <= len(split.labels):
        raise ValueError(f"subset of {n} examples: must lie between 1 and {len(split.labels)}")
    order = random_generator(seed, "subset").permutation(len(split.labels))
    labels = split.labels.cpu().numpy()[order]
    by_class = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[by_class], labels[by_class])
    rank = np.empty_like(order)
    rank[by_class] = np.arange(len(order)) - first  # position of each example among those of its class
    chosen = np.sort(order[np.argsort(rank, kind="stable")[:n]])
    index = torch.from_numpy(chosen).to(split.labels.device)
    return Split(split.images[index], split.labels[index])


def class_shares(labels: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Which examples (n,) are a random share of those of each class: at least one, and never all of a class.

    The same for the same seed.
    """
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    order = torch.from_numpy(random_generator(seed, "hold out").permutation(len(labels)))
    for label in labels.unique():
        rows = order[labels[order] == label]
        chosen[rows[: min(max(round(share * len(rows)), 1), len(rows) - 1)]] = True
    return chosen
