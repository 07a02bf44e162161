"""Train a robust classifier: a clean burn-in, then DyART or a baseline, into an experiment folder.

    python train.py --dataset cifar10 --burn-in-epochs 10 --epochs 200

The order of the file is the order of a run: stages and data, one step, one epoch, the run. Flags are in settings.py.
"""

import math
import random
import resource
import signal
import time
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
from dyart.experiment import Experiment, ExperimentError, load_checkpoint
from dyart.losses import LOSSES
from dyart.schedules import SCHEDULES
from models.weights import load_weights
from models.wide_resnet import WideResNet
from settings import ACTIONS, PLACE, build_model, check_stored, default_name, loss_options, parse, resolve

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


class Splits(NamedTuple):
    """The images of a run, and how many make an epoch with generated data: the held-out ones count, as in the paper."""

    train: Split
    validation: Split
    epoch_size: int


def load_splits(settings: dict[str, Any]) -> Splits:
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
    return Splits(train, Split(validation.images[:size], validation.labels[:size]), epoch_size)


def open_generated(settings: dict[str, Any], epoch_size: int) -> dict[str, Any]:
    """How a Loader mixes in the generated data that the settings name; nothing where they name none."""
    if settings["aux_data_filename"] is None:
        return {}
    info = DATASETS[settings["dataset"]]
    shape = (info.image_size, info.image_size, 3)
    auxiliary = load_auxiliary(settings["aux_data_filename"], image_shape=shape, num_classes=info.num_classes)
    steps = math.ceil(epoch_size / settings["batch_size"])
    return {"auxiliary": auxiliary, "auxiliary_fraction": settings["unsup_fraction"], "steps_per_epoch": steps}


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
    """What a run is made of while a stage is under way: all that a checkpoint holds."""

    settings: dict[str, Any]
    model: nn.Module
    average: WeightAverage
    optimizer: Optimizer
    scheduler: LRScheduler
    progress: Progress
    meter: Meter

    def weights(self, stage: Stage, scores: dict[str, float]) -> dict[str, Any]:
        """A checkpoint to evaluate."""
        weights = {"settings": self.settings, "model": self.model.state_dict()}
        weights["average"] = self.average.model.state_dict()
        return weights | {"epoch": self.progress.epoch, "stage": stage.name, "validation": scores}

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

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `checkpoint` gave, but for the settings."""
        load_weights(self.model, state["model"], "the checkpoint's weights")
        load_weights(self.average.model, state["average"], "the checkpoint's average")
        self.average.warmup_steps = state["warmup_steps"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.progress, self.meter = Progress(**state["progress"]), Meter(state["meter"])
        set_rng_states(state["rng"])


def train(
    experiment: Experiment,
    settings: dict[str, Any],
    splits: Splits,
    generated: dict[str, Any],
    state: dict[str, Any] | None,
    signals: Signals,
) -> None:
    """Run the stages of `settings` in `experiment`, from the start or from the checkpoint `state`.

    Raises Interrupted after a checkpoint, Diverged, or ValueError and OSError for files that cannot be used.
    """
    device = flags.device(settings["device"])
    torch.backends.cudnn.deterministic = True
    random.seed(settings["seed"])
    torch.manual_seed(settings["seed"])

    model = build_model(settings)
    if settings["pretrained"] is not None and state is None:
        load_pretrained(model, settings["pretrained"])
    model.to(device)
    if settings["compile"]:
        model.compile()

    run = None
    stages = stages_of(settings)
    for index, stage in enumerate(stages):
        if state is not None and index < state["progress"]["stage"]:
            continue
        if run is not None:
            model.load_state_dict(run.average.model.state_dict())
        mixed_in = {} if stage.name == "burn-in" else generated
        data = {"seed": settings["seed"], "augment": settings["augment"], "device": device, **mixed_in}
        loader = Loader(splits.train, stage.batch_size, **data)
        # The average copies during the first 2.5 % of all steps.
        average = WeightAverage(model, tau=settings["tau"], warmup_steps=round(0.025 * stage.epochs * len(loader)))
        optimizer = build_optimizer(model, stage, settings)
        scheduler = SCHEDULES[stage.scheduler].make(optimizer, stage.lr, stage.epochs, len(loader))
        progress = Progress() if run is None else run.progress
        progress.stage = index
        run = Run(settings, model, average, optimizer, scheduler, progress, Meter())
        if state is not None:
            run.restore(state)
            state = None

        while run.progress.epoch < stage.first + stage.epochs:
            try:
                train_epoch(run, stage, loader, experiment, signals)
                scores = validate(run.average.model, splits.validation, settings, signals)
            except Interrupted:
                experiment.save_latest(run.checkpoint())
                raise
            end_epoch(run, stage, scores, experiment, last_stage=stage is stages[-1])


def train_epoch(run: Run, stage: Stage, loader: Loader, experiment: Experiment, signals: Signals) -> None:
    """Take the steps of an epoch that are still to be taken. Raises Interrupted between two of them, and Diverged."""
    settings, progress, meter, device = run.settings, run.progress, run.meter, loader.device
    options = loss_options(settings, stage.method)
    generator = torch.Generator(device)
    if stage.method != "clean":
        options["generator"] = generator
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings["amp"] == "bf16")
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
            # The first step of a run takes the statistics of its batch as they are.
            with batch_norm_momentum(run.model, None if progress.total_steps else 1.0):
                with autocast:
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
                run.scheduler.step()
            bar.set_postfix(meter.summary(), refresh=False)
            meter.state["seconds"] = time.monotonic() - started
            signals.check()
            if time.monotonic() - saved > 60 * (settings["checkpoint_minutes"] or math.inf):
                experiment.save_latest(run.checkpoint())
                saved = time.monotonic()


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
        latest = experiment.folder / "latest.pt"
        good = f"the last good checkpoint is {latest}" if latest.exists() else "there is no good checkpoint yet"
        raise Diverged(f"loss or gradient not finite in {MAX_BAD_STEPS} steps in a row, up to {where}; {good}")


def end_epoch(run: Run, stage: Stage, scores: dict[str, float], experiment: Experiment, *, last_stage: bool) -> None:
    """Write down a finished epoch: metrics.csv and the log, best.pt and its like, and at last latest.pt."""
    progress, meter = run.progress, run.meter
    progress.epoch += 1
    progress.step = 0
    row = {"epoch": progress.epoch, "stage": stage.name, "lr": run.optimizer.param_groups[0]["lr"]}
    row |= {**meter.means(), **meter.margin_quantiles(), **scores, "bad_steps": progress.bad_steps}
    row["seconds"] = round(meter.state["seconds"], 2)
    row["peak_memory_mib"] = round(peak_memory_mib(next(run.model.parameters()).device), 1)
    if not SCHEDULES[stage.scheduler].every_step:
        run.scheduler.step()
    run.meter = Meter()
    experiment.append_metrics(row)
    experiment.log(describe(row))
    weights = run.weights(stage, scores)
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


def resume(given: dict[str, Any], *, dry_run: bool) -> tuple[Experiment, dict[str, Any], dict[str, Any] | None]:
    """Open a folder to go on with: (experiment, settings, checkpoint or None where there is none yet).

    A dry run only reads.
    """
    given = dict(given)
    folder = given.pop("resume")
    experiment = Experiment.open(folder, lock=None if dry_run else "train")
    settings = dict(experiment.settings)
    check_stored(settings, experiment.folder / "args.yaml")
    for name in set(given) - {"epochs", *PLACE, *ACTIONS}:
        if given[name] != settings[name]:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} {given[name]}: {folder} runs with {settings[name]}, and --resume cannot change it"
            )
    loaded = experiment.load_latest()
    epochs = given.get("epochs", settings["epochs"])
    if epochs != settings["epochs"]:
        if not SCHEDULES[settings["scheduler"]].extendable:
            raise ValueError(
                f"--epochs {epochs}: the {settings['scheduler']} schedule of {folder} was laid out for "
                f"{settings['epochs']} epochs; only constant ones can be extended"
            )
        done = loaded.state["progress"]["epoch"] - settings["burn_in_epochs"] if loaded else 0
        if epochs < done:
            raise ValueError(f"--epochs {epochs}: {done} epochs are finished already")
    settings |= {name: value for name, value in given.items() if name in {"epochs", *PLACE}}
    if dry_run:
        return experiment, settings, None
    if settings != experiment.settings:
        experiment.update_settings(settings)
    if loaded is None:
        experiment.log(f"resume: {folder} holds no checkpoint yet; starting from the beginning")
        experiment.truncate_metrics(0)
        return experiment, settings, None
    finished = loaded.state["progress"]["epoch"]
    note = f" ({loaded.note})" if loaded.note else ""
    experiment.log(f"resume: from {loaded.path}, {finished} epochs finished{note}")
    experiment.truncate_metrics(lambda row: row["epoch"] is not None and row["epoch"] <= finished)
    return experiment, settings, loaded.state


def check_early(settings: dict[str, Any], output_dir: str) -> None:
    """What can be told to be wrong before data is fetched and a folder made. Raises ValueError or OSError."""
    flags.device(settings["device"])
    model = build_model(settings)
    if settings["pretrained"] is not None:
        load_pretrained(model, settings["pretrained"])
    flags.check_writable(output_dir, "--output-dir")


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, make or reopen the folder, train. The exit status: 0, 1 diverged, 128 + n after signal n."""
    given = parse(argv)
    dry_run = given.pop("dry_run", False)
    output_dir = given.get("output_dir", "experiments")
    if "resume" in given:
        experiment, settings, state = resume(given, dry_run=dry_run)
    else:
        experiment, settings, state = None, resolve(given), None
        check_early(settings, output_dir)
    if dry_run:
        print(yaml.safe_dump(settings, sort_keys=False), end="")
        return 0
    signals = Signals()
    splits = load_splits(settings)
    generated = open_generated(settings, splits.epoch_size)
    if experiment is None:
        name = given.get("name") or default_name(settings)
        exist = {"rename": "rename", "stop": "error"}[given.get("if_exists", "rename")]
        name += given.get("name_extra", "")
        experiment = Experiment.create(output_dir, name, settings, exist=exist, echo=tqdm.write)
    try:
        train(experiment, settings, splits, generated, state, signals)
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
