"""Evaluate checkpoints by AutoAttack (Croce & Hein, 2020) and keep the figures.

    python eval.py experiments/NAME --eps 2 4 8 --n 1000
    python eval.py weights.pt --model wrn-28-10-swish --dataset cifar10 --eps 8

Finished evaluations are records in autoattack.json. What an unfinished one has found is written after every batch, to
autoattack.unfinished.json: the same command goes on from there, to the same figures as in one go.
"""

import argparse
import contextlib
import fcntl
import hashlib
import logging
import math
import multiprocessing
import os
import pickle
import platform
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyautoattack
import torch
import yaml
from pyautoattack import AutoAttack
from pyautoattack.checks import check_square_sr
from torch import Tensor, nn
from tqdm import tqdm

import flags
from data import DATASETS, DEFAULT_DATA_DIR, Split, load_data, to_input
from dyart.experiment import Experiment, ExperimentError, check_settings, load_checkpoint, read_json, write_json
from models.weights import load_weights
from settings import build_model, dataset_name

CUSTOM = ["apgd-ce", "apgd-t", "fab-t"]
VERSIONS = {"standard": [*CUSTOM, "square"], "custom": CUSTOM}
# Where our checkpoints, and those of others, keep which weights.
WEIGHTS = {
    "average": ["average", "wa_model", "model_state_dict"],
    "raw": ["model", "unaveraged_model", "unaveraged_model_state_dict"],
}
MODEL_SETTINGS = {"dataset": str, "model": str, "group_norm": bool, "normalize": bool}

# --- Flags: after a clear name stands the released code's spelling of the same ----------------------------------------


def build_parser() -> flags.Parser:
    """The flags of eval.py."""
    p = flags.Parser(prog="eval.py", description=__doc__.splitlines()[0])
    p.add_argument("target", metavar="FOLDER|FILE", nargs="?", help="an experiment folder, or a bare checkpoint file")
    p.add_argument("--fname_input", dest="target_flag", default=None, help=argparse.SUPPRESS)

    positive = flags.whole(least=1)
    g = p.add_argument_group("what is evaluated")
    g.add_argument("--checkpoint", metavar="NAME", nargs="+", default=None, help="files of the folder (best.pt)")
    g.add_argument("--weights", choices=list(WEIGHTS), default="average", help="of a file that holds both")
    g.add_argument("--n", type=flags.optional(positive), default=None, help="the first N test images; none takes all")
    g.add_argument("--data-dir", default=None, help="where prepared datasets lie (where training took them from)")

    g = p.add_argument_group("the attack")
    g.add_argument("--eps", "--eps_eval", nargs="+", default=["8"], help="in 1/255 for Linf, as it is for L2; or a/b")
    g.add_argument("--norm", "--norm_attack", choices=["Linf", "L2"], default="Linf", help="of the perturbation")
    g.add_argument("--version", "-v", choices=list(VERSIONS), default="standard", help="custom leaves Square out")
    g.add_argument("--batch-size", "--batch_size_for_eval", type=positive, default=250, help="images a batch")
    g.add_argument("--seed", type=flags.whole(), default=0, help="of the attacks' random numbers")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    g.add_argument("--jobs", type=positive, default=1, help="evaluations at a time, which share the cores")
    flags.add_switch(g, "--again", default=False, help="evaluate also what is finished, and replace its record")
    flags.add_switch(g, "--dry-run", default=False, help="print the resolved settings as YAML and stop")

    g = p.add_argument_group("for a file without settings in it, as others write them")
    g.add_argument("--model", default=None, help="wrn-D-W[-swish], preact-resnetD[-swish] or resnetD")
    g.add_argument("--dataset", "--data", type=dataset_name, default=None, help=", ".join(DATASETS) + " (cifar10)")
    flags.add_switch(g, "--group-norm", "--GroupNorm", default=None, help="GroupNorm in the place of BatchNorm")
    flags.add_switch(g, "--normalize", default=None, help="normalize inside the model; the Swish models always do")
    return p


class Radius(NamedTuple):
    """A perturbation's radius ε: its value in units of pixels in [0,1], and how it is written."""

    eps: float
    text: str


def parse_eps(text: str, norm: str) -> Radius:
    """ε from a flag: for Linf a number in 1/255 ("8") or a fraction ("8/255"), for L2 the value itself.

    Raises ValueError for what is no number, ε <= 0, and for Linf above 1 or so small that 1/255 cannot be meant.
    """
    try:
        value = flags.number(above=0)(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--eps: {error}, or a fraction like 8/255") from None
    if norm == "L2":
        return Radius(value, f"{value:g}")
    if "/" not in text:
        if value < 0.1:
            raise ValueError(
                f"--eps {text}: for Linf this means {text}/255; if it is a share of 1, write {255 * value:g}"
            )
        value /= 255
    if value > 1:
        raise ValueError(f"--eps {text}: for Linf at most 255, which means 255/255, is accepted")
    return Radius(value, f"{255 * value:g}/255")


# --- Checkpoints ------------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """What is evaluated: a model with its weights, in eval mode, and what tells it from others in a record."""

    model: nn.Module
    identity: dict[str, Any]
    settings: Mapping[str, Any]  # of the run that made it; of others' files there are none


def load_candidate(path: Path, weights: str, given: Mapping[str, Any], log: Callable[[str], Any]) -> Candidate:
    """The model of a checkpoint file: one of ours, which knows its settings, or others' with the settings as flags.

    given: the flags `model`, `dataset`, `group_norm` and `normalize`, None where they were left out. Raises ValueError.
    """
    before = None
    while before != (digest := sha256(path)):  # Training may replace the file while it is read.
        before, state = digest, load_checkpoint(path, foreign=True)
    settings = model_settings(state, path, given)
    kind, state_dict = pick_weights(state, weights, path)

    # In the memory format of its training, which is the quicker one on the CPU.
    channels_last = state.get("settings", {}).get("channels_last") is True
    model = build_model({**settings, "channels_last": channels_last})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_weights(model, state_dict, str(path))
    for warning in caught:
        log(f"warning: {warning.message}")
    model.eval().requires_grad_(False)
    identity = {**settings, "checkpoint": path.name, "sha256": digest, "weights": kind}
    return Candidate(model, identity, state.get("settings", {}))


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as `sha256sum` prints it."""
    content = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
    return content.hexdigest()


def model_settings(state: Mapping[str, Any], path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make a checkpoint's model and choose its data: its own, or where it has none the flags'."""
    if "settings" not in state:
        if given["model"] is None:
            raise ValueError(f"{path} has no settings in it: say what it is with --model (and --dataset, --normalize)")
        defaults = {"dataset": "cifar10", "group_norm": False, "normalize": False}
        return {name: defaults[name] if given[name] is None else given[name] for name in MODEL_SETTINGS}
    if not isinstance(state["settings"], Mapping):
        raise ExperimentError(f"{path}: its settings are a {type(state['settings']).__name__}")
    settings = {name: state["settings"][name] for name in MODEL_SETTINGS if name in state["settings"]}
    check_settings(settings, MODEL_SETTINGS, path)
    for name, value in given.items():
        if value is not None and value != settings[name]:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {value}: {path} was trained with {settings[name]}; leave the flag out")
    if settings["dataset"] not in DATASETS:
        raise ExperimentError(f"{path}: unknown dataset {settings['dataset']!r}; known are {', '.join(DATASETS)}")
    return settings


def pick_weights(state: Mapping[str, Any], wanted: str, path: Path) -> tuple[str, Mapping[str, Tensor]]:
    """The weights that were asked for, with their kind; a bare state dict is of the kind "only"."""
    held = {
        kind: key for kind, keys in WEIGHTS.items() for key in reversed(keys) if isinstance(state.get(key), Mapping)
    }
    if not held and wanted == "average":
        return "only", state.get("state_dict", state)
    if wanted not in held:
        raise ValueError(f"--weights {wanted}: {path} holds {' and '.join(held) or 'a single set of weights'} only")
    return wanted, state[held[wanted]]


def load_test(candidate: Candidate, data_dir: str | None) -> Split:
    """The test set of a checkpoint: below `data_dir`, or where it was trained from if that is there."""
    if data_dir is None:
        trained_from = candidate.settings.get("data_dir")
        data_dir = trained_from if isinstance(trained_from, str) and Path(trained_from).is_dir() else DEFAULT_DATA_DIR
    return load_data(candidate.identity["dataset"], data_dir)[1]


# --- Results ----------------------------------------------------------------------------------------------------------

IDENTITY = [*MODEL_SETTINGS, "checkpoint", "sha256", "weights", "norm", "eps", "eps_text", "version", "n", "seed"]
IDENTITY += ["batch_size"]  # The attacks draw their random numbers a batch at a time.


def identity_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a record that say what was evaluated, and how; all others are what came out."""
    return {name: record[name] for name in IDENTITY}


class Results:
    """autoattack.json and what is unfinished, in a folder or beside a file: PREFIX.json and PREFIX.unfinished.json.

    Both hold a list of records. They are replaced as a whole, so that a crash leaves the old or the new ones. For one
    process at a time.
    """

    def __init__(self, prefix: Path):
        self.path = prefix.with_name(f"{prefix.name}.json")
        self.unfinished_path = prefix.with_name(f"{prefix.name}.unfinished.json")
        self.records = self._read(self.path, ["test_size", "clean_accuracy", "robust_accuracy", "date"])
        unfinished = self._read(self.unfinished_path, ["date"])
        # A crash between the writing of a record and the removal of its progress leaves both.
        finished = [(identity_of(record), record["date"]) for record in self.records]
        self._unfinished = [record for record in unfinished if (identity_of(record), record["date"]) not in finished]

    @staticmethod
    def _read(path: Path, needed: list[str]) -> list[dict[str, Any]]:
        records = read_json(path) if path.exists() else []
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise ExperimentError(f"{path}: not a list of records")
        for name in [*IDENTITY, *needed]:
            if not all(name in record for record in records):
                raise ExperimentError(f"{path}: a record without {name!r}; move the file away to start a new one")
            if name.endswith("_accuracy") and not all(isinstance(record[name], int | float) for record in records):
                raise ExperimentError(f"{path}: a record whose {name!r} is no number; move the file away")
        return records

    def finished(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The finished record of `identity`, or None."""
        return next((record for record in self.records if identity_of(record) == identity), None)

    def unfinished(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The record of `identity` as an interrupted evaluation left it, or None."""
        return next((record for record in self._unfinished if identity_of(record) == identity), None)

    def save(self, record: dict[str, Any]) -> None:
        """Keep an unfinished record."""

        def is_current(other: dict[str, Any]) -> bool:
            replaced = other["checkpoint"] == record["checkpoint"] and other["sha256"] != record["sha256"]
            return not replaced and identity_of(other) != identity_of(record)

        self._unfinished = [*filter(is_current, self._unfinished), record]
        write_json(self.unfinished_path, self._unfinished)

    def finish(self, record: dict[str, Any]) -> None:
        """Add a finished record, in the place of an earlier one of the same identity."""
        others = [other for other in self.records if identity_of(other) != identity_of(record)]
        write_json(self.path, [*others, record])
        self.records = [*others, record]
        self._unfinished = [other for other in self._unfinished if identity_of(other) != identity_of(record)]
        if self._unfinished:
            write_json(self.unfinished_path, self._unfinished)
        else:
            self.unfinished_path.unlink(missing_ok=True)


# --- AutoAttack -------------------------------------------------------------------------------------------------------


def autoattack(model: nn.Module, *, norm: str, eps: float, seed: int, num_classes: int, device: Any) -> AutoAttack:
    """AutoAttack's standard version for a model in eval mode, ready for `attacks_to_run` to name one attack of it.

    It attacks the nine likeliest other classes, or all where there are fewer. Raises ValueError below 4 classes, where
    the targeted attacks have no loss.
    """
    if num_classes < 4:
        raise ValueError(f"{num_classes} classes: AutoAttack's targeted attacks need at least 4")
    attack = AutoAttack(model, norm=norm, eps=eps, seed=seed, version="standard", device=device)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, num_classes - 1)
    return attack


class Keeper(Protocol):
    """What an evaluation needs of `Results`."""

    unfinished_path: Path

    def unfinished(self, identity: dict[str, Any]) -> dict[str, Any] | None: ...
    def save(self, record: dict[str, Any]) -> None: ...
    def finish(self, record: dict[str, Any]) -> None: ...


def evaluate(
    model: nn.Module,
    test: Split,
    identity: dict[str, Any],
    results: Keeper,
    device: torch.device,
    log: Callable[[str], Any],
    bar_position: int | None = None,
) -> dict[str, Any]:
    """Attack the first images of `test`, going on where an interrupted evaluation stopped; returns the record.

    bar_position: on which line of the terminal the progress bar stands, where others stand too.

    pyautoattack's own state file cannot serve for that. Version 0.2.0 writes the set of attacks as a string, which
    never equals the set that it is compared with, so that restoring always fails; and it would regroup the images of
    a half-done attack into other batches, with other random starts. So every batch of every attack is one call, which
    is seeded by itself, on the images that the attacks before have left: the same calls as AutoAttack makes in one go.
    """
    n, batch_size, attacks = identity["n"], identity["batch_size"], VERSIONS[identity["version"]]
    name = f"{identity['checkpoint']} {identity['norm']} {identity['eps_text']}"
    model = model.to(device)
    environment = {"device": device_name(device), "versions": versions()}

    def batch(rows: Tensor) -> tuple[Tensor, Tensor]:
        return to_input(test.images[rows]).to(device), test.labels[rows].to(device)

    record = results.unfinished(identity)
    if record is not None and {key: record.get(key) for key in environment} != environment:
        log(f"{name}: what an interrupted evaluation left is of another device or other packages; starting again")
        record = None
    if record is None:
        correct = torch.cat([_is_correct(model, *batch(rows)) for rows in torch.arange(n).split(batch_size)])
        record = {**identity, "test_size": len(test.labels), "clean_accuracy": correct.sum().item() / n}
        record |= {"robust_accuracy_after": {}, "seconds": {}, "warnings": [], **environment}
        record |= {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **_progress(correct)}
        results.save(record)
        log(f"{name}: clean accuracy {record['clean_accuracy']:.2%} of {n} images")
    else:
        check_progress(record, results)
        done = list(record["robust_accuracy_after"])
        last = (
            [f"batch {record['batches']} of {attacks[len(done)]}"] if record["batches"] else ["the clean images", *done]
        )
        log(f"{name}: interrupted before, going on after {last[-1]}")

    attacker = autoattack(
        model,
        norm=identity["norm"],
        eps=identity["eps"],
        seed=identity["seed"],
        num_classes=DATASETS[identity["dataset"]].num_classes,
        device=device,
    )
    for attack in attacks:
        if attack in record["robust_accuracy_after"]:
            continue
        robust = torch.tensor([flag == "1" for flag in record["robust"]])
        standing = robust.nonzero().flatten()
        batches = standing.split(batch_size) if len(standing) else ()
        attacker.attacks_to_run = [attack]
        record["seconds"].setdefault(attack, 0.0)
        with (
            _bar(f"{name} {attack}", batches, record["batches"], model, bar_position) as bar,
            _warnings(record, attacker.logger, log),
        ):
            for rows in batches[record["batches"] :]:
                bar.set_postfix_str(f"robust {(robust.sum().item() - len(record['broken'])) / n:.2%}")
                started = time.monotonic()
                x, y = batch(rows)
                _, predicted = attacker.run_standard_evaluation(x, y, batch_size=len(rows))
                record["broken"] += rows[(predicted != y).cpu()].tolist()
                record["batches"] += 1
                record["seconds"][attack] += time.monotonic() - started
                results.save(record)
                bar.update()
        robust[record["broken"]] = False
        accuracy = robust.sum().item() / n
        record |= _progress(robust)
        record["robust_accuracy_after"][attack] = accuracy
        if attack != attacks[-1]:
            results.save(record)
        log(f"{name}: {accuracy:.2%} robust after {attack} ({record['seconds'][attack]:.1f} s)")

    with _warnings(record, attacker.logger, log):
        check_square_sr({"clean": record["clean_accuracy"], **record["robust_accuracy_after"]}, logger=attacker.logger)
    record = {key: value for key, value in record.items() if key not in _progress(robust)}
    record["robust_accuracy"] = record["robust_accuracy_after"][attacks[-1]]
    results.finish(record)
    return record


@torch.no_grad()
def _is_correct(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x).argmax(dim=1) == y).cpu()


def check_progress(record: Mapping[str, Any], results: Keeper) -> None:
    """Hold what an interrupted evaluation left against what `evaluate` writes. Raises ExperimentError."""
    n, attacks = record["n"], VERSIONS[record["version"]]
    robust, broken, batches = (record.get(name) for name in ("robust", "broken", "batches"))
    done, seconds, warned = (record.get(name) for name in ("robust_accuracy_after", "seconds", "warnings"))
    sound = isinstance(robust, str) and re.fullmatch(f"[01]{{{n}}}", robust) is not None
    sound = sound and type(batches) is int and 0 <= batches <= math.ceil(robust.count("1") / record["batch_size"])
    sound = sound and isinstance(broken, list) and all(type(row) is int and 0 <= row < n for row in broken)
    sound = sound and isinstance(done, dict) and list(done) == attacks[: len(done)] and len(done) < len(attacks)
    sound = sound and isinstance(seconds, dict) and isinstance(warned, list) and all(isinstance(w, str) for w in warned)
    numbers = [record.get("clean_accuracy"), *done.values(), *seconds.values()] if sound else []
    sound = sound and all(isinstance(value, int | float) for value in numbers)
    if not sound:
        raise ExperimentError(f"{results.unfinished_path}: damaged; remove it to start the evaluation again")


def _progress(robust: Tensor) -> dict[str, Any]:
    """What a record holds besides the figures until it is finished, here between two attacks.

    robust: for each image, whether it withstood the attacks before; batches: how many the attack under way has done;
    broken: the images that it has found an adversarial example for.
    """
    return {"robust": "".join("01"[flag] for flag in robust.tolist()), "batches": 0, "broken": []}


@contextlib.contextmanager
def _bar(name: str, batches: Sequence[Tensor], done: int, model: nn.Module, position: int | None) -> Iterator[tqdm]:
    """A progress bar over batches. Each can take minutes, so every pass through the model keeps the clock going."""
    kind = {"desc": name, "unit": "batch", "leave": False, "position": position}
    with tqdm(total=len(batches), initial=done, miniters=0, mininterval=1, **kind) as bar:

        def tick(*_: Any) -> None:
            bar.update(0)

        with model.register_forward_hook(tick):
            yield bar


@contextlib.contextmanager
def _warnings(record: dict[str, Any], logger: logging.Logger, log: Callable[[str], Any]) -> Iterator[None]:
    """Log what AutoAttack warns of, and keep it in the record: once for each kind, whatever the numbers in it."""
    kinds = {re.sub("[0-9.]+", "#", message) for message in record["warnings"]}

    class Collector(logging.Handler):
        def emit(self, event: logging.LogRecord) -> None:
            kind = re.sub("[0-9.]+", "#", message := event.getMessage())
            if kind not in kinds:
                kinds.add(kind)
                record["warnings"].append(message)
                log(f"warning of AutoAttack: {message}")

    collector, propagate = Collector(logging.WARNING), logger.propagate
    logger.addHandler(collector)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(collector)
        logger.propagate = propagate


def versions() -> dict[str, str]:
    """The versions of what the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pyautoattack": pyautoattack.__version__,
    }


def device_name(device: torch.device) -> str:
    """A device as people know it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


# --- Several at a time ------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """One evaluation: a model on a test set, as `identity` says."""

    model: nn.Module
    test: Split
    identity: dict[str, Any]


def evaluate_all(
    tasks: Sequence[Task], jobs: int, results: Results, device: torch.device, log: Callable[[str], Any]
) -> Iterator[dict[str, Any]]:
    """The records of all tasks as they are finished, from `jobs` processes or, for one job, from this one.

    On a CPU the small batches that AutoAttack comes down to do not keep several cores busy, several evaluations do:
    each process gets its share of the threads, whose number can change how sums are rounded, and a copy of model and
    data. Only this process writes; the others send it what they found, and end
    when it does. Raises ChildProcessError where one of them ends before.
    """
    if jobs == 1 or len(tasks) < 2:
        for task in tasks:
            yield evaluate(*task, results, device, log)
        return
    context = multiprocessing.get_context("spawn")
    jobs = min(jobs, len(tasks))
    threads = max(1, torch.get_num_threads() // jobs)
    waiting, workers = list(tasks), {}
    # Ctrl-C reaches all processes: the workers ignore it from their start on, and are ended by this one.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for position in range(jobs):
            channel, remote = context.Pipe()
            worker = context.Process(target=_work, args=(remote, device, threads, position), daemon=True)
            worker.start()
            remote.close()
            workers[channel] = worker
        signal.signal(signal.SIGINT, interrupt)
        for channel, worker in workers.items():
            with _dead_named(worker):
                _hand_over(waiting.pop(0), channel, results)
        while workers:
            for channel in wait(list(workers)):
                with _dead_named(workers[channel]):
                    kind, content = channel.recv()
                if kind == "error":
                    raise content
                {"log": log, "save": results.save, "finish": results.finish}[kind](content)
                if kind != "finish":
                    continue
                if waiting:
                    with _dead_named(workers[channel]):
                        _hand_over(waiting.pop(0), channel, results)
                else:
                    channel.close()
                    workers.pop(channel).join()
                yield content
    finally:
        signal.signal(signal.SIGINT, interrupt)
        for worker in workers.values():
            worker.terminate()
            worker.join()


@contextlib.contextmanager
def _dead_named(worker: multiprocessing.process.BaseProcess) -> Iterator[None]:
    """Say how a process ended that does not answer."""
    try:
        yield
    except (EOFError, BrokenPipeError, ConnectionResetError):
        worker.join()
        raise ChildProcessError(f"the process of an evaluation ended with {worker.exitcode}") from None


def _hand_over(task: Task, channel: Connection, results: Results) -> None:
    # Pickled here and not by the channel, which would put tensors into shared memory; containers have little of it.
    channel.send((pickle.dumps(task), results.unfinished(task.identity), results.unfinished_path))


class _Remote(NamedTuple):
    """The `Keeper` of an evaluation in another process than the one that writes."""

    channel: Connection
    record: dict[str, Any] | None
    unfinished_path: Path

    def unfinished(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        return self.record

    def save(self, record: dict[str, Any]) -> None:
        self.channel.send(("save", record))

    def finish(self, record: dict[str, Any]) -> None:
        self.channel.send(("finish", record))


def _work(channel: Connection, device: torch.device, threads: int, position: int) -> None:
    """Evaluate one task after another from `channel`, until the process that sends them ends, however it ends."""
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # tqdm's own is a semaphore of the system, which a process that is killed leaves.
    torch.set_num_threads(threads)
    make_reproducible()
    while True:
        try:
            task, record, path = channel.recv()
        except EOFError:
            return
        try:
            keeper = _Remote(channel, record, path)
            evaluate(*pickle.loads(task), keeper, device, lambda message: channel.send(("log", message)), position)
        except (ValueError, OSError) as error:
            channel.send(("error", error))


def make_reproducible() -> None:
    """The same figures again on the same machine, and logits in float32 where a GPU would round to TF32."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False


# --- The run ----------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where an evaluation's checkpoints lie, and where its results go."""

    checkpoints: list[Path]
    results: Results
    log: Callable[[str], Any]


@contextlib.contextmanager
def open_place(target: Path, names: list[str] | None) -> Iterator[Place]:
    """The folder or file to evaluate, locked against a second evaluation; a folder's file stands for its folder.

    names: the folder's checkpoints, by default best.pt. Raises ValueError or OSError.
    """
    if target.is_file() and names is not None:
        raise ValueError(f"--checkpoint {names[0]}: {target} is a checkpoint itself, not an experiment folder")
    if target.is_file() and (target.parent / "args.yaml").exists():
        target, names = target.parent, [target.name]
    if target.is_file():
        with _open_file(target) as place:
            yield place
        return
    with Experiment.open(target, lock="eval", echo=tqdm.write) as experiment:
        names = [name if name.endswith(".pt") else f"{name}.pt" for name in names or ["best.pt"]]
        there = sorted(path.name for path in target.glob("*.pt"))
        for name in names:
            if name not in there:
                raise ValueError(f"--checkpoint {name}: {target} has {', '.join(there) or 'no checkpoints'}")
        paths = [target / name for name in dict.fromkeys(names)]
        yield Place(paths, Results(target / "autoattack"), experiment.log)


@contextlib.contextmanager
def _open_file(path: Path) -> Iterator[Place]:
    flags.check_writable(path.parent, "results are written beside")

    def log(message: str) -> None:
        tqdm.write(message)
        with open(f"{path}.eval.log", "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ExperimentError(f"{path} is in use: another process evaluates it") from None
        yield Place([path], Results(path.with_name(f"{path.name}.autoattack")), log)


def main(argv: list[str] | None = None) -> int:
    """Evaluate what the flags say. Raises ValueError or OSError, in one line, for what is wrong with them."""
    parser = build_parser()
    args = vars(parser.parse_args(argv))
    targets = [text for text in (args.pop("target_flag"), args.pop("target")) if text is not None]
    if len(targets) != 1:
        parser.error("expected one FOLDER or FILE, before the flags that take several values")
    radii = list(dict.fromkeys(parse_eps(text, args["norm"]) for text in args["eps"]))
    again = args.pop("again")
    if args.pop("dry_run"):
        texts = [radius.text for radius in radii]
        settings = {"target": targets[0], **args, "eps": texts, "attacks": VERSIONS[args["version"]]}
        print(yaml.safe_dump(settings, sort_keys=False), end="")
        return 0

    device = flags.device(args["device"])
    make_reproducible()
    given = {name: args[name] for name in MODEL_SETTINGS}
    with open_place(Path(targets[0]), args["checkpoint"]) as (paths, results, log):
        candidates = [load_candidate(path, args["weights"], given, log) for path in paths]
        tests = [load_test(candidate, args["data_dir"]) for candidate in candidates]
        for test in tests:
            if args["n"] is not None and args["n"] > len(test.labels):
                raise ValueError(f"--n {args['n']}: the test set has {len(test.labels)} images")
        tasks = []
        for candidate, test in zip(candidates, tests, strict=True):
            for eps, text in radii:
                attack = {"norm": args["norm"], "eps": eps, "eps_text": text, "version": args["version"]}
                attack |= {"n": args["n"] or len(test.labels), "seed": args["seed"]}
                identity = {**candidate.identity, **attack, "batch_size": args["batch_size"]}
                known = None if again else results.finished(identity)
                if known is None:
                    tasks.append(Task(candidate.model, test, identity))
                else:
                    log(f"{summary(known)}, as evaluated before (--again to do it again)")
        try:
            for record in evaluate_all(tasks, args["jobs"], results, device, log):
                log(summary(record))
        except KeyboardInterrupt:
            log("interrupted; the same command goes on after the last finished batch")
            return 130
        log(f"results in {results.path}")
    return 0


def summary(record: Mapping[str, Any]) -> str:
    """A finished record in one line."""
    return (
        f"{record['checkpoint']} ({record['weights']} weights), {record['norm']} {record['eps_text']}, first "
        f"{record['n']} of {record['test_size']} test images: clean {record['clean_accuracy']:.2%}, "
        f"AutoAttack {record['version']} {record['robust_accuracy']:.2%}"
    )


if __name__ == "__main__":
    flags.run(main)
