"""Margins and speeds of many images, update directions, and the choice of images. For analyze.py and speed_check.py."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from analysis.statistics import quantiles
from analysis.subject import Subject, epoch_of, other_checkpoints
from data import Split, to_input
from dyart.dynamics import Direction, boundary_speed, unit_direction, update_direction
from dyart.margin import CORRECT_ABOVE, Boundary, find_boundary, soft_logit_margin
from dyart.minimum_norm import closest_boundary
from dyart.modes import mixed_precision
from experiment.build import build_model, loss_options
from models.outputs import check_finite_outputs
from models.weights import load_weights

# Correct examples for which a search finds no boundary point are searched again with so many times the iterations.
LONGER = 4


def batches(split: Split, size: int, like: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """The images of `split` in batches, as the model takes them."""
    weight = next(like.parameters())
    for start in range(0, len(split.labels), size):
        rows = slice(start, start + size)
        x = to_input(split.images[rows]).to(weight, memory_format=torch.channels_last)
        yield x, split.labels[rows].to(weight.device)


def shuffled(split: Split, seed: int) -> Split:
    """The images of `split` in a random order."""
    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(seed))
    return Split(split.images[order], split.labels[order])


@torch.no_grad()
def choose_correct(model: nn.Module, split: Split, number: int, temperature: float, size: int) -> Split:
    """The first `number` images on the right side of the boundary. Raises ValueError where there are fewer."""
    chosen, total = [], 0
    for index, (x, y) in enumerate(batches(split, size, model)):
        logits = model(x)
        check_finite_outputs(logits, "training images")
        correct = (soft_logit_margin(logits, y, temperature) > CORRECT_ABOVE).cpu()
        rows = index * size + correct.nonzero()[:, 0]
        chosen.append(rows)
        total += len(rows)
        if total >= number:
            rows = torch.cat(chosen)[:number]
            return Split(split.images[rows], split.labels[rows])
    raise ValueError(f"--examples {number}: the model classifies only {total} of the training images correctly")


def workers(device: torch.device) -> int:
    """How many items `in_parallel` takes at a time."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def in_parallel(function: Callable[[Any], Any], items: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """function(item) of all items, in their order.

    On a CPU a thread a core takes an item each, which is quicker than all of them sharing every operation. What the
    function uses is not to change meanwhile, the state of a model included.
    """
    threads = workers(device)
    share = torch.get_num_threads() // threads
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(share,))
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)


def directions(subject: Subject, methods: Sequence[str], examples: Split, size: int, amp: str) -> dict[str, Direction]:
    """Each method's update on all of `examples`, from the same weights, scaled to Euclidean length 1."""
    device = next(subject.model.parameters()).device
    step = {"optimizer": subject.optimizer, "clip_grad": subject.clip_grad}
    number = len(methods) * math.ceil(len(examples.labels) / size)
    with tqdm(total=number, desc="updates", unit="batch", leave=False) as bar:

        def ticking() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in batches(examples, size, subject.model):
                yield batch
                bar.update()

        def update(method: str) -> Direction:
            options = loss_options(subject.settings, method)
            with mixed_precision(amp, device.type):
                return unit_direction(update_direction(method, subject.model, ticking(), **step, **options))

        return dict(zip(methods, in_parallel(update, methods, device), strict=True))


class Search(NamedTuple):
    """The search for boundary points."""

    norm: str
    temperature: float
    steps: int
    batch_size: int


def measure(
    model: nn.Module, examples: Split, search: Search, along: dict[str, Direction], desc: str
) -> dict[str, np.ndarray]:
    """`margin` of each example, 0 where misclassified and inf where no boundary point was found, and its speeds."""
    columns: dict[str, list[Tensor]] = {name: [] for name in ("margin", *along)}
    bar = tqdm(total=len(examples.labels), desc=desc, unit="image", leave=False)

    def find_those_of(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Boundary]:
        # A search puts its model into another state for a while, so each has its own.
        boundary = find(copy.deepcopy(model), *batch, search)
        check_finite_outputs(boundary.value[:, None], desc)
        bar.update(len(boundary.margin))
        return *batch, boundary

    device = next(model.parameters()).device
    size = min(search.batch_size, math.ceil(len(examples.labels) / workers(device)))
    with bar:
        # All are found before the first speed is taken, which puts other weights into the model for a while.
        found = list(in_parallel(find_those_of, batches(examples, size, model), device))
        for x, y, boundary in found:
            beyond = torch.where(boundary.value > CORRECT_ABOVE, math.inf, 0.0)  # there, Φ is that of x itself
            columns["margin"].append(torch.where(boundary.found, boundary.margin, beyond))
            for method, direction in along.items():
                kind = {"norm": search.norm, "temperature": search.temperature, "x": x}
                columns[method].append(boundary_speed(model, boundary, y, direction, **kind))
    return {name: torch.cat(parts).double().cpu().numpy() for name, parts in columns.items()}


def find(model: nn.Module, x: Tensor, y: Tensor, search: Search, start: Tensor | None = None) -> Boundary:
    """The boundary points of a batch: of the exact boundary those of the nearest class; or those next to a start.

    A search of k steps has k + 1 passes. Correct examples for which it finds nothing are searched for longer.
    """

    def search_for(x: Tensor, y: Tensor, steps: int, start: Tensor | None) -> Boundary:
        if start is None and math.isinf(search.temperature):
            return closest_boundary(model, x, y, norm=search.norm, passes=steps + 1)
        kind = {"norm": search.norm, "temperature": search.temperature}
        return find_boundary(model, x, y, steps=steps, start=start, **kind)

    boundary = search_for(x, y, search.steps, start)
    missed = ((boundary.value > CORRECT_ABOVE) & ~boundary.found).nonzero()[:, 0]
    if len(missed) == 0:
        return boundary
    return replaced(boundary, missed, search_for(x[missed], y[missed], LONGER * (search.steps + 1) - 1, None))


def replaced(boundary: Boundary, rows: Tensor, others: Boundary) -> Boundary:
    return Boundary(*(field.index_copy(0, rows, other) for field, other in zip(boundary, others, strict=True)))


def measure_history(
    subject: Subject, args: Any, search: Search, splits: dict[str, Split], samples: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Quantiles of the margins of train and test at each checkpoint of the run, the analysed one among them."""
    if subject.folder is None:
        return []
    name, rows = subject.identity["checkpoint"], []
    model = build_model(subject.settings).to(next(subject.model.parameters()).device).eval()
    analysed = epoch_of(subject.checkpoint)
    for epoch, other, weights in other_checkpoints(subject.folder, analysed):
        load_weights(model, weights, other)
        for split, images in splits.items():
            part = Split(images.images[: args.history_examples], images.labels[: args.history_examples])
            margin = measure(model, part, search, {}, f"margins of {other} on {split}")["margin"]
            rows.append({"checkpoint": other, "epoch": epoch, "split": split, **quantiles(margin)})
    if rows:
        row = {"checkpoint": name, "epoch": analysed}
        rows += [{**row, "split": split, **quantiles(values)} for split, values in samples.items()]
    return sorted(rows, key=lambda row: row["epoch"])


def nearest_examples(model: nn.Module, examples: Split, margin: np.ndarray, number: int, search: Search):
    """The images nearest to the boundary, their boundary points and the classes beyond it."""
    rows = torch.from_numpy(np.argsort(margin)[:number].copy())
    chosen = Split(examples.images[rows], examples.labels[rows])
    (x, y), *_ = batches(chosen, number, model)
    boundary = find(model, x, y, search)
    with torch.no_grad():
        logits = model(boundary.x).scatter(1, y[:, None], -math.inf)
    pixels = [tensor.permute(0, 2, 3, 1).cpu().numpy() for tensor in (x, boundary.x)]
    columns = zip(*pixels, boundary.margin.tolist(), y.tolist(), logits.argmax(1).tolist(), strict=True)
    return [dict(zip(("x", "boundary", "margin", "label", "predicted"), column, strict=True)) for column in columns]
