"""What a training step and its parts cost: time, operations, memory. For bench.py."""

import copy
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from data import DEFAULT_DATA_DIR, balanced_subset, has_test, to_input
from dyart.averaging import WeightAverage
from dyart.graphs import CudaGraphs
from dyart.losses import LOSSES, SHARED, TRAINING_STEPS
from dyart.margin import CORRECT_ABOVE, find_boundary, soft_logit_margin, value_and_gradient
from dyart.modes import batch_norm_momentum, frozen, mixed_precision
from dyart.projection import NORMS
from evaluation.candidate import load_candidate, load_part, load_test
from experiment import flags
from experiment.build import build_model, loss_options
from experiment.folder import named_checkpoints
from experiment.images import resolve_images
from experiment.processes import ALONE, Processes
from experiment.recipes import recipe
from experiment.settings import resolve, resolve_normalization
from experiment.train_flags import with_own_model
from experiment.weights import MODEL_SETTINGS

# The training steps that are timed: the method, and its settings where they are not the recipe's.
STEPS = {
    "clean step": ("clean", {}),
    "PGD-10 AT step": ("at", {}),
    "TRADES-10 step": ("trades", {}),
    "N-FGSM step": ("n-fgsm", {}),
    "DyART step": ("dyart", {"search": SHARED}),
    "DyART step, --adaptive-steps true": ("dyart", {"search": SHARED, "adaptive_steps": True}),
    "DyART step, --search fast": ("dyart", {"search": "fast"}),
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
    "N-FGSM step": "PGD-10 AT step",
    "DyART step": "PGD-10 AT step",
    "DyART step, --adaptive-steps true": "PGD-10 AT step",
    "DyART step, --search fast": "PGD-10 AT step",
    "passes of a DyART step": "DyART step",
    "DyART step, --search fab": "PGD-10 AT step",
}


class Workload(NamedTuple):
    """A model with its weights, in eval mode, and images to measure it on."""

    model: nn.Module
    identity: dict[str, Any]
    x: Tensor
    y: Tensor
    autocast: Callable[[], Any]
    norm: str
    # r0 and alpha of DyART's loss.
    objective: dict[str, float]

    def correct(self) -> Tensor:
        """Which examples have a margin. (n,)"""
        with torch.no_grad(), self.autocast():
            return soft_logit_margin(self.model(self.x), self.y) > CORRECT_ABOVE


def load_workload(target: str | None, options: dict[str, Any]) -> Workload:
    """The model of a checkpoint, or an untrained one that is sure, and taken to be right, about most of its images."""
    device = flags.device(options["device"])
    norm = options["norm"]
    if target is None:
        named = with_own_model({name: options[name] for name in MODEL_SETTINGS if options.get(name) is not None})
        identity = {"model": "wrn-16-2-swish", "dataset": "cifar10", "group_norm": False, "image_size": None, **named}
        place = {"data_dir": options["data_dir"] or DEFAULT_DATA_DIR}
        identity |= {"dataset_content": resolve_images({**identity, **place}).get("dataset_content")}
        identity |= resolve_normalization({**identity, **place})
        torch.manual_seed(options["seed"])
        model = build_model({**identity, "channels_last": False}).eval()
        identity |= {"checkpoint": None}
        test = load_part({**identity, **place}, measured_on(identity))
    else:
        path = Path(target)
        path = named_checkpoints(path, ["best"])[0] if path.is_dir() else path
        candidate = load_candidate(path, None, options)
        norm = norm or candidate.settings.get("norm")
        model, identity = candidate.model, candidate.identity
        model.requires_grad_(True)
        test = load_test(candidate, options["data_dir"], measured_on(identity))
    layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
    chosen = balanced_subset(test, max(options["batch_size"], options["examples"]), options["seed"])
    x, y = to_input(chosen.images).to(device).contiguous(memory_format=layout), chosen.labels.to(device)
    model.to(device, memory_format=layout)
    if options["compile"]:
        model.compile()
    if target is None:
        with torch.no_grad():
            [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1].weight *= 100
            # So that it is as sure with the statistics of the batch, in training, as with the running ones.
            with batch_norm_momentum(model, lambda usual: 1.0):
                model.train()(x[: options["batch_size"]])
            y = model.eval()(x).argmax(1)

    def autocast() -> Any:
        return mixed_precision(options["amp"], device.type)

    norm = norm or "Linf"
    asked = candidate.settings if target is not None and candidate.settings.get("norm") == norm else {}
    usual = recipe(identity["dataset"], "dyart", generated=False, group_norm=identity["group_norm"], norm=norm)
    objective = {name: asked.get(name, usual[name]) for name in ("r0", "alpha")}
    return Workload(model, identity, x, y, autocast, norm, objective)


def measured_on(identity: Mapping[str, Any]) -> str:
    """The part of a dataset whose images are measured on: of own images without a test set, those held out."""
    content = identity["dataset_content"]
    return "test" if content is None or has_test(content) else "validation"


def training_step(
    workload: Workload,
    name: str,
    options: dict[str, Any],
    processes: Processes = ALONE,
    lap: Callable[[str], None] = lambda part: None,
) -> Callable[[], None]:
    """One step of a training method on its own copy of the model, as in train.py; at a learning rate of 0.

    Of several processes each takes its rows. lap: called with the name of each part of the step when it is done.
    """
    method, extra = STEPS[name]
    model = copy.deepcopy(workload.model)
    average = WeightAverage(model)
    sgd = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, **sgd)
    n = min(options["batch_size"], len(workload.y))
    x, y = workload.x[:n][processes.rows(n)], workload.y[:n][processes.rows(n)]
    settings = resolve({"method": method, "norm": workload.norm, **extra}) | workload.objective
    arguments = loss_options(settings, method)
    if extra.get("search") == "fast" and options["cuda_graphs"]:
        arguments["graphs"] = CudaGraphs()
    statistics_ = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def step() -> None:
        for buffer, value in statistics_:
            buffer.copy_(value)
        optimizer.zero_grad()
        with workload.autocast():
            loss, metrics = LOSSES[method](model, x, y, **arguments)
        loss.backward()
        lap("passes")
        processes.add_up(model, [value for _, value in statistics_], loss, metrics, n)
        lap("sum")
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        average.update(model, 1000)
        lap("rest")

    return step


def measure_times(workload: Workload, options: dict[str, Any], rate: float) -> dict[str, dict[str, Any]]:
    """Seconds of each part and step (median, quartiles), and their multiples of others in the same round.

    Of steps also the images a second, the floating-point operations (10^12), these as multiples of a forward pass of
    the batch, and a second as a share of `rate`.
    """
    batch = slice(options["batch_size"])
    x, y, correct = workload.x[batch], workload.y[batch], workload.correct()[batch]
    norm, model = NORMS[workload.norm], workload.model
    # The search narrows its batch to the correct rows on the CPU only.
    rows = correct.nonzero()[:, 0] if x.device.type == "cpu" else slice(None)

    def forward() -> None:
        with workload.autocast(), frozen(model), torch.no_grad():
            model(x)

    def input_gradient(rows: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        with workload.autocast(), frozen(model):
            return value_and_gradient(model, x[rows], y[rows])

    value, grad = input_gradient(rows)
    flat = x[rows].flatten(1)

    graphs = CudaGraphs() if options["cuda_graphs"] else None

    def search(name: str, graphs: CudaGraphs | None) -> None:
        with workload.autocast():
            options = {"search": name, "steps": TRAINING_STEPS[name], "graphs": graphs}
            find_boundary(model, x, y, norm=workload.norm, **options)

    def passes() -> None:
        input_gradient()
        for _ in range(TRAINING_STEPS["fast"]):
            input_gradient(rows)

    trained = copy.deepcopy(model).train()

    def whole_gradient(rows: Tensor | slice) -> None:
        with workload.autocast():
            loss = nn.functional.cross_entropy(trained(x[rows]), y[rows])
        torch.autograd.grad(loss, list(trained.parameters()))

    taken_by_step = passes_taken(workload, "DyART step", options)

    def passes_of_step() -> None:
        for images, trained_on in taken_by_step:
            (whole_gradient if trained_on else input_gradient)(slice(images))

    parts = {
        "forward": forward,
        "forward + input gradient": input_gradient,
        "projection": lambda: norm.project(flat, grad, -value),
        "its passes": passes,
        "search": lambda: search("fast", graphs),
        "search, fab": lambda: search("fab", None),
        "passes of a DyART step": passes_of_step,
    }
    parts |= {name: training_step(workload, name, options) for name in STEPS}

    taken: dict[str, list[float]] = {name: [] for name in parts}
    for number in tqdm(range(-1, options["rounds"]), desc="rounds", leave=False):
        for name, part in parts.items():
            duration = seconds(part, x.device)
            if number >= 0:
                taken[name].append(duration)
    figures: dict[str, dict[str, Any]] = {}
    one_pass = count_flops(forward)
    for name, durations in taken.items():
        figures[name] = {"seconds": spread(durations)}
        if name in BASES:
            ratios = [a / b for a, b in zip(durations, taken[BASES[name]], strict=True)]
            figures[name] |= {"of": BASES[name], "ratio": spread(ratios)}
        if name in STEPS:
            median = figures[name]["seconds"]["median"]
            figures[name]["images_per_second"] = len(x) / median
            figures[name]["tflops"] = count_flops(training_step(workload, name, options | {"cuda_graphs": False}))
            figures[name]["passes"] = figures[name]["tflops"] / one_pass
            figures[name]["of_bf16_rate"] = figures[name]["tflops"] / median / rate
    return figures


def passes_taken(workload: Workload, name: str, options: dict[str, Any]) -> list[tuple[int, bool]]:
    """The images of each pass that a training step takes, and whether it is one to train on."""
    taken: list[tuple[int, bool]] = []
    note = workload.model.register_forward_pre_hook(lambda model, x: taken.append((len(x[0]), model.training)))
    step = training_step(workload, name, options)  # on a copy, which has the hook
    note.remove()
    with torch.compiler.set_stance("force_eager"):
        step()
    return taken


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
    """10^12 floating-point operations a second in bfloat16, by the product of two square matrices; the best of ten.

    The matrices are as large as such a machine needs to be at its best, or as take it a tenth of a second: without
    instructions for bfloat16 a CPU is a hundred times slower.
    """
    size, largest = 256, 8192 if device.type == "cuda" else 2048
    while True:
        matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        times = [seconds(lambda matrix=matrix: matrix @ matrix, device) for _ in range(2)]
        if size == largest or times[1] > 0.1:
            break
        size *= 2
    times += [seconds(lambda: matrix @ matrix, device) for _ in range(9)]
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


def measure_memory(target: str | None, workload: Workload, options: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The most memory that each step takes at once, beyond model, optimizer and data, in MiB and of the clean step's.

    `mib` is what PyTorch has allocated. On the CPU that is seen in the resident memory of a fresh process that gives
    every large buffer pages of its own; `resident_mib` is that of a process as it comes, where the C library keeps what
    was freed in pieces that the next step may not fit in. The latter differs from one process to the next.
    """
    peaks: dict[str, dict[str, float]] = {}
    for name in ["clean step", "DyART step"] if options["smoke"] else STEPS:
        if workload.x.device.type == "cuda":
            peaks[name] = {"mib": peak_of(training_step(workload, name, options), workload.x.device, options)}
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
    workload = load_workload(target, options)
    training_step(workload, name, options | {"batch_size": 2})()
    step = training_step(workload, name, options)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # sets the peak back to the present
    before = resident("VmRSS")
    step()
    return (resident("VmHWM") - before) / 1024


def resident(field: str) -> int:
    """A field of this process's memory status, in KiB."""
    return int(
        re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8", errors="replace"))[1]
    )
