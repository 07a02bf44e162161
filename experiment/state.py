"""All that a run is at one moment: saved, held against the settings, restored, rewound.

For train.py. What is wrong with a checkpoint that does not fit its run is a FileError of one line.
"""

import math
import os
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from data import Loader, content_of, find_data_dir, find_images, is_path
from dyart.averaging import WeightAverage
from dyart.graphs import CudaGraphs
from dyart.losses import SHARED
from dyart.margin import SEARCHES
from experiment import flags
from experiment.build import Stage, generated_content, stages_of
from experiment.checkpoint import digest
from experiment.folder import Experiment, Loaded, Onlooker
from experiment.metrics import Meter
from experiment.processes import Processes
from experiment.schedules import SCHEDULES
from experiment.settings import ACTIONS, LENGTHS, PLACE, check_settings, check_stored, upgraded, with_lengths
from experiment.train_flags import as_swish_models_do, flag_of
from experiment.weights import check_own
from models.own import content_of_own
from models.weights import load_weights
from storage.files import FileError
from storage.lock import LEASE

# --- Where a run stands -----------------------------------------------------------------------------------------------


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


# --- The run ----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a run is made of while a stage is under way; `checkpoint_to_resume` holds all of its state."""

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
    processes: Processes

    def checksum(self) -> str:
        """What all processes of a run must begin with alike: where it stands, its weights, its labels."""
        state = self.checkpoint_to_resume()
        parts = ("model", "average", "optimizer", "scheduler", "progress")
        return digest({name: state[name] for name in parts} | {"labels": self.loader.labels})

    def checkpoint_to_evaluate(self, scores: dict[str, float]) -> dict[str, Any]:
        """A checkpoint to evaluate."""
        weights = {"settings": self.settings, "model": self.model.state_dict()}
        weights["average"] = self.average.model.state_dict()
        return weights | {"epoch": self.progress.epoch, "stage": self.stage.name, "validation": scores}

    def checkpoint_to_resume(self) -> dict[str, Any]:
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
        """Put back what `checkpoint_to_resume` gave, but the settings. Raises ValueError for what does not fit."""
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
        except FileError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise FileError(f"{source}: cannot go on from it ({type(error).__name__}: {error})") from error

    def advance_schedule(self) -> None:
        """Set the next learning rate. No step since a resume, or only skipped ones, is nothing to warn of here."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step\\(\\)` before")
            self.scheduler.step()


def check_state(state: Any, ours: dict[str, Any], source: str, needed: tuple[str, ...] | None = None) -> None:
    """Hold names and types in a part of a checkpoint against our own. Raises FileError.

    needed: the names that must be there where PyTorch decides on the others, which differ between its versions.
    """
    if not isinstance(state, dict):
        raise FileError(f"{source}: expected a dict, got a {type(state).__name__}")
    if needed is not None:
        ours = {name: value for name, value in ours.items() if name in state or name in needed}
        state = {name: value for name, value in state.items() if name in ours}
    check_settings(state, {name: type(value) for name, value in ours.items()}, source)


# --- A folder to begin with, or to go on with -------------------------------------------------------------------------


def begin(output_dir: str, name: str, settings: dict[str, Any], exist: str, processes: Processes) -> Experiment:
    """Make the folder of a new run, as `Experiment.create`: one of its processes does, the others look on."""
    if processes.rank:
        return Onlooker(Path(processes.meet()[0]), settings, tqdm.write, None)
    experiment = Experiment.create(output_dir, name, settings, exist=exist, echo=tqdm.write)
    processes.meet(str(experiment.folder))
    return experiment


def begun(output_dir: str, name: str, settings: dict[str, Any], processes: Processes) -> str | None:
    """The folder of this name where it has been begun with these settings; None where it has not.

    Raises FileError where it has been begun with others.
    """
    folder = Path(output_dir) / name
    there = processes.meet(str(folder) if not processes.rank and (folder / "args.yaml").exists() else "")[0]
    if not there:
        return None
    stored = Experiment.open(there).settings
    differ = [name for name in settings.keys() & stored.keys() - {*PLACE, "rules"} if settings[name] != stored[name]]
    if differ:
        names = ", ".join(f"{flag_of(name)} {flags.plain(stored[name])}" for name in sorted(differ))
        raise FileError(f"--if-exists resume: {there} is a run with other settings, {names}: choose another --name")
    return there


def resume(
    folder: str, given: dict[str, Any], processes: Processes, *, dry_run: bool
) -> tuple[Experiment, dict[str, Any], Loaded | None]:
    """Open a folder to go on with: (experiment, settings, checkpoint or None where there is none yet).

    Changes nothing in it, and a dry run does not even lock it. What --if-exists resume starts by itself waits for the
    lock of a machine that may be lost. Raises FileError or ValueError for files that lie or do not fit each other, and
    for flags that would change what is trained.
    """
    kind, lock = (Onlooker, None) if processes.rank else (Experiment, None if dry_run else "train")
    patience = LEASE if given.get("if_exists") == "resume" else 0.0
    experiment = kind.open(folder, lock=lock, echo=tqdm.write, patience=patience)
    try:
        return experiment, *_to_go_on_with(experiment, given)
    except BaseException:
        experiment.close()
        raise


def _to_go_on_with(experiment: Experiment, given: dict[str, Any]) -> tuple[dict[str, Any], Loaded | None]:
    stored = check_stored(experiment.settings, experiment.folder / "args.yaml")
    # Where it was 8 that meant 8.0, before lengths meant the same everywhere, 8 changes nothing.
    as_before = {name: stored[name] for name in LENGTHS if _is_number(given.get(name), stored[name])}
    given = with_lengths(given | as_before, stored["norm"])
    check_own(stored, experiment.folder)
    if stored["normalize"]:
        given = as_swish_models_do(given, stored["model"])
    moved = moved_data(given, stored, experiment)
    for name in given.keys() - {"epochs", *PLACE, *ACTIONS} - moved.keys():
        if given[name] != stored[name]:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} {given[name]}: {experiment.folder} runs with {stored[name]}, and --resume cannot change it"
            )
    loaded = experiment.load_latest()
    if loaded is not None:
        check_place(loaded, stored)
    settings = stored | {name: value for name, value in given.items() if name in {"epochs", *PLACE}} | moved
    settings["model_content"] = content_of_own(stored["model"])
    if settings["cuda_graphs"] and settings["search"] == SHARED:
        searches = " or ".join(SEARCHES)
        raise ValueError(f"--cuda-graphs: goes with --search {searches}, and {experiment.folder} runs with {SHARED}")
    if "data_dir" not in given:
        settings["data_dir"] = str(find_data_dir(stored["dataset"], stored["data_dir"]))
    if settings["epochs"] != stored["epochs"]:
        scheduler, epochs = stored["scheduler"], settings["epochs"]
        if not SCHEDULES[scheduler].extendable:
            raise ValueError(
                f"--epochs {epochs}: the {scheduler} schedule of {experiment.folder} was laid out for "
                f"{stored['epochs']} epochs; only constant ones can be extended"
            )
        done = 0 if loaded is None else loaded.state["progress"]["epoch"] - stored["burn_in_epochs"]
        if epochs < done:
            raise ValueError(f"--epochs {epochs}: {done} epochs are finished already")
    return settings, loaded


def _is_number(text: Any, value: float | None) -> bool:
    return isinstance(text, str) and value is not None and flags.number()(text) == value


def moved_data(given: Mapping[str, Any], stored: Mapping[str, Any], experiment: Experiment) -> dict[str, Any]:
    """The settings of own images and generated data that lie elsewhere now.

    Raises ValueError where they are not those of the run.
    """
    moved = {}
    dataset, data_dir = given.get("dataset", stored["dataset"]), given.get("data_dir", stored["data_dir"])
    if dataset != stored["dataset"] and is_path(dataset) and is_path(stored["dataset"]):
        find_images(dataset, data_dir, stored["image_size"], stored["dataset_content"])
        moved["dataset"] = dataset
    path = given.get("aux_data_filename")
    if path is None or stored["aux_data_filename"] in (None, path):
        return moved
    known = stored["aux_data_content"]
    if known is None and os.path.isfile(stored["aux_data_filename"]):
        known = content_of(stored["aux_data_filename"])  # of a run from before that was kept, which may be asked still
    content = generated_content({"aux_data_filename": path, "aux_data_content": known})
    if known is None:
        tqdm.write(f"{experiment.folder} does not know which generated data it had: {path} is taken for it")
    return moved | {"aux_data_filename": path, "aux_data_content": content}


def check_place(loaded: Loaded, settings: dict[str, Any]) -> None:
    """Hold a checkpoint against the settings of its folder, and where it stands against their stages."""
    state, path = loaded.state, loaded.path
    check_state(state.get("progress"), vars(Progress()), f"{path}: progress")
    if not isinstance(state.get("settings"), dict):
        raise FileError(f"{path}: no settings in it")
    theirs = upgraded(state["settings"])
    # Those of data stand beside its content.
    may_differ = {*PLACE, "aux_data_filename"} | ({"dataset"} if is_path(settings["dataset"]) else set())
    may_differ |= {"epochs"} if SCHEDULES[settings["scheduler"]].extendable else set()
    for name in settings.keys() - may_differ:
        if name not in theirs or theirs[name] != settings[name]:
            raise FileError(
                f"{path}: trained with {name} {theirs.get(name)}, args.yaml beside it says {settings[name]}"
            )
    stages, progress = stages_of(settings), state["progress"]
    index, epoch = progress["stage"], progress["epoch"]
    if not (0 <= index < len(stages) and stages[index].epochs_before <= epoch <= stages[index].end):
        raise FileError(f"{path}: stage {index}, epoch {epoch} is not a place in this run")


def check_metrics(experiment: Experiment) -> None:
    """Refuse a metrics.csv whose rows are not of epochs, so that none of them is lost without a word."""
    for number, row in enumerate(experiment.read_metrics(), start=1):
        epoch = row.get("epoch")
        # A spreadsheet writes 1.0, or 1,0 in other countries.
        if not isinstance(epoch, int | float) or not math.isfinite(epoch) or epoch != int(epoch):
            path = experiment.folder / "metrics.csv"
            raise FileError(f"{path}: row {number} has {epoch!r} as its epoch; mend the file, or move it away")


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
    dropped = experiment.truncate_metrics(lambda row: row["epoch"] <= finished)
    if dropped:
        experiment.log(f"resume: {dropped} rows of later epochs taken off metrics.csv")
    missing = finished - len({row["epoch"] for row in experiment.read_metrics()})
    if missing > 0:
        experiment.log(f"warning: metrics.csv lacks the rows of {missing} of {finished} finished epochs")
