"""What decides what comes out of a training, and which code it was. For scripts/compare_*.py."""

import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from evaluation.candidate import sha256
from evaluation.environment import device_name
from experiment.settings import PLACE, resolve, upgraded
from experiment.train_flags import parse

ROOT = Path(__file__).resolve().parents[1]
# Settings on which a comparison does not depend: where and how, and what differs between runs that are alike.
LEFT_OUT = (*PLACE, "seed", "pretrained")
# The code that decides what comes out of a training.
CODE = ("train.py", "dyart", "experiment", "models", "data")


def trained_by() -> str | None:
    """The last commit of the code that trains, with "+" where files of it differ; None without git or a clone."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words, "--", *CODE], capture_output=True, text=True).stdout.strip()

    if shutil.which("git") is None:
        return None
    commit = git("log", "-1", "--format=%h", "--abbrev=7")
    return commit + "+" * bool(git("status", "--porcelain")) if commit else None


def made_by(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The machine and the code that trained a run, as they are now: to be asked right after it."""
    return {"machine": device_name(torch.device(settings["device"])), "code": trained_by()}


def deciding_settings(flags: str) -> dict[str, Any]:
    """What decides what comes out of runs with these flags of train.py, but for the seed, by the names of args.yaml."""
    return deciding(resolve(parse(shlex.split(flags))))


def deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings of a run those that decide what comes out of it, but for the seed; files by what is in them."""
    found = {name: value for name, value in upgraded(settings).items() if name not in LEFT_OUT}
    if settings["aux_data_filename"] is not None:
        found["aux_data_filename"] = Path(settings["aux_data_filename"]).name
    if settings["pretrained"] is not None:
        found["pretrained_sha256"] = sha256(Path(settings["pretrained"]))
    return found


def check_alike(name: str, before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Raise ValueError where the settings `before`, of the runs that a file or folder has, are not those of `now`."""
    before = {name: value for name, value in upgraded(before).items() if name not in LEFT_OUT}
    if before != now:
        changed = [name for name in {**now, **before} if now.get(name) != before.get(name)]
        words = ", ".join(f"{name} {before.get(name)}, now {now.get(name)}" for name in changed)
        raise ValueError(f"{where}: {name} was trained with {words}; compare like with like, in a new place")


def of_several_codes(runs: Iterable[tuple[str, str | None]]) -> list[str]:
    """Lines that say which code trained which run, of pairs of a run's name and code; none where it was one code."""
    by_code: dict[str, list[str]] = {}
    for name, code in runs:
        by_code.setdefault(code or "code not known", []).append(name)
    lines = [f"  {code}: {', '.join(names)}" for code, names in by_code.items()]
    return ["", "not trained by one code:", *lines] if len(by_code) > 1 else []
