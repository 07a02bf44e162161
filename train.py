"""Train a robust classifier: a clean burn-in, then DyART or a baseline, into an experiment folder.

    python train.py --dataset cifar10 --burn-in-epochs 10 --epochs 200

The order of the file is the order of a run: stages and data, one step, one epoch, the run. Flags are in settings.py.
"""

import math
import random
import resource
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

import flags
from data import DATASETS, Loader, Split, balanced_subset, hold_out, load_auxiliary, load_data, to_input
from dyart.attacks import pgd
from dyart.averaging import WeightAverage
from dyart.dynamics import negative_speed_share
from dyart.experiment import Experiment, ExperimentError, Loaded, check_settings, load_checkpoint
from dyart.graphs import CudaGraphs
from dyart.losses import LOSSES
from dyart.modes import mixed_precision
from dyart.schedules import SCHEDULES
from models.weights import load_weights
from models.wide_resnet import WideResNet
from settings import ACTIONS, LATER, PLACE, build_model, check_stored, default_name, loss_options, parse, resolve

# A run stops at this many steps in a row whose loss or gradient is not finite.
MAX_BAD_STEPS = 10
# Where our checkpoints, and those of others, keep the averaged weights.
AVERAGE_KEYS = ("average", "wa_model", "model_state_dict", "state_dict")

# --- Model and data ---------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """A part of a run with one loss, optimizer and schedule; epochs are counted from `first` + 1 through the run."""

    name: str
    method: str
    first: int
    epochs: int
    lr: float
    scheduler: str
    batch_size: int
    clip_grad: float | None


def stages_of(settings: dict[str, Any]) -> list[Stage]:
    """The burn-in, where there is one, and the method."""
    s, first = settings, settings["burn_in_epochs"]
    burn_in = Stage("burn-in", "clean", 0, first, s["burn_in_lr"], "constant", s["burn_in_batch_size"], None)
    main = Stage(s["method"], s["method"], first, s["epochs"], s["lr"], s["scheduler"], s["batch_size"], s["clip_grad"])
    return [burn_in, main] if first else [main]


def load_pretrained(model: nn.Module, source: str) -> None:
    """Load averaged weights: of a folder's latest checkpoint, of a checkpoint file, or a bare state dict."""
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"--pretrained {source}: no such file or folder")
    if path.is_dir():
        loaded = Experiment.open(path).load_latest()
        if loaded is None:
            raise ExperimentError(f"--pretrained {source}: the folder holds no checkpoint yet")
        state, path = loaded.state, loaded.path
        wanted = state["settings"]["burn_in_epochs"] + state["settings"]["epochs"]
        if state["progress"]["epoch"] < wanted:
            raise ExperimentError(
                f"--pretrained {source}: {state['progress']['epoch']} of its {wanted} epochs are finished; "
                f"go on with --resume {source}, or name one of its checkpoint files"
            )
    else:
        state = load_checkpoint(path, foreign=True)
    weights = next((state[key] for key in AVERAGE_KEYS if isinstance(state.get(key), Mapping)), state)
    load_weights(model, weights, f"--pretrained {path}")


class Data(NamedTuple):
    """The images of a run, and how a Loader mixes in its generated ones (nothing where it has none)."""

    train: Split
    validation: Split
    generated: dict[str, Any]


def load_splits(settings: dict[str, Any]) -> Data:
    """The images that the settings ask for. Raises ValueError where they ask for more than there are."""
    train, _ = load_data(settings["dataset"], settings["data_dir"])
    epoch_size = len(train.labels)
    train, validation = hold_out(train, settings["dataset"], settings["seed"])
    subset = settings["train_subset"]
    if subset is not None:
        if subset > len(train.labels):
            raise ValueError(f"--train-subset {subset}: there are {len(train.labels)} training images")
        train, epoch_size = balanced_subset(train, subset, settings["seed"]), subset
    size = settings["validation_size"]
    if size is not None and size > len(validation.labels):
        raise ValueError(f"--validation-size {size}: only {len(validation.labels)} images are held out")
    generated = {}
    if settings["aux_data_filename"] is not None:
        info = DATASETS[settings["dataset"]]
        shape = (info.image_size, info.image_size, 3)
        auxiliary = load_auxiliary(settings["aux_data_filename"], image_shape=shape, num_classes=info.num_classes)
        # The held-out images count for the length of an epoch, as in the paper.
        steps = math.ceil(epoch_size / settings["batch_size"])
        generated = {"auxiliary": auxiliary, "auxiliary_fraction": settings["unsup_fraction"], "steps_per_epoch": steps}
    return Data(train, Split(validation.images[:size], validation.labels[:size]), generated)


def build_optimizer(model: nn.Module, stage: Stage, settings: dict[str, Any]) -> SGD:
    """SGD; a WideResNet's normalization layers have no weight decay, as in Gowal et al., 2020."""
    norms = (_BatchNorm, nn.GroupNorm) if isinstance(model, WideResNet) else ()
    plain = {id(p) for module in model.modules() if isinstance(module, norms) for p in module.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in plain], "weight_decay": settings["weight_decay"]},
        {"params": [p for p in model.parameters() if id(p) in plain], "weight_decay": 0.0},
    ]
    nesterov = settings["nesterov"] and settings["momentum"] > 0
    return SGD([g for g in groups if g["params"]], lr=stage.lr, momentum=settings["momentum"], nesterov=nesterov)


# --- One step ---------------------------------------------------------------------------------------------------------


@contextmanager
def batch_norm_momentum(model: nn.Module, momentum: float | None) -> Iterator[None]:
    """Hold the momentum of every BatchNorm at a value; None leaves them as they are."""
    layers = [] if momentum is None else [m for m in model.modules() if isinstance(m, _BatchNorm)]
    usual = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = momentum
    yield
    for layer, value in zip(layers, usual, strict=True):
        layer.momentum = value


class Meter:
    """Sums over the batches of an epoch, of which it gives means and, for margins, quantiles."""

    def __init__(self, state: dict[str, Any] | None = None):
        self.state = state or {"images": 0, "steps": 0, "seconds": 0.0, "sums": {}, "margins": torch.zeros(0)}

    def add(self, metrics: dict[str, Tensor], grad_norm: float, images: int) -> None:
        """Take in a step: means over its images, its margins (with nan for none), its gradient norm."""
        metrics = dict(metrics)
        margins = metrics.pop("margins", torch.zeros(0)).float().cpu()
        values = torch.stack([value.float() for value in metrics.values()]).tolist()
        sums = self.state["sums"]
        for name, value in zip(metrics, values, strict=True):
            sums[name] = sums.get(name, 0.0) + value * images
        sums["grad_norm"] = sums.get("grad_norm", 0.0) + grad_norm * images
        self.state["images"] += images
        self.state["steps"] += 1
        self.state["margins"] = torch.cat([self.state["margins"], margins[~margins.isnan()]])

    def means(self) -> dict[str, float]:
        """The mean of each metric over the images seen."""
        return {name: total / self.state["images"] for name, total in self.state["sums"].items()}

    def summary(self) -> dict[str, str]:
        """What the progress bar shows: loss, clean accuracy, boundary points found, mean margin in 1/255."""
        means = self.means()
        shown = {"loss": f"{means['loss']:.3f}"} if "loss" in means else {}
        shown |= {
            name: f"{means[key]:.1%}" for name, key in (("clean", "clean_accuracy"), ("found", "found")) if key in means
        }
        margins = self.state["margins"]
        return shown | ({"margin": f"{255 * margins.mean().item():.2f}/255"} if len(margins) else {})

    def margin_quantiles(self) -> dict[str, float]:
        """Mean and quantiles of the margins found, in units of 1/255."""
        margins = self.state["margins"].double().sort().values * 255
        if not len(margins):
            return {}
        row = {"margin_mean": margins.mean().item()}
        for percent in (10, 25, 50, 75, 90):
            row[f"margin_q{percent}"] = margins[round(percent / 100 * (len(margins) - 1))].item()
        return row


# --- The run ----------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """A signal has asked the run to stop; args[0] is its number."""


class Diverged(Exception):
    """Too many steps in a row with a loss or gradient that is not finite."""


class Signals:
    """Turns SIGINT, SIGTERM and SIGUSR1 into Interrupted at the next `check`; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number_ in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number_, self._receive)

    def _receive(self, number_: int, frame: Any) -> None:
        self.received = number_
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def check(self) -> None:
        if self.received is not None:
            raise Interrupted(self.received)


@dataclass
class Progress:
    """Where a run stands; with the weights and the optimizer, all that a checkpoint holds."""

    stage: int = 0
    epoch: int = 0  # finished ones, through all stages
    step: int = 0  # finished ones of the epoch under way
    total_steps: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    best: list[float] = field(default_factory=list)  # validation robust and clean accuracy


def step_seed(settings: dict[str, Any], *position: int) -> int:
    """A seed for the random starts of one step (or one validation), the same wherever the run was resumed."""
    return int(np.random.SeedSequence([settings["seed"], *position]).generate_state(1)[0])


def rng_states() -> dict[str, Any]:
    """The states of all global random generators, as plain data."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  (whatever uses the global generator)
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_states(states: dict[str, Any]) -> None:
    """Undo whatever was drawn since `rng_states`; CUDA's are skipped where the number of devices differs."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def validate(model: nn.Module, split: Split, settings: dict[str, Any], signals: Signals) -> dict[str, float]:
    """Clean accuracy, and robust accuracy under PGD on the CW loss, of the averaged model on held-out images."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(step_seed(settings, 0))
    clean = robust = 0
    for start in range(0, len(split.labels), settings["validation_batch_size"]):
        signals.check()
        rows = slice(start, start + settings["validation_batch_size"])
        x, y = to_input(split.images[rows]).to(device), split.labels[rows].to(device)
        with torch.no_grad():
            correct = model(x).argmax(1) == y
        x, y = x[correct], y[correct]
        clean += len(y)
        x_adv = pgd(
            model,
            x,
            y,
            norm=settings["norm"],
            eps=settings["attack_eps"],
            step_size=settings["attack_step"],
            steps=settings["validation_attack_iter"],
            objective="cw",
            generator=generator,
        )
        if len(y):
            with torch.no_grad():
                robust += (model(x_adv).argmax(1) == y).sum().item()
    return {"val_clean": clean / len(split.labels), "val_robust": robust / len(split.labels)}


def peak_memory_mib(device: torch.device) -> float:
    """The most memory used so far, in MiB: of the GPU since the last reset, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@dataclass
class Run:
    """What a run is made of while a stage is under way; `checkpoint` holds all of its state."""

    settings: dict[str, Any]
    stage: Stage
    loader: Loader
    model: nn.Module
    average: WeightAverage
    optimizer: Optimizer
    scheduler: LRScheduler
    progress: Progress
    meter: Meter
    graphs: CudaGraphs | None

    def weights(self, scores: dict[str, float]) -> dict[str, Any]:
        """A checkpoint to evaluate."""
        weights = {"settings": self.settings, "model": self.model.state_dict()}
        weights["average"] = self.average.model.state_dict()
        return weights | {"epoch": self.progress.epoch, "stage": self.stage.name, "validation": scores}

    def checkpoint(self) -> dict[str, Any]:
        """A checkpoint to resume from."""
        return {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "average": self.average.model.state_dict(),
            "warmup_steps": self.average.warmup_steps,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "progress": dict(vars(self.progress)),
            "meter": self.meter.state,
            "rng": rng_states(),
        }

    def restore(self, state: dict[str, Any], source: Path) -> None:
        """Put back what `checkpoint` gave, but for the settings. Raises ValueError for what does not fit this run."""
        load_weights(self.model, state.get("model"), f"{source}: model")
        load_weights(self.average.model, state.get("average"), f"{source}: average")
        check_state(state.get("progress"), vars(self.progress), f"{source}: progress")
        check_state(state.get("meter"), self.meter.state, f"{source}: meter")
        check_state(state.get("scheduler"), self.scheduler.state_dict(), f"{source}: scheduler", ("last_epoch",))
        self.progress, self.meter = Progress(**state["progress"]), Meter(state["meter"])
        try:
            groups = zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True)
            for theirs, ours in groups:
                check_state(theirs, ours, f"{source}: optimizer", ("params", "lr", "momentum", "weight_decay"))
            self.optimizer.load_state_dict(state["optimizer"])
            for parameter, values in self.optimizer.state.items():
                momentum = values.get("momentum_buffer")
                if momentum is not None and not (momentum.shape == parameter.shape and momentum.isfinite().all()):
                    raise ValueError(f"a momentum of shape {tuple(momentum.shape)}, or not finite")
            self.scheduler.load_state_dict(state["scheduler"])
            self.average.warmup_steps = int(state["warmup_steps"])
            set_rng_states(state["rng"])
            if not 0 <= self.progress.step <= len(self.loader):
                raise ValueError(f"step {self.progress.step} of an epoch of {len(self.loader)}")
            if not all(type(value) is float for value in [*self.progress.best, *self.meter.state["sums"].values()]):
                raise TypeError("a figure that is not a number")
        except ExperimentError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ExperimentError(f"{source}: cannot go on from it ({type(error).__name__}: {error})") from error

    def advance_schedule(self) -> None:
        """Set the next learning rate. No step since a resume, or only skipped ones, is nothing to warn of here."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step\\(\\)` before")
            self.scheduler.step()

    def check_finite(self, experiment: Experiment) -> None:
        """Raise Diverged where a weight is no number, so that no such checkpoint replaces a good one."""
        weights = {**self.model.state_dict(), **self.average.model.state_dict()}
        bad = [name for name, value in weights.items() if not value.isfinite().all()]
        if bad:
            where = f"epoch {self.progress.epoch + 1}, batch {self.progress.step}"
            raise Diverged(f"{bad[0]} is not finite ({where}); {last_good(experiment)}")


def check_state(state: Any, ours: dict[str, Any], source: str, needed: tuple[str, ...] | None = None) -> None:
    """Hold names and types in a part of a checkpoint against our own. Raises ExperimentError.

    needed: the names that must be there where PyTorch decides on the others, which differ between its versions.
    """
    if not isinstance(state, dict):
        raise ExperimentError(f"{source}: expected a dict, got a {type(state).__name__}")
    if needed is not None:
        ours = {name: value for name, value in ours.items() if name in state or name in needed}
        state = {name: value for name, value in state.items() if name in ours}
    check_settings(state, {name: type(value) for name, value in ours.items()}, source)


def last_good(experiment: Experiment) -> str:
    """Where to go back to, for messages."""
    latest = experiment.folder / "latest.pt"
    return f"the last good checkpoint is {latest}" if latest.exists() else "there is no good checkpoint yet"


def begin_stage(settings: dict[str, Any], index: int, model: nn.Module, data: Data, progress: Progress) -> Run:
    """The run at the start of stage number `index`, from the model's weights as they are."""
    stage = stages_of(settings)[index]
    device = next(model.parameters()).device
    mixed_in = {} if stage.name == "burn-in" else data.generated
    options = {"seed": settings["seed"], "augment": settings["augment"], "device": device, **mixed_in}
    loader = Loader(data.train, stage.batch_size, **options)
    # The average copies during the first 2.5 % of all steps.
    average = WeightAverage(model, tau=settings["tau"], warmup_steps=round(0.025 * stage.epochs * len(loader)))
    optimizer = build_optimizer(model, stage, settings)
    scheduler = SCHEDULES[stage.scheduler].make(optimizer, stage.lr, stage.epochs, len(loader))
    progress.stage = index
    # To look for anomalies waits for the GPU, which a captured graph cannot.
    graphs = CudaGraphs() if settings["cuda_graphs"] and not settings["detect_anomaly"] else None
    return Run(settings, stage, loader, model, average, optimizer, scheduler, progress, Meter(), graphs)


def prepare(settings: dict[str, Any], data: Data, loaded: Loaded | None) -> Run:
    """The run at its start, or where a checkpoint left it. Raises ValueError or OSError for what cannot be used."""
    device = flags.device(settings["device"], cuda_graphs=settings["cuda_graphs"])
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings["tf32"]
    random.seed(settings["seed"])
    np.random.seed(settings["seed"] % 2**32)  # noqa: NPY002  (whatever uses the global generator)
    torch.manual_seed(settings["seed"])

    model = build_model(settings)
    if settings["pretrained"] is not None and loaded is None:
        load_pretrained(model, settings["pretrained"])
    model.to(device)
    if settings["compile"]:
        model.compile()
    if loaded is None:
        return begin_stage(settings, 0, model, data, Progress())
    run = begin_stage(settings, loaded.state["progress"]["stage"], model, data, Progress())
    run.restore(loaded.state, loaded.path)
    return run


def train(run: Run, data: Data, experiment: Experiment, signals: Signals) -> None:
    """Go through the epochs and stages that are left of a run, writing to `experiment`.

    Raises Interrupted after a checkpoint, Diverged, or ValueError and OSError for files that cannot be written.
    """
    settings, stages = run.settings, stages_of(run.settings)
    while True:
        last_stage = run.progress.stage == len(stages) - 1
        while run.progress.epoch < run.stage.first + run.stage.epochs:
            try:
                train_epoch(run, experiment, signals)
                scores = validate(run.average.model, data.validation, settings, signals)
                scores |= track_dynamics(run, data.train)
            except Interrupted:
                run.check_finite(experiment)
                experiment.save_latest(run.checkpoint())
                raise
            end_epoch(run, scores, experiment, last_stage=last_stage)
        if last_stage:
            return
        run.model.load_state_dict(run.average.model.state_dict())
        run = begin_stage(settings, run.progress.stage + 1, run.model, data, run.progress)


def train_epoch(run: Run, experiment: Experiment, signals: Signals) -> None:
    """Take the steps of an epoch that are still to be taken. Raises Interrupted between two of them, and Diverged."""
    settings, stage, loader, progress, meter = run.settings, run.stage, run.loader, run.progress, run.meter
    device = loader.device
    options = loss_options(settings, stage.method)
    generator = torch.Generator(device)
    if stage.method != "clean":
        options["generator"] = generator
    if stage.method == "dyart":
        options["graphs"] = run.graphs
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.monotonic() - meter.state["seconds"]
    saved = time.monotonic()
    bar = tqdm(
        loader.epoch(progress.epoch, progress.step),
        desc=f"{stage.name} {progress.epoch + 1}/{stage.first + stage.epochs}",
        initial=progress.step,
        total=len(loader),
        leave=False,
    )
    with bar:
        for x, y in bar:
            if settings["channels_last"]:
                x = x.contiguous(memory_format=torch.channels_last)
            generator.manual_seed(step_seed(settings, stage.first, progress.total_steps))
            running = [buffer.clone() for buffer in run.model.buffers()]
            run.optimizer.zero_grad()
            # The first step that a run takes has the statistics of its batch as they are.
            first = progress.total_steps == progress.bad_steps
            with (
                batch_norm_momentum(run.model, 1.0 if first else None),
                anomalies_detected(settings["detect_anomaly"], run),
            ):
                with mixed_precision(settings["amp"], device.type):
                    loss, metrics = LOSSES[stage.method](run.model, x, y, **options)
                loss.backward()
            norm = nn.utils.clip_grad_norm_(run.model.parameters(), stage.clip_grad or math.inf).item()
            progress.step += 1
            progress.total_steps += 1
            if math.isfinite(norm) and math.isfinite(loss.item()):
                run.optimizer.step()
                run.average.update(run.model, (progress.epoch - stage.first) * len(loader) + progress.step)
                meter.add(metrics, norm, len(y))
                progress.bad_in_a_row = 0
            else:
                skip_step(run, running, loss.item(), norm, experiment)
            if SCHEDULES[stage.scheduler].every_step:
                run.advance_schedule()
            bar.set_postfix(meter.summary(), refresh=False)
            meter.state["seconds"] = time.monotonic() - started
            signals.check()
            if time.monotonic() - saved > 60 * (settings["checkpoint_minutes"] or math.inf):
                run.check_finite(experiment)
                experiment.save_latest(run.checkpoint())
                saved = time.monotonic()


@contextmanager
def anomalies_detected(enabled: bool, run: Run) -> Iterator[None]:
    """Let PyTorch print which operation's gradient became NaN, and raise Diverged there."""
    with torch.autograd.set_detect_anomaly(enabled):
        try:
            yield
        except RuntimeError as error:
            if not enabled or "returned nan values" not in str(error):
                raise
            where = f"epoch {run.progress.epoch + 1}, batch {run.progress.step + 1}"
            raise Diverged(f"{error} (--detect-anomaly, {where}; the traceback above shows its forward pass)") from None


def track_dynamics(run: Run, split: Split) -> dict[str, float | None]:
    """The share of negative speeds below 8/255, in the epochs that --track-dynamics asks for.

    Of the boundary of the trained model as it is, along minus the gradient of the stage's loss on a fixed batch, the
    first training images as they are.
    """
    every, method = run.settings["track_dynamics"], run.stage.method
    if not every or (run.progress.epoch + 1) % every:
        return {}
    rows, device = slice(run.stage.batch_size), run.loader.device
    x, y = to_input(split.images[rows]).to(device), split.labels[rows].to(device)
    share = negative_speed_share(
        run.model, x, y, method, norm=run.settings["norm"], options=loss_options(run.settings, method)
    )
    return {"negative_speeds": None if math.isnan(share) else share}


def skip_step(run: Run, running: list[Tensor], loss: float, norm: float, experiment: Experiment) -> None:
    """Leave out a step whose loss or gradient is not finite; too many in a row raise Diverged."""
    with torch.no_grad():
        for buffer, before in zip(run.model.buffers(), running, strict=True):
            buffer.copy_(before)
    progress = run.progress
    progress.bad_steps += 1
    progress.bad_in_a_row += 1
    rate = run.optimizer.param_groups[0]["lr"]
    where = f"epoch {progress.epoch + 1}, batch {progress.step}, lr {rate:.4g}"
    experiment.log(f"skipped a step: loss {loss:.4g}, gradient norm {norm:.4g} ({where})")
    if progress.bad_in_a_row >= MAX_BAD_STEPS:
        problem = f"loss or gradient not finite in {MAX_BAD_STEPS} steps in a row, up to {where}"
        raise Diverged(f"{problem}; {last_good(experiment)}")


def end_epoch(run: Run, scores: dict[str, float], experiment: Experiment, *, last_stage: bool) -> None:
    """Write down a finished epoch: metrics.csv and the log, best.pt and its like, and at last latest.pt."""
    run.check_finite(experiment)
    stage, progress, meter = run.stage, run.progress, run.meter
    progress.epoch += 1
    progress.step = 0
    row = {"epoch": progress.epoch, "stage": stage.name, "lr": run.optimizer.param_groups[0]["lr"]}
    row |= {**meter.means(), **meter.margin_quantiles(), **scores, "bad_steps": progress.bad_steps}
    row["seconds"] = round(meter.state["seconds"], 2)
    row["peak_memory_mib"] = round(peak_memory_mib(next(run.model.parameters()).device), 1)
    if not SCHEDULES[stage.scheduler].every_step:
        run.advance_schedule()
    run.meter = Meter()
    experiment.append_metrics(row)
    experiment.log(describe(row))
    weights = run.weights(scores)
    score = [scores["val_robust"], scores["val_clean"]]
    if last_stage and score >= progress.best:
        progress.best = score
        experiment.save_best(weights)
    if not last_stage and progress.epoch == stage.first + stage.epochs:
        experiment.save_named("burn_in", weights)
    every = run.settings["save_every"]
    if every and progress.epoch % every == 0:
        experiment.save_named(f"epoch_{progress.epoch:04d}", weights)
    experiment.save_latest(run.checkpoint())


def describe(row: dict[str, Any]) -> str:
    """The line that the log has of an epoch."""
    parts = [f"epoch {row['epoch']} ({row['stage']})", f"lr {row['lr']:.4g}", f"loss {row.get('loss', math.nan):.4f}"]
    parts += [
        f"{name.replace('_', ' ')} {row[name]:.1%}" for name in ("clean_accuracy", "found", "kept") if name in row
    ]
    if "margin_mean" in row:
        parts.append(f"margin {row['margin_mean']:.2f}/255")
    parts += [f"validation clean {row['val_clean']:.1%} robust {row['val_robust']:.1%}", f"{row['seconds']:.0f} s"]
    return ", ".join(parts)


def resume(folder: str, given: dict[str, Any], *, dry_run: bool) -> tuple[Experiment, dict[str, Any], Loaded | None]:
    """Open a folder to go on with: (experiment, settings, checkpoint or None where there is none yet).

    Changes nothing in it, and a dry run does not even lock it. Raises ExperimentError or ValueError for files that lie
    or do not fit each other, and for flags that would change what is trained.
    """
    experiment = Experiment.open(folder, lock=None if dry_run else "train", echo=tqdm.write)
    stored = check_stored(experiment.settings, experiment.folder / "args.yaml")
    for name in given.keys() - {"epochs", *PLACE, *ACTIONS}:
        if given[name] != stored[name]:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} {given[name]}: {folder} runs with {stored[name]}, and --resume cannot change it")
    loaded = experiment.load_latest()
    if loaded is not None:
        check_place(loaded, stored)
    settings = stored | {name: value for name, value in given.items() if name in {"epochs", *PLACE}}
    if settings["epochs"] != stored["epochs"]:
        scheduler, epochs = stored["scheduler"], settings["epochs"]
        if not SCHEDULES[scheduler].extendable:
            raise ValueError(
                f"--epochs {epochs}: the {scheduler} schedule of {folder} was laid out for {stored['epochs']} epochs; "
                "only constant ones can be extended"
            )
        done = 0 if loaded is None else loaded.state["progress"]["epoch"] - stored["burn_in_epochs"]
        if epochs < done:
            raise ValueError(f"--epochs {epochs}: {done} epochs are finished already")
    return experiment, settings, loaded


def check_place(loaded: Loaded, settings: dict[str, Any]) -> None:
    """Hold a checkpoint against the settings of its folder, and where it stands against their stages."""
    state, path = loaded.state, loaded.path
    check_state(state.get("progress"), vars(Progress()), f"{path}: progress")
    if not isinstance(state.get("settings"), dict):
        raise ExperimentError(f"{path}: no settings in it")
    theirs = LATER | state["settings"]
    may_differ = {*PLACE, "epochs"} if SCHEDULES[settings["scheduler"]].extendable else {*PLACE}
    for name in settings.keys() - may_differ:
        if name not in theirs or theirs[name] != settings[name]:
            raise ExperimentError(
                f"{path}: trained with {name} {theirs.get(name)}, args.yaml beside it says {settings[name]}"
            )
    stages, progress = stages_of(settings), state["progress"]
    index, epoch = progress["stage"], progress["epoch"]
    if not (0 <= index < len(stages) and stages[index].first <= epoch <= stages[index].first + stages[index].epochs):
        raise ExperimentError(f"{path}: stage {index}, epoch {epoch} is not a place in this run")


def rewind(experiment: Experiment, settings: dict[str, Any], loaded: Loaded | None) -> None:
    """Bring a folder back to where its checkpoint stands, and say so: settings of now, no rows of later epochs."""
    if settings != experiment.settings:
        experiment.update_settings(settings)
    finished = 0
    if loaded is None:
        experiment.log(f"resume: {experiment.folder} holds no checkpoint yet; starting from the beginning")
    else:
        finished = loaded.state["progress"]["epoch"]
        note = f" ({loaded.note})" if loaded.note else ""
        experiment.log(f"resume: from {loaded.path}, {finished} epochs finished{note}")
    experiment.truncate_metrics(lambda row: isinstance(row.get("epoch"), int) and row["epoch"] <= finished)


def check_early(settings: dict[str, Any], output_dir: str) -> None:
    """What can be told to be wrong before data is fetched and a folder made. Raises ValueError or OSError."""
    flags.device(settings["device"], cuda_graphs=settings["cuda_graphs"])
    model = build_model(settings)
    if settings["pretrained"] is not None:
        load_pretrained(model, settings["pretrained"])
    generated = settings["aux_data_filename"]
    if generated is not None and not Path(generated).is_file():
        raise FileNotFoundError(f"--aux-data-filename {generated}: no such file")
    flags.check_writable(output_dir, "--output-dir")


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, make or reopen the folder, train. The exit status: 0, 1 diverged, 128 + n after signal n."""
    given = parse(argv)
    dry_run, folder = given.pop("dry_run", False), given.pop("resume", None)
    output_dir = given.get("output_dir", "experiments")
    if folder is None:
        settings, loaded = resolve(given), None
        check_early(settings, output_dir)
    else:
        experiment, settings, loaded = resume(folder, given, dry_run=dry_run)
    if dry_run:
        print(yaml.safe_dump(settings, sort_keys=False), end="")
        return 0
    total = stages_of(settings)[-1]
    if loaded is not None and loaded.state["progress"]["epoch"] == total.first + total.epochs:
        tqdm.write(f"{folder}: nothing left to do, all {total.first + total.epochs} epochs are finished")
        return 0

    # A folder is made, or changed, only when everything that the run needs is there.
    data = load_splits(settings)
    run = prepare(settings, data, loaded)
    if folder is None:
        name = (given.get("name") or default_name(settings)) + given.get("name_extra", "")
        exist = {"rename": "rename", "stop": "error"}[given.get("if_exists", "rename")]
        experiment = Experiment.create(output_dir, name, settings, exist=exist, echo=tqdm.write)
    else:
        rewind(experiment, settings, loaded)
    with experiment:
        try:
            train(run, data, experiment, Signals())
        except Interrupted as stop:
            experiment.log(f"stopped by {signal.Signals(stop.args[0]).name}; go on with --resume {experiment.folder}")
            return 128 + stop.args[0]
        except Diverged as error:
            experiment.log(f"stopped: {error}")
            return 1
        experiment.log(f"finished: {experiment.folder}")
    return 0


if __name__ == "__main__":
    flags.run(main)
