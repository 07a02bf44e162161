"""Measure what a training step costs and how close the boundary search comes.

    python bench.py experiments/NAME/burn_in.pt experiments/NAME/best.pt
    python bench.py weights.pt --model wrn-28-10-swish --batch-size 256 --device cuda --amp bf16

Times are taken interleaved, round after round, and compared within each round, so that a machine that is now faster,
now slower disturbs the ratios little. Prints tables and writes the figures to results/bench-DEVICE.json.
"""

import copy
import math
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from data import DATASETS, DEFAULT_DATA_DIR, balanced_subset, load_data, to_input
from dyart.averaging import WeightAverage
from dyart.graphs import CudaGraphs
from dyart.losses import LOSSES
from dyart.margin import CORRECT_ABOVE, SEARCHES, find_boundary, is_locally_closest, soft_logit_margin
from dyart.modes import PRECISIONS, frozen, mixed_precision
from dyart.projection import NORMS
from evaluation.attack import device_name, versions
from evaluation.candidate import load_candidate
from experiment import flags
from experiment.build import build_model
from experiment.settings import dataset_name
from storage.files import write_json

REFERENCE_STEPS = 100
# The training steps that are timed: the method, and its options where they are not the defaults.
STEPS = {
    "clean step": ("clean", {}),
    "PGD-10 AT step": ("at", {}),
    "TRADES-10 step": ("trades", {}),
    "DyART step": ("dyart", {}),
    "DyART step, --search fab": ("dyart", {"search": "fab"}),  # as released: never from a graph
}
# What a figure is a multiple of.
BASES = {
    "forward": "forward + input gradient",
    "projection": "forward + input gradient",
    "search": "its passes",
    "search, fab": "search",
    "PGD-10 AT step": "clean step",
    "TRADES-10 step": "PGD-10 AT step",
    "DyART step": "PGD-10 AT step",
    "DyART step, --search fab": "DyART step",
}


def build_parser() -> flags.Parser:
    """The flags of bench.py."""
    p = flags.Parser(prog="bench.py", description=__doc__.splitlines()[0])
    p.add_argument(
        "targets", metavar="FOLDER|FILE", nargs="*", help="weights: a folder's best.pt, or files (untrained)"
    )
    g = p.add_argument_group("for files without settings in them, and for untrained weights")
    g.add_argument("--model", default=None, help="wrn-D-W[-swish], preact-resnetD[-swish], resnetD (wrn-16-2-swish)")
    g.add_argument("--dataset", "--data", type=dataset_name, default=None, help=", ".join(DATASETS) + " (cifar10)")
    flags.add_switch(g, "--group-norm", default=None, help="GroupNorm in the place of BatchNorm")
    flags.add_switch(g, "--normalize", default=None, help="normalize inside the model")
    g = p.add_argument_group("what is measured")
    g.add_argument("--batch-size", type=flags.whole(least=1), default=128)
    g.add_argument("--rounds", type=flags.whole(least=1), default=5, help="each times everything once; after a warm-up")
    g.add_argument("--examples", type=flags.whole(), default=256, help="images for the quality of boundary points")
    g.add_argument("--steps", type=flags.whole(least=1), nargs="*", default=[4, 5, 8], help="other numbers to compare")
    g.add_argument("--norm", choices=list(NORMS), default="Linf", help="of margins and attacks")
    g.add_argument("--seed", type=flags.whole(), default=0, help="of the choice of images and of random starts")
    flags.add_switch(p, "--smoke", default=False, help="a few seconds on digits, to see that it runs")
    g = p.add_argument_group("where and how")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    g.add_argument("--threads", type=flags.whole(least=1), default=torch.get_num_threads(), help="of the CPU")
    g.add_argument("--amp", choices=PRECISIONS, default="none", help="bfloat16 in searches only, or also in training")
    flags.add_switch(g, "--tf32", default=True, help="TensorFloat-32 for float32 on a GPU")
    flags.add_switch(g, "--channels-last", default=True, help="memory layout of images and weights")
    flags.add_switch(g, "--compile", default=False, help="torch.compile")
    flags.add_switch(g, "--cuda-graphs", default=False, help="on a GPU, replay the fast search from a graph")
    g.add_argument("--data-dir", default=str(DEFAULT_DATA_DIR), help="where prepared datasets lie")
    g.add_argument("--output", default=None, help="the file to write (results/bench-DEVICE.json)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Measure what the flags say. Raises ValueError or OSError for what is wrong with them."""
    options = vars(build_parser().parse_args(argv))
    if options["smoke"]:
        options |= {"dataset": "digits", "model": "wrn-10-1-swish", "batch_size": 16, "rounds": 1, "examples": 8}
        options |= {"targets": [], "steps": []}
    device = flags.device(options["device"], cuda_graphs=options["cuda_graphs"])
    name = device_name(device) if device.type == "cuda" else cpu_name()
    output = Path(options["output"] or f"results/bench-{re.sub('[^A-Za-z0-9]+', '-', name).strip('-').lower()}.json")
    flags.check_writable(output.parent, "--output")
    torch.set_num_threads(options["threads"])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options["tf32"]
    settings = {key: value for key, value in options.items() if key not in ("targets", "output")}
    rate = bf16_rate(device)
    report: dict[str, Any] = {"machine": name, "bf16_tflops_per_second": rate, "versions": versions()}
    report |= {"settings": settings, "subjects": []}
    for target in options["targets"] or [None]:
        subject = load_subject(target, options)
        figures = {"weights": subject.identity, "correct": subject.correct().float().mean().item()}
        figures["times"] = measure_times(subject, options, rate)
        figures["memory"] = measure_memory(target, subject, options)
        figures["quality"] = measure_quality(subject, options) if options["examples"] else []
        report["subjects"].append(figures)
        print_tables(figures)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, report)
    print(f"{name}, {options['threads']} threads; figures in {output}")
    return 0


def cpu_name() -> str:
    """The processor as its maker calls it, with the number of its cores."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return f"{found[1] if found else platform.machine()}, {multiprocessing.cpu_count()} cores"


# --- What is measured -------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A model with its weights, in eval mode, and images to measure it on."""

    model: nn.Module
    identity: dict[str, Any]
    x: Tensor
    y: Tensor
    autocast: Callable[[], Any]
    norm: str

    def correct(self) -> Tensor:
        """Which examples have a margin. (n,)"""
        with torch.no_grad(), self.autocast():
            return soft_logit_margin(self.model(self.x), self.y) > CORRECT_ABOVE


def load_subject(target: str | None, options: dict[str, Any]) -> Subject:
    """The model of a checkpoint, or an untrained one that is sure, and taken to be right, about most of its images."""
    device = flags.device(options["device"])
    names = ("model", "dataset", "group_norm", "normalize")
    given = {name: options[name] for name in names}
    if target is None:
        defaults = {"model": "wrn-16-2-swish", "dataset": "cifar10", "group_norm": False, "normalize": False}
        identity = {name: defaults[name] if given[name] is None else given[name] for name in names}
        torch.manual_seed(options["seed"])
        model = build_model({**identity, "channels_last": False}).eval()
        identity |= {"checkpoint": None}
    else:
        path = Path(target)
        path = path / "best.pt" if path.is_dir() else path
        model, identity, _ = load_candidate(path, "average", given, print)
        model.requires_grad_(True)
    layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
    test = load_data(identity["dataset"], options["data_dir"])[1]
    chosen = balanced_subset(test, max(options["batch_size"], options["examples"]), options["seed"])
    x, y = to_input(chosen.images).to(device).contiguous(memory_format=layout), chosen.labels.to(device)
    model.to(device, memory_format=layout)
    if options["compile"]:
        model.compile()
    if target is None:
        with torch.no_grad():
            [module for module in model.modules() if isinstance(module, nn.Linear)][-1].weight *= 100
            y = model(x).argmax(1)

    def autocast() -> Any:
        return mixed_precision(options["amp"], device.type)

    return Subject(model, identity, x, y, autocast, options["norm"])


def training_step(subject: Subject, name: str, options: dict[str, Any]) -> Callable[[], None]:
    """One step of a training method on its own copy of the model, as in train.py; at a learning rate of 0."""
    method, extra = STEPS[name]
    model = copy.deepcopy(subject.model)
    average = WeightAverage(model)
    sgd = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, **sgd)
    batch = slice(options["batch_size"])
    x, y = subject.x[batch], subject.y[batch]
    arguments = {} if method == "clean" else {"norm": subject.norm, **extra}
    if name == "DyART step" and options["cuda_graphs"]:
        arguments["graphs"] = CudaGraphs()
    statistics_ = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def step() -> None:
        for buffer, value in statistics_:
            buffer.copy_(value)
        optimizer.zero_grad()
        with subject.autocast():
            loss, _ = LOSSES[method](model, x, y, **arguments)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        average.update(model, 1000)

    return step


# --- Times ------------------------------------------------------------------------------------------------------------


def measure_times(subject: Subject, options: dict[str, Any], rate: float) -> dict[str, dict[str, Any]]:
    """Seconds of each part and step (median, quartiles), and their multiples of others in the same round.

    Of steps also the images a second, the floating-point operations (10^12), and these a second as a share of `rate`.
    """
    batch = slice(options["batch_size"])
    x, y, correct = subject.x[batch], subject.y[batch], subject.correct()[batch]
    norm, model = NORMS[subject.norm], subject.model
    # The search narrows its batch to the correct rows on the CPU only.
    rows = correct.nonzero()[:, 0] if x.device.type == "cpu" else slice(None)

    def forward() -> None:
        with subject.autocast(), frozen(model), torch.no_grad():
            model(x)

    def input_gradient(rows: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        with subject.autocast(), frozen(model):
            pixels = x[rows].requires_grad_(True)
            value = soft_logit_margin(model(pixels), y[rows])
            return value.detach(), torch.autograd.grad(value.sum(), pixels)[0].flatten(1)

    value, grad = input_gradient(rows)
    flat = x[rows].flatten(1)

    graphs = CudaGraphs() if options["cuda_graphs"] else None

    def search(name: str, graphs: CudaGraphs | None) -> None:
        with subject.autocast():
            find_boundary(model, x, y, norm=subject.norm, search=name, graphs=graphs)

    def passes() -> None:
        input_gradient()
        for _ in range(SEARCHES["fast"][1]):
            input_gradient(rows)

    parts = {
        "forward": forward,
        "forward + input gradient": input_gradient,
        "projection": lambda: norm.project(flat, grad, -value),
        "its passes": passes,
        "search": lambda: search("fast", graphs),
        "search, fab": lambda: search("fab", None),
    }
    parts |= {name: training_step(subject, name, options) for name in STEPS}

    taken: dict[str, list[float]] = {name: [] for name in parts}
    for number in tqdm(range(-1, options["rounds"]), desc="rounds", leave=False):
        for name, part in parts.items():
            duration = seconds(part, x.device)
            if number >= 0:
                taken[name].append(duration)
    figures: dict[str, dict[str, Any]] = {}
    for name, durations in taken.items():
        figures[name] = {"seconds": spread(durations)}
        if name in BASES:
            ratios = [a / b for a, b in zip(durations, taken[BASES[name]], strict=True)]
            figures[name] |= {"of": BASES[name], "ratio": spread(ratios)}
        if name in STEPS:
            median = figures[name]["seconds"]["median"]
            figures[name]["images_per_second"] = len(x) / median
            figures[name]["tflops"] = count_flops(training_step(subject, name, options | {"cuda_graphs": False}))
            figures[name]["of_bf16_rate"] = figures[name]["tflops"] / median / rate
    return figures


def count_flops(step: Callable[[], Any]) -> float:
    """10^12 floating-point operations of the matrix products and convolutions in a call."""
    with _FlopCounter() as counter, torch.compiler.set_stance("force_eager"):
        step()
    return counter.total / 1e12


class _FlopCounter(TorchDispatchMode):
    """PyTorch's FlopCounterMode without its record of modules, whose hooks fail where a gradient is of a leaf alone."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        return result


def bf16_rate(device: torch.device) -> float:
    """10^12 floating-point operations a second in bfloat16, by the product of two square matrices; the best of ten."""
    size = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    times = [seconds(lambda: matrix @ matrix, device) for _ in range(11)]
    return 2 * size**3 / min(times[1:]) / 1e12


def seconds(part: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes, to its end on the device."""
    synchronize(device)
    start = time.perf_counter()
    part()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles; of less than two values, the value itself."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "quartile_1": low, "quartile_3": high}


# --- Memory -----------------------------------------------------------------------------------------------------------


def measure_memory(target: str | None, subject: Subject, options: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The most memory that each step takes at once, beyond model, optimizer and data, in MiB and of the clean step's.

    `mib` is what PyTorch has allocated. On the CPU that is seen in the resident memory of a fresh process that gives
    every large buffer pages of its own; `resident_mib` is that of a process as it comes, where the C library keeps what
    was freed in pieces that the next step may not fit in. The latter differs from one process to the next.
    """
    peaks: dict[str, dict[str, float]] = {}
    for name in ["clean step", "DyART step"] if options["smoke"] else STEPS:
        if subject.x.device.type == "cuda":
            peaks[name] = {"mib": peak_of(training_step(subject, name, options), subject.x.device, options)}
        elif Path("/proc/self/clear_refs").exists():
            job = (target, name, options)
            peaks[name] = {"mib": in_process(job, pages_of_its_own=True), "resident_mib": in_process(job)}
    clean = peaks.get("clean step", {})
    return {
        name: peak | {key.removesuffix("mib") + "of_clean": value / clean[key] for key, value in peak.items()}
        for name, peak in peaks.items()
    }


def in_process(job: tuple[Any, ...], *, pages_of_its_own: bool = False) -> float:
    """What `resident_of_step` measures in a process of its own."""
    variable = "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(variable)
    try:
        if pages_of_its_own:
            os.environ[variable] = str(2**17)
        with multiprocessing.get_context("spawn").Pool(1) as process:
            return process.apply(resident_of_step, job)
    finally:
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before


def peak_of(step: Callable[[], None], device: torch.device, options: dict[str, Any]) -> float:
    """MiB that a step allocates at most beyond what was allocated before it; its first call is a warm-up.

    What CUDA graphs hold counts as reserved only, so with them it is what is reserved, the warm-up included.
    """
    if options["cuda_graphs"]:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        step()
        step()
        return (torch.cuda.memory_reserved(device) - before) / 2**20
    step()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def resident_of_step(target: str | None, name: str, options: dict[str, Any]) -> float:
    """MiB by which the resident memory of this process rises while it takes its first step of full size."""
    torch.set_num_threads(options["threads"])
    subject = load_subject(target, options)
    training_step(subject, name, options | {"batch_size": 2})()
    step = training_step(subject, name, options)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
    before = resident("VmRSS")
    step()
    return (resident("VmHWM") - before) / 1024


def resident(field: str) -> int:
    """A field of this process's memory status, in KiB."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


# --- Quality ----------------------------------------------------------------------------------------------------------


def measure_quality(subject: Subject, options: dict[str, Any]) -> list[dict[str, Any]]:
    """How close each search comes, as multiples of the distances that a long one finds.

    The long search is the released recipe (--search fab) with 100 iterations, but started at x: a random start finds
    longer distances.
    """
    count, size = options["examples"], options["batch_size"]
    default = SEARCHES["fast"][1]
    searches = {f"fast, {steps} steps": {"steps": steps} for steps in sorted({default, *options["steps"]})}
    searches["fab, 20 steps (released)"] = {"search": "fab"}
    runs = {"reference": {"search": "fab", "steps": REFERENCE_STEPS, "init_radius": 0.0}} | searches
    margins: dict[str, list[Tensor]] = {name: [] for name in runs}
    kept: dict[str, list[Tensor]] = {name: [] for name in runs}
    values: dict[str, list[Tensor]] = {name: [] for name in runs}
    correct = subject.correct()[:count]
    if not correct.any():
        return []
    generator = torch.Generator(subject.x.device).manual_seed(options["seed"])
    for start in tqdm(range(0, count, size), desc="quality", leave=False):
        rows = torch.arange(start, min(start + size, count), device=correct.device)[correct[start : start + size]]
        for name, arguments in runs.items():
            x, y = subject.x[rows], subject.y[rows]
            with subject.autocast():
                boundary = find_boundary(subject.model, x, y, norm=subject.norm, generator=generator, **arguments)
            margins[name].append(torch.where(boundary.found, boundary.margin, math.inf))
            kept[name].append(is_locally_closest(x, boundary, subject.norm))
            values[name].append(boundary.value)
    reference = torch.cat(margins["reference"])
    figures = []
    for name in runs:
        margin, found = torch.cat(margins[name]), torch.cat(margins[name]).isfinite()
        ratio = (margin / reference)[found & reference.isfinite()].double()
        row = {"search": name, "examples": len(margin), "found": found.double().mean().item()}
        row["kept"] = torch.cat(kept[name]).double().mean().item()
        if len(ratio):
            row |= {"ratio_mean": ratio.mean().item(), "ratio_median": ratio.median().item()}
            row |= {"ratio_95": ratio.quantile(0.95).item(), "margin_median": margin[found].median().item()}
            row["distance_from_boundary"] = torch.cat(values[name])[found].abs().mean().item()
        figures.append(row)
    return figures


# --- Tables -----------------------------------------------------------------------------------------------------------


def print_tables(figures: dict[str, Any]) -> None:
    """The figures of one subject, for people."""
    weights = figures["weights"]
    print(f"\n{weights['model']}, {weights['checkpoint'] or 'untrained'}: {figures['correct']:.0%} correct\n")
    print(
        f"| {'':24} | {'ms (quartiles)':>24} | {'ratio (quartiles)':>20} | {'of':24} | of bf16 "
        "| peak MiB | of clean | resident |"
    )
    print(f"| {'-' * 24} | {'-' * 23}: | {'-' * 19}: | {'-' * 24} | ------: | -------: | -------: | -------: |")
    for name, part in figures["times"].items():
        ratio, memory = part.get("ratio"), figures["memory"].get(name, {})
        share = f"{part['of_bf16_rate']:7.1%}" if "of_bf16_rate" in part else " " * 7
        peak = [(memory.get(key), digits) for key, digits in (("mib", 0), ("of_clean", 2), ("resident_of_clean", 2))]
        print(
            f"| {name:24} | {interval(part['seconds'], 1000, 1):>24} | {interval(ratio, 1, 3) if ratio else '':>20} "
            f"| {part.get('of', ''):24} | {share} | "
            + " | ".join(" " * 8 if value is None else f"{value:8.{digits}f}" for value, digits in peak)
            + " |"
        )
    if figures["quality"]:
        print(f"\n| {'distances, of the reference':27} | found |  kept |  mean | median |  95 % | mean |Φ| |")
        print(f"| {'-' * 27} | ----: | ----: | ----: | -----: | ----: | -------: |")
    for row in figures["quality"]:
        ratios = " | ".join(f"{row.get(key, math.nan):{w}.3f}" for key, w in RATIOS.items())
        print(f"| {row['search']:27} | {row['found']:.3f} | {row['kept']:.3f} | {ratios} |")
    print()


RATIOS = {"ratio_mean": 5, "ratio_median": 6, "ratio_95": 5, "distance_from_boundary": 8}


def interval(values: dict[str, float], scale: float, digits: int) -> str:
    """A median with its quartiles."""
    low, middle, high = (scale * values[key] for key in ("quartile_1", "median", "quartile_3"))
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


if __name__ == "__main__":
    flags.run(main)
