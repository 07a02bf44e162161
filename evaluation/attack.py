"""AutoAttack (Croce & Hein, 2020), a batch at a time: it can be cut anywhere, and goes on to the same figures.

For evaluation/jobs.py. Every batch of every attack is one call, seeded by itself, on the images that the attacks before
have left: the same calls as AutoAttack makes in one go, whichever process makes them. After each, the record is saved.

pyautoattack's own state file cannot serve for that. Version 0.2.0 writes the set of attacks as a string, which never
equals the set that it is compared with, so that restoring always fails; and it would regroup the images of a half-done
attack into other batches, with other random starts.
"""

import contextlib
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyautoattack import AutoAttack
from pyautoattack.checks import check_square_sr
from torch import Tensor, nn
from tqdm import tqdm

from data import Split, num_classes, to_input
from evaluation.environment import device_name, versions
from evaluation.results import Results
from models.outputs import finite_outputs
from storage.files import FileError

CUSTOM = ["apgd-ce", "apgd-t", "fab-t"]
VERSIONS = {"standard": [*CUSTOM, "square"], "custom": CUSTOM, "few-classes": ["apgd-ce", "fab-t", "square"]}


def autoattack(
    model: nn.Module,
    *,
    norm: str,
    eps: float,
    seed: int,
    num_classes: int,
    device: Any,
    attacks: Sequence[str] = VERSIONS["standard"],
) -> AutoAttack:
    """AutoAttack's standard version for a model in eval mode, ready for `attacks_to_run` to name one of `attacks`.

    It attacks the nine likeliest other classes, or all where there are fewer. Raises ValueError below 4 classes, where
    the targeted APGD has no loss, if that is one of the attacks.
    """
    if num_classes < 4 and "apgd-t" in attacks:
        raise ValueError(
            f"{num_classes} classes: AutoAttack's targeted APGD needs at least 4; --version few-classes leaves it out"
        )
    attack = AutoAttack(model, norm=norm, eps=eps, seed=seed, version="standard", device=device)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, num_classes - 1)
    return attack


class Batch(NamedTuple):
    """Images of an evaluation for one call of an attack, by their rows; without attack, for the clean accuracy."""

    attack: str | None
    number: int
    rows: list[int]


class Found(NamedTuple):
    """What such a call found: the rows that are not classified right, what AutoAttack warned of, the seconds."""

    broken: list[int]
    warnings: list[str]
    seconds: float


class Attacker:
    """The model and the images of an evaluation on a device: called on a `Batch`, it gives what is `Found`.

    Raises ValueError where an output of the model is not finite.
    """

    def __init__(self, model: nn.Module, test: Split, identity: Mapping[str, Any], device: torch.device):
        self.model, self.test, self.device, self.name = model.to(device), test, device, _name(identity)
        self.autoattack = autoattack(
            self.model,
            norm=identity["norm"],
            eps=identity["eps"],
            seed=identity["seed"],
            num_classes=num_classes(identity["dataset"], identity.get("dataset_content")),
            device=device,
            attacks=VERSIONS[identity["version"]],
        )

    def __call__(self, batch: Batch) -> Found:
        started = time.monotonic()
        x, y = to_input(self.test.images[batch.rows]).to(self.device), self.test.labels[batch.rows].to(self.device)
        with finite_outputs(self.model, self.name), _warnings(self.autoattack.logger) as warned:
            if batch.attack is None:
                with torch.no_grad():
                    predicted = self.model(x).argmax(dim=1)
            else:
                self.autoattack.attacks_to_run = [batch.attack]
                _, predicted = self.autoattack.run_standard_evaluation(x, y, batch_size=len(y))
            broken = (predicted != y).nonzero().flatten().tolist()
        return Found([batch.rows[index] for index in broken], warned, time.monotonic() - started)


class Evaluation:
    """An evaluation from batch to batch: which are next, what was found, and the record that is kept of it.

    The batches of an attack may be answered in any order, by whomever; they are written down in their own order, so
    that the record, finished or not, is the one that a single process writes. A context, at whose end the progress bar
    goes. Raises FileError where what an interrupted evaluation left is damaged, and ValueError where the images are
    none that the attacks can take.
    """

    def __init__(
        self,
        test: Split,
        identity: dict[str, Any],
        results: Results,
        devices: Iterable[torch.device],
        log: Callable[[str], Any],
        bar_position: int | None = None,
    ):
        self.identity, self.results, self.log, self.bar_position = identity, results, log, bar_position
        self.name, self.attacks, self.finished = _name(identity), VERSIONS[identity["version"]], False
        self.test_size = len(test.labels)
        height, width = test.images.shape[1:3]
        if height != width and "square" in self.attacks:
            raise ValueError(
                f"{width}x{height} images: AutoAttack's Square needs square ones; --version custom leaves it out"
            )
        kinds = sorted({device_name(device) for device in devices})
        self.environment = {"device": ", ".join(kinds), "versions": versions()}
        self.bar: tqdm | None = None
        self.record = _left_over(identity, self.environment, results, lambda message: log(f"{self.name}: {message}"))
        self._begin_attack()

    def __enter__(self) -> "Evaluation":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def tick(self, *_: Any) -> None:
        """Keep the clock of the progress bar going; a batch can take minutes."""
        if self.bar is not None:
            self.bar.update(0)

    def next_batch(self) -> Batch | None:
        """A batch that nobody has yet; None where others have to be answered first, or all are."""
        if self._handed_out == len(self._batches):
            return None
        self._handed_out += 1
        return Batch(self._attack, self._handed_out - 1, self._batches[self._handed_out - 1])

    def add(self, batch: Batch, found: Found) -> None:
        """Take what a batch has found."""
        self._found[batch.number] = found
        while (found := self._found.pop(self._written, None)) is not None:
            self._write_down(found)
        if self._written == len(self._batches):
            self._end_attack()

    def _begin_attack(self) -> None:
        """The batches of the next attack, of which an interrupted evaluation may have left some done."""
        record, n = self.record, self.identity["n"]
        if record is None:
            self._attack, standing, self._written, self._broken = None, torch.arange(n), 0, []
        else:
            self._attack = next(name for name in self.attacks if name not in record["robust_accuracy_after"])
            standing = torch.tensor([flag == "1" for flag in record["robust"]]).nonzero().flatten()
            self._written = record["batches"]
            record["seconds"].setdefault(self._attack, 0.0)
        # The same batches as AutoAttack makes of the images that are left.
        self._batches = [rows.tolist() for rows in standing.split(self.identity["batch_size"])] if len(standing) else []
        self._handed_out, self._found = self._written, {}
        kind = {"unit": "batch", "leave": False, "position": self.bar_position, "miniters": 0, "mininterval": 1}
        about = f"{self.name} {self._attack or 'clean'}"
        self.bar = tqdm(total=len(self._batches), initial=self._written, desc=about, **kind)
        if self._written == len(self._batches):
            self._end_attack()

    def _write_down(self, found: Found) -> None:
        """The next batch's findings, in the record and on disk."""
        self._written += 1
        self.bar.update()
        if self._attack is None:
            self._broken += found.broken
            return
        record = self.record
        kinds = set(map(_kind, record["warnings"]))
        for message in found.warnings:
            if _kind(message) not in kinds:
                self._warn(message)
        record["broken"] += found.broken
        record["batches"] += 1
        record["seconds"][self._attack] += found.seconds
        self.results.save(record)
        standing = record["robust"].count("1") - len(record["broken"])
        self.bar.set_postfix_str(f"robust {standing / record['n']:.2%}")

    def _end_attack(self) -> None:
        """The accuracy under an attack that is done; then the next attack, or the end."""
        self.bar.close()
        record, n, attack = self.record, self.identity["n"], self._attack
        if attack is None:
            correct = torch.ones(n, dtype=torch.bool)
            correct[self._broken] = False
            record = {**self.identity, "test_size": self.test_size, "clean_accuracy": correct.sum().item() / n}
            record |= {"robust_accuracy_after": {}, "seconds": {}, "warnings": [], **self.environment}
            record |= {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **_progress(correct)}
            self.record = record
            self.results.save(record)
            self.log(f"{self.name}: clean accuracy {record['clean_accuracy']:.2%} of {n} images")
        else:
            robust = torch.tensor([flag == "1" for flag in record["robust"]])
            robust[record["broken"]] = False
            accuracy = robust.sum().item() / n
            record |= _progress(robust)
            record["robust_accuracy_after"][attack] = accuracy
            if attack != self.attacks[-1]:
                self.results.save(record)
            self.log(f"{self.name}: {accuracy:.2%} robust after {attack} ({record['seconds'][attack]:.1f} s)")
        if attack != self.attacks[-1]:
            self._begin_attack()
            return
        logger = logging.getLogger(__name__)
        with _warnings(logger) as warned:
            check_square_sr({"clean": record["clean_accuracy"], **record["robust_accuracy_after"]}, logger=logger)
        for message in warned:
            self._warn(message)
        for key in _progress(robust):
            del record[key]
        record["robust_accuracy"] = record["robust_accuracy_after"][attack]
        self.results.finish(record)
        self.finished = True

    def _warn(self, message: str) -> None:
        self.record["warnings"].append(message)
        self.log(f"warning of AutoAttack: {message}")


def evaluate(
    model: nn.Module,
    test: Split,
    identity: dict[str, Any],
    results: Results,
    device: torch.device,
    log: Callable[[str], Any],
) -> dict[str, Any]:
    """Attack the first images of `test`, going on where an interrupted evaluation stopped; returns the record.

    Raises FileError where what an interrupted evaluation left is damaged, and ValueError where an output of the model
    is not finite, or the images are none that the attacks can take.
    """
    attacker = Attacker(model, test, identity, device)
    with (
        Evaluation(test, identity, results, [device], log) as evaluation,
        attacker.model.register_forward_hook(evaluation.tick),
    ):
        while (batch := evaluation.next_batch()) is not None:
            evaluation.add(batch, attacker(batch))
        return evaluation.record


def _name(identity: Mapping[str, Any]) -> str:
    return f"{identity['checkpoint']} {identity['norm']} {identity['eps_text']}"


def _left_over(
    identity: dict[str, Any], environment: dict[str, Any], results: Results, log: Callable[[str], Any]
) -> dict[str, Any] | None:
    """The record that an interrupted evaluation left, if it was found on such a device by such packages."""
    record = results.unfinished(identity)
    if record is None:
        return None
    if {key: record.get(key) for key in environment} != environment:
        log("what an interrupted evaluation left is of another device or other packages; starting again")
        return None
    _check_progress(record, results.unfinished_path)
    done = list(record["robust_accuracy_after"])
    last = ["the clean images", *done][-1]
    if record["batches"]:
        last = f"batch {record['batches']} of {VERSIONS[identity['version']][len(done)]}"
    log(f"interrupted before, going on after {last}")
    return record


def _check_progress(record: Mapping[str, Any], path: Path) -> None:
    """Hold what an interrupted evaluation left against what `evaluate` writes. Raises FileError."""
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
        raise FileError(f"{path}: damaged; remove it to start the evaluation again")


def _progress(robust: Tensor) -> dict[str, Any]:
    """What a record holds besides the figures until it is finished, here between two attacks.

    robust: for each image, whether it withstood the attacks before; batches: how many the attack under way has done;
    broken: the images that it has found an adversarial example for.
    """
    return {"robust": "".join("01"[flag] for flag in robust.tolist()), "batches": 0, "broken": []}


def _kind(message: str) -> str:
    """What a warning is about, whatever the numbers in it."""
    return re.sub("[0-9.]+", "#", message)


@contextlib.contextmanager
def _warnings(logger: logging.Logger) -> Iterator[list[str]]:
    """What a logger warns of in the body, once for each kind, instead of printing it."""
    collected: list[str] = []

    class Collector(logging.Handler):
        def emit(self, event: logging.LogRecord) -> None:
            message = event.getMessage()
            if _kind(message) not in map(_kind, collected):
                collected.append(message)

    collector, propagate = Collector(logging.WARNING), logger.propagate
    logger.addHandler(collector)
    logger.propagate = False
    try:
        yield collected
    finally:
        logger.removeHandler(collector)
        logger.propagate = propagate
