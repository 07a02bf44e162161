"""AutoAttack (Croce & Hein, 2020), a batch at a time: it can be cut anywhere, and goes on to the same figures.

For evaluation/jobs.py. Every batch of every attack is one call, seeded by itself, on the images that the attacks before
have left: the same calls as AutoAttack makes in one go. After each, the record is saved.

pyautoattack's own state file cannot serve for that. Version 0.2.0 writes the set of attacks as a string, which never
equals the set that it is compared with, so that restoring always fails; and it would regroup the images of a half-done
attack into other batches, with other random starts.
"""

import contextlib
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from pyautoattack import AutoAttack
from pyautoattack.checks import check_square_sr
from torch import Tensor, nn
from tqdm import tqdm

from data import Split, num_classes, to_input
from evaluation.environment import device_name, versions
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


class Keeper(Protocol):
    """Who keeps the record of an evaluation: `Results`, or in another process than its the way there."""

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

    bar_position: on which line of the terminal the progress bar stands, where others stand too. Raises FileError where
    what an interrupted evaluation left is damaged, and ValueError where an output of the model is not finite, or the
    images are none that the attacks can take.
    """
    n, batch_size, attacks = identity["n"], identity["batch_size"], VERSIONS[identity["version"]]
    name = f"{identity['checkpoint']} {identity['norm']} {identity['eps_text']}"
    height, width = test.images.shape[1:3]
    if height != width and "square" in attacks:
        raise ValueError(
            f"{width}x{height} images: AutoAttack's Square needs square ones; --version custom leaves it out"
        )
    model = model.to(device)

    def batch(rows: Tensor) -> tuple[Tensor, Tensor]:
        return to_input(test.images[rows]).to(device), test.labels[rows].to(device)

    environment = {"device": device_name(device), "versions": versions()}
    record = _left_over(identity, environment, results, lambda message: log(f"{name}: {message}"))
    if record is None:
        with finite_outputs(model, name):
            correct = torch.cat([_is_correct(model, *batch(rows)) for rows in torch.arange(n).split(batch_size)])
        record = {**identity, "test_size": len(test.labels), "clean_accuracy": correct.sum().item() / n}
        record |= {"robust_accuracy_after": {}, "seconds": {}, "warnings": [], **environment}
        record |= {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **_progress(correct)}
        results.save(record)
        log(f"{name}: clean accuracy {record['clean_accuracy']:.2%} of {n} images")

    attacker = autoattack(
        model,
        norm=identity["norm"],
        eps=identity["eps"],
        seed=identity["seed"],
        num_classes=num_classes(identity["dataset"], identity.get("dataset_content")),
        device=device,
        attacks=attacks,
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
            finite_outputs(model, name),
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


def _left_over(
    identity: dict[str, Any], environment: dict[str, Any], results: Keeper, log: Callable[[str], Any]
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


@torch.no_grad()
def _is_correct(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x).argmax(dim=1) == y).cpu()


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
