"""See the decision boundary move: margins, the boundary's speed under each training method, and the figures of both.

    python analyze.py experiments/NAME
    python analyze.py weights.pt --model wrn-28-10-swish --dataset cifar10 --output-dir figures
    python analyze.py --toy

Figures and their numbers (csv, and a summary in dynamics.json) go to the folder's figures/.
"""

import copy
import csv
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from analysis import figures
from analysis.toy import draw_toy
from data import DEFAULT_DATA_DIR, Split, load_data, to_input
from dyart.dynamics import (
    Direction,
    boundary_speed,
    mcnemar_p,
    refined_margin,
    unit_direction,
    update_direction,
    wilson_interval,
)
from dyart.losses import LOSSES
from dyart.margin import CORRECT_ABOVE, SEARCHES, Boundary, find_boundary, soft_logit_margin
from dyart.modes import PRECISIONS, mixed_precision
from evaluation.attack import versions
from evaluation.candidate import load_candidate
from experiment import flags
from experiment.build import build_model, build_optimizer, load_splits, loss_options, stages_of
from experiment.checkpoint import load_checkpoint
from experiment.folder import Experiment
from experiment.settings import check_stored, dataset_name, resolve
from experiment.weights import MODEL_SETTINGS
from models.weights import load_weights
from storage.files import FileError, read_json, write_json

# Correct examples for which a search finds no boundary point are searched again with so many times the iterations.
LONGER = 4
# A step of this length, of parameters whose Euclidean norm is in the tens, is small enough for speeds to hold, and
# large enough for the margins' changes to stand out from the errors of the search.
CHECK_STEP = 1e-2
CHECK_SEARCH_STEPS = 40
# Searches end when none of them comes closer by this share of the margin, or after so many in turn.
CHECK_TOLERANCE = 1e-4
CHECK_ROUNDS = 20


def build_parser() -> flags.Parser:
    """The flags of analyze.py."""
    p = flags.Parser(prog="analyze.py", description=__doc__.splitlines()[0])
    p.add_argument("target", metavar="FOLDER|FILE", nargs="?", help="an experiment folder, or a bare checkpoint file")
    flags.add_switch(p, "--toy", default=False, help="instead draw a two-dimensional example, in seconds")
    p.add_argument("--output-dir", default=None, help="for the figures (FOLDER/figures; results for --toy)")

    g = p.add_argument_group("what is analysed")
    g.add_argument("--checkpoint", metavar="NAME", default="best.pt", help="file of the folder")
    g.add_argument("--methods", nargs="+", choices=list(LOSSES), default=list(figures.NAMES), help="to compare")
    g.add_argument("--examples", type=flags.whole(least=1), default=1000, help="images of train and of test")
    g.add_argument("--boundary", choices=["exact", "soft"], default="exact", help="whose speed is shown")
    eps = "of the baselines' attack; smaller margins are vulnerable (the run's)"
    g.add_argument("--attack-eps", type=flags.number(above=0), default=None, help=eps)
    g.add_argument(
        "--direction", choices=["gradient", "step"], default="gradient", help="step: of latest.pt's optimizer"
    )
    amp = "bfloat16, in the updates only (searches; with --direction step, the run's)"
    g.add_argument("--amp", choices=PRECISIONS, default=None, help=amp)
    steps = SEARCHES["fast"][1]
    g.add_argument("--search-steps", type=flags.whole(least=1), default=steps, help="iterations for boundary points")
    g.add_argument("--history-examples", type=flags.whole(least=1), default=100, help="images, for other checkpoints")
    g.add_argument("--check-speeds", metavar="N", type=flags.whole(), default=0, help="measure N margins' real changes")
    g.add_argument("--nearest", type=flags.whole(least=1), default=8, help="examples shown as images")
    g.add_argument("--batch-size", type=flags.whole(least=1), default=128, help="images at a time")
    g.add_argument("--seed", type=flags.whole(), default=0, help="of the choice of images")
    g.add_argument("--data-dir", default=None, help="where prepared datasets lie (as in training)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")

    g = p.add_argument_group("for a file without settings in it (those of others)")
    g.add_argument("--model", default=None, help="wrn-D-W[-swish], preact-resnetD[-swish] or resnetD")
    g.add_argument("--dataset", "--data", type=dataset_name, default=None, help="(cifar10)")
    flags.add_switch(g, "--group-norm", "--GroupNorm", default=None, help="GroupNorm in the place of BatchNorm")
    flags.add_switch(g, "--normalize", default=None, help="normalize inside the model; the Swish models always do")
    return p


# --- The checkpoint ---------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """What is analysed: a model in eval mode, how it was or would be trained, and where it comes from."""

    model: nn.Module
    settings: dict[str, Any]
    identity: dict[str, Any]
    folder: Path | None
    optimizer: torch.optim.Optimizer | None
    clip_grad: float | None


def load_subject(args: Any, device: torch.device) -> Subject:
    """The checkpoint that the flags name. Raises ValueError or OSError for one that cannot be used."""
    target = Path(args.target)
    folder = None if target.is_file() else Experiment.open(target).folder
    path = target if folder is None else folder / ("latest.pt" if args.direction == "step" else args.checkpoint)
    given = {name: getattr(args, name) for name in MODEL_SETTINGS}
    # The optimizer's state belongs to the weights that are trained, and not to their average.
    weights = "raw" if args.direction == "step" else "average"
    candidate = load_candidate(path, weights, given, tqdm.write)

    state = load_checkpoint(path, foreign=True)
    settings = resolve({name: candidate.identity[name] for name in MODEL_SETTINGS})
    if "settings" in state:
        settings = check_stored(state["settings"], path)
    if args.attack_eps is not None:
        settings = settings | {"attack_eps": args.attack_eps, "attack_step": args.attack_eps / 4}
    if args.data_dir is not None or not Path(settings["data_dir"]).is_dir():
        settings = settings | {"data_dir": args.data_dir or str(DEFAULT_DATA_DIR)}

    model = candidate.model.to(device, memory_format=torch.channels_last).requires_grad_(True)
    optimizer = clip_grad = None
    if args.direction == "step":
        if "optimizer" not in state:
            raise ValueError(f"--direction step: {path} holds no state of an optimizer; a folder's latest.pt does")
        stage = stages_of(settings)[state["progress"]["stage"]]
        optimizer, clip_grad = build_optimizer(model, stage, settings), stage.clip_grad
        optimizer.load_state_dict(state["optimizer"])
    return Subject(model, settings, candidate.identity, folder, optimizer, clip_grad)


def other_checkpoints(folder: Path, analysed: int) -> Iterator[tuple[int, str, dict[str, Tensor]]]:
    """(epoch, name, averaged weights) of the folder's checkpoints, one an epoch, of other epochs than the analysed."""
    epochs = {analysed}
    for path in (folder / "burn_in.pt", folder / "best.pt", *sorted(folder.glob("epoch_*.pt"))):
        if path.exists():
            state = load_checkpoint(path)
            if state["epoch"] not in epochs:
                epochs.add(state["epoch"])
                yield state["epoch"], path.name, state["average"]


def epoch_of(state: dict[str, Any]) -> int:
    """The epoch of a checkpoint to evaluate, or of one to resume from."""
    return state["epoch"] if "epoch" in state else state["progress"]["epoch"]


# --- Measurements -----------------------------------------------------------------------------------------------------


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
        correct = (soft_logit_margin(model(x), y, temperature) > CORRECT_ABOVE).cpu()
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

    def find(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Boundary]:
        # A search puts its model into another state for a while, so each has its own.
        boundary = _find(copy.deepcopy(model), *batch, search)
        bar.update(len(boundary.margin))
        return *batch, boundary

    device = next(model.parameters()).device
    size = min(search.batch_size, math.ceil(len(examples.labels) / workers(device)))
    with bar:
        # All are found before the first speed is taken, which puts other weights into the model for a while.
        found = list(in_parallel(find, batches(examples, size, model), device))
        for x, y, boundary in found:
            beyond = torch.where(boundary.value > CORRECT_ABOVE, math.inf, 0.0)  # there, Φ is that of x itself
            columns["margin"].append(torch.where(boundary.found, boundary.margin, beyond))
            for method, direction in along.items():
                kind = {"norm": search.norm, "temperature": search.temperature, "x": x}
                columns[method].append(boundary_speed(model, boundary, y, direction, **kind))
    return {name: torch.cat(parts).double().cpu().numpy() for name, parts in columns.items()}


def _find(model: nn.Module, x: Tensor, y: Tensor, search: Search, start: Tensor | None = None) -> Boundary:
    """The boundary points of a batch; correct examples for which none is found are searched for longer."""
    kind = {"norm": search.norm, "temperature": search.temperature}
    boundary = find_boundary(model, x, y, steps=search.steps, start=start, **kind)
    missed = ((boundary.value > CORRECT_ABOVE) & ~boundary.found).nonzero()[:, 0]
    if len(missed) == 0:
        return boundary
    longer = find_boundary(model, x[missed], y[missed], steps=LONGER * search.steps, **kind)
    return _replaced(boundary, missed, longer)


def _replaced(boundary: Boundary, rows: Tensor, others: Boundary) -> Boundary:
    return Boundary(*(field.index_copy(0, rows, other) for field, other in zip(boundary, others, strict=True)))


def by_interval(
    margin: np.ndarray, speed: np.ndarray, method: str, interval: float, highest: float
) -> list[dict[str, Any]]:
    """The negative speeds in each interval of margins up to `highest`, with Wilson's 95 % interval of their share."""
    rows = []
    for index in range(math.ceil(highest / interval - 1e-9)):
        inside = (margin >= index * interval) & (margin < (index + 1) * interval)
        row = {"method": method, "from": index * interval, "to": (index + 1) * interval}
        rows.append(row | proportion(speed[inside] < 0))
    return rows


def proportion(negative: np.ndarray) -> dict[str, Any]:
    """How many of how many, as a share with its 95 % interval; None in the place of a share of nothing."""
    number, total = int(negative.sum()), len(negative)
    low, high = wilson_interval(number, total)
    known = total > 0
    return {
        "negative": number,
        "total": total,
        "share": number / total if known else None,
        "low": low if known else None,
        "high": high if known else None,
    }


def paired(speeds: dict[str, np.ndarray], reference: str) -> dict[str, dict[str, Any]]:
    """Each other method against `reference`: how many examples only one of the two moves nearer, and McNemar's p.

    The p-value is that of these two updates over examples; another run's or another seed's updates are not in it.
    """
    if reference not in speeds:
        return {}
    result, nearer = {}, speeds[reference] < 0
    for method, speed in speeds.items():
        if method != reference:
            counts = int(((speed < 0) & ~nearer).sum()), int((nearer & ~(speed < 0)).sum())
            result[method] = {"only_it": counts[0], f"only_{reference}": counts[1], "p": mcnemar_p(*counts)}
    return result


def check_speeds(
    model: nn.Module, examples: Split, search: Search, along: dict[str, Direction]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Take a small step along each direction, search again, and compare the margins' changes with the speeds.

    In double precision and with long searches: the changes are far smaller than the errors of others. Even so, one
    search can end at a part of the boundary that the next one passes by, or on the way along a narrow valley, and what
    lies between two such ends is no change of the margin. So each model is searched again from the closest points that
    are known of both, until neither comes closer. What is tested are the speeds at the points found, and not that
    these are the closest of all.
    """
    model = copy.deepcopy(model).double()
    search = search._replace(steps=CHECK_SEARCH_STEPS)
    rows, results, known = [], {}, []
    for x, y in batches(examples, search.batch_size, model):
        (before,), _ = _settle([model], [_find(model, x, y, search)], x, y, search)
        known.append((x, y, before))
    for method, direction in along.items():
        direction = {name: value.double() for name, value in direction.items()}
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter += CHECK_STEP * direction[name]
        predicted, measured, unsettled = [], [], 0
        bar = tqdm(known, desc=f"measured speed of {figures.NAMES[method]}", unit="batch", leave=False)
        for index, (x, y, before) in enumerate(bar):
            (before, after), moving = _settle([model, moved], [before, _find(moved, x, y, search)], x, y, search)
            known[index] = x, y, before
            both = before.found & after.found
            change = refined_margin(x, after, search.norm) - refined_margin(x, before, search.norm)
            kind = {"norm": search.norm, "temperature": search.temperature, "x": x}
            predicted.append(boundary_speed(model, before, y, direction, **kind)[both])
            measured.append(change[both] / CHECK_STEP)
            unsettled += moving
        speed, change = torch.cat(predicted).cpu().numpy(), torch.cat(measured).cpu().numpy()
        table = zip(speed.tolist(), change.tolist(), strict=True)
        rows += [{"method": method, "speed": s, "measured": m} for s, m in table]
        # Without a margin before or after the step there is no change of it.
        counts = {"without_margin": len(examples.labels) - len(speed), "unsettled": unsettled}
        results[method] = _agreement(speed, change) | counts
    return rows, results


def _settle(
    models: Sequence[nn.Module], found: Sequence[Boundary], x: Tensor, y: Tensor, search: Search
) -> tuple[list[Boundary], int]:
    """Search each model in turn from the boundary points found of the last one, until none comes closer.

    Returns the closest points of each, and of how many examples one still came closer in the last round.
    """
    found, moving = list(found), torch.arange(len(y), device=y.device)
    for _ in range(CHECK_ROUNDS):
        closer = torch.zeros(len(moving), dtype=torch.bool, device=y.device)
        for index, model in enumerate(models):
            old, last = (Boundary(*(field[moving] for field in found[i])) for i in (index, index - 1))
            new = _find(model, x[moving], y[moving], search, last.x)
            better = new.found & (~old.found | (new.margin < old.margin))
            closer |= new.found & (~old.found | (new.margin < (1 - CHECK_TOLERANCE) * old.margin))
            found[index] = _replaced(found[index], moving[better], Boundary(*(field[better] for field in new)))
        moving = moving[closer]
        if len(moving) == 0:
            break
    return found, len(moving)


def _agreement(speed: np.ndarray, change: np.ndarray) -> dict[str, Any]:
    """How well measured changes agree with predicted speeds; None for what is not defined."""
    if len(speed) == 0:
        return {"examples": 0, "correlation": None, "equal_signs": None, "median_relative_error": None}
    varies = min(np.ptp(speed), np.ptp(change)) > 0
    return {
        "examples": len(speed),
        "correlation": float(np.corrcoef(speed, change)[0, 1]) if varies else None,
        "equal_signs": float(np.mean((speed > 0) == (change > 0))),
        "median_relative_error": float(np.median(np.abs(change - speed) / np.abs(speed))) if speed.all() else None,
    }


def robust_shares(exact: np.ndarray, soft: np.ndarray, radii: Sequence[float]) -> list[dict[str, float]]:
    """The share of all examples whose margins exceed each radius."""
    return [{"eps": eps, "exact": float(np.mean(exact > eps)), "soft": float(np.mean(soft > eps))} for eps in radii]


def autoattack_points(folder: Path | None, identity: dict[str, Any], norm: str) -> list[dict[str, float]]:
    """Robust accuracy from the folder's autoattack.json, of the same weights under the same norm, by ε."""
    path = None if folder is None else folder / "autoattack.json"
    if path is None or not path.exists():
        return []
    records = read_json(path)
    if not isinstance(records, list):
        raise FileError(f"{path}: not a list of records")
    points = []
    for record in records:
        if all(record.get(key) == identity[key] for key in ("sha256", "weights")) and record.get("norm") == norm:
            share = record["robust_accuracy"]
            low, high = wilson_interval(round(share * record["n"]), record["n"])
            points.append({"eps": record["eps"], "share": share, "low": low, "high": high, "n": record["n"]})
    return sorted(points, key=lambda point: point["eps"])


def quantiles(values: np.ndarray) -> dict[str, Any]:
    """Accuracy, and quantiles of the margins of correct examples; a margin that was not found counts as the largest."""
    positive = np.sort(values[values > 0])
    row: dict[str, Any] = {"examples": len(values), "correct": len(positive)}
    for percent in (10, 25, 50, 75, 90):
        value = positive[round(percent / 100 * (len(positive) - 1))] if len(positive) else math.nan
        row[f"q{percent}"] = float(value) if math.isfinite(value) else None
    return row


def nearest_examples(model: nn.Module, examples: Split, margin: np.ndarray, number: int, search: Search):
    """The images nearest to the boundary, their boundary points and the classes beyond it."""
    rows = torch.from_numpy(np.argsort(margin)[:number].copy())
    chosen = Split(examples.images[rows], examples.labels[rows])
    (x, y), *_ = batches(chosen, number, model)
    boundary = _find(model, x, y, search)
    with torch.no_grad():
        logits = model(boundary.x).scatter(1, y[:, None], -math.inf)
    pixels = [tensor.permute(0, 2, 3, 1).cpu().numpy() for tensor in (x, boundary.x)]
    columns = zip(*pixels, boundary.margin.tolist(), y.tolist(), logits.argmax(1).tolist(), strict=True)
    return [dict(zip(("x", "boundary", "margin", "label", "predicted"), column, strict=True)) for column in columns]


# --- The run ----------------------------------------------------------------------------------------------------------


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows that have the same columns."""
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def analyze(args: Any) -> dict[str, Any]:
    """Measure, draw and write what the flags ask for; returns the summary that dynamics.json holds.

    Raises ValueError or OSError for what cannot be used.
    """
    started = time.monotonic()
    device = flags.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    subject = load_subject(args, device)
    model, settings, norm = subject.model, subject.settings, subject.settings["norm"]
    default = Path("figures") if subject.folder is None else subject.folder / "figures"
    output = Path(args.output_dir or default)
    output.mkdir(parents=True, exist_ok=True)
    scale, below = figures.SCALES[norm], settings["attack_eps"]

    train = shuffled(load_splits(settings)[0], args.seed)
    test = shuffled(load_data(settings["dataset"], settings["data_dir"])[1], args.seed)
    test = Split(test.images[: args.examples], test.labels[: args.examples])
    exact = Search(norm, math.inf, args.search_steps, args.batch_size)
    soft = exact._replace(temperature=settings["temperature"])
    search = exact if args.boundary == "exact" else soft

    examples = choose_correct(model, train, args.examples, search.temperature, args.batch_size)
    amp = args.amp or (settings["amp"] if args.direction == "step" else "searches")
    along = directions(subject, args.methods, examples, args.batch_size, amp)
    measured = measure(model, examples, search, along, "speeds on train")
    found = np.isfinite(measured["margin"])
    margin = measured["margin"][found]
    speeds = {method: measured[method][found] for method in args.methods}
    if not len(margin):
        raise ValueError(f"no boundary point was found for any of {len(found)} examples; try more --search-steps")

    rows = [
        {"margin": margin[i], **{f"speed_{method}": speed[i] for method, speed in speeds.items()}}
        for i in range(len(margin))
    ]
    write_csv(output / "speeds.csv", rows)
    figures.speed_over_margin(output / "speed_over_margin.png", rows, args.methods, below, norm)

    interval, highest = scale.interval / scale.factor, min(2 * below, np.percentile(margin, 99))
    rows = [row for method in args.methods for row in by_interval(margin, speeds[method], method, interval, highest)]
    write_csv(output / "negative_speeds.csv", rows)
    shown = [row | {"from": row["from"] * scale.factor, "to": row["to"] * scale.factor} for row in rows]
    figures.negative_share(output / "negative_speeds.png", shown, args.methods, norm)

    on_test = {
        kind: measure(model, test, of, {}, f"{kind} margins on test")["margin"]
        for kind, of in (("exact", exact), ("soft", soft))
    }
    of_train = Split(train.images[: args.examples], train.labels[: args.examples])
    samples = {"train": measured["margin"], "test": on_test["exact" if search is exact else "soft"]}
    over_time = measure_history(subject, args, search, {"train": of_train, "test": test}, samples)
    rows = [{"split": split, "margin": value} for split, values in samples.items() for value in values]
    write_csv(output / "margins.csv", rows)
    if over_time:
        write_csv(output / "margins_over_time.csv", over_time)
    figures.margins(output / "margins.png", samples, over_time, norm)

    attacks = autoattack_points(subject.folder, subject.identity, norm)
    radii = np.linspace(0, max([2 * below, *(attack["eps"] for attack in attacks)]), 65).tolist()
    rows = robust_shares(on_test["exact"], on_test["soft"], radii)
    write_csv(output / "robustness.csv", rows)
    figures.robustness(output / "robustness.png", rows, attacks, norm)

    shown = nearest_examples(model, examples, measured["margin"], args.nearest, search)
    write_csv(output / "nearest.csv", [{key: row[key] for key in ("margin", "label", "predicted")} for row in shown])
    figures.nearest(output / "nearest.png", shown, norm)

    summary = {
        **subject.identity,
        "norm": norm,
        "boundary": args.boundary,
        "temperature": None if search is exact else search.temperature,
        "direction": args.direction,
        "amp": amp,
        "seed": args.seed,
        "search_steps": args.search_steps,
        "vulnerable_below": below,
        "found": {"examples": len(found), "boundary_points": int(found.sum())},
        "negative_speeds_of_vulnerable": {
            method: proportion(speed[margin < below] < 0) for method, speed in speeds.items()
        },
        "paired_with_dyart": paired({method: speed[margin < below] for method, speed in speeds.items()}, "dyart"),
        "mean_speed_of_vulnerable": {
            method: float(speed[margin < below].mean()) if (margin < below).any() else None
            for method, speed in speeds.items()
        },
        "margins": {split: quantiles(values) for split, values in samples.items()},
        "robust_at_attack_eps": robust_shares(on_test["exact"], on_test["soft"], [below])[0],
        "autoattack": attacks,
    }
    if args.check_speeds:
        chosen = Split(examples.images[: args.check_speeds], examples.labels[: args.check_speeds])
        rows, summary["speed_check"] = check_speeds(model, chosen, search, along)
        write_csv(output / "speed_check.csv", rows)
        figures.speed_check(output / "speed_check.png", rows, summary["speed_check"], norm)
    summary |= {"seconds": round(time.monotonic() - started, 1), "device": str(device), **versions()}
    write_json(output / "dynamics.json", summary)
    return summary | {"output": str(output)}


def measure_history(
    subject: Subject, args: Any, search: Search, splits: dict[str, Split], samples: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Quantiles of the margins of train and test at each checkpoint of the run, the analysed one among them."""
    if subject.folder is None:
        return []
    name, rows = subject.identity["checkpoint"], []
    model = build_model(subject.settings).to(next(subject.model.parameters()).device).eval()
    analysed = epoch_of(load_checkpoint(subject.folder / name))
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


def report(summary: dict[str, Any]) -> str:
    """What a run prints in the end."""
    scale = figures.SCALES[summary["norm"]]
    below = f"R < {summary['vulnerable_below'] * scale.factor:g} ({scale.unit})"
    lines = [f"negative speeds among the examples with {below}, {summary['boundary']} boundary, with 95 % intervals:"]
    for method, row in summary["negative_speeds_of_vulnerable"].items():
        share = "no such example"
        if row["total"]:
            share = f"{row['share']:6.1%}  [{row['low']:.1%}, {row['high']:.1%}]  {row['negative']} of {row['total']}"
        if row["total"] and (other := summary["paired_with_dyart"].get(method)):
            share += f"; McNemar against DyART: p = {other['p']:.2g}"
        lines.append(f"  {figures.NAMES[method]:8}{share}")
    for method, row in summary.get("speed_check", {}).items():
        text = f"no correlation of {row['examples']} examples"
        if row["correlation"] is not None:
            text = f"correlation {row['correlation']:.4f}, equal signs {row['equal_signs']:.1%} of {row['examples']}"
        lines.append(f"  {figures.NAMES[method]:8}measured against predicted speeds: {text}")
    lines.append(
        "Shares with R > ε: the boundary point that was found is an adversarial example, so the exact curve, like "
        "AutoAttack's robust accuracy, bounds the true robust accuracy from above; the soft margin is a lower bound of "
        "the exact one where both are found exactly."
    )
    lines.append(f"figures in {summary['output']} ({summary['seconds']:.0f} s)")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Analyse what the flags say. Raises ValueError or OSError, in one line, for what is wrong with them."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.toy == (args.target is not None):
        parser.error("expected one FOLDER or FILE to analyse, or --toy")
    if args.toy:
        print(draw_toy(Path(args.output_dir or "results")))
    else:
        print(report(analyze(args)))
    return 0


if __name__ == "__main__":
    flags.run(main)
