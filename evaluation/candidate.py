"""A checkpoint file, ours or others', as a model with an identity and its test set.

For all that load a finished model: eval.py, export.py and the analysis.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from data import Split, balanced_subset, find_data_dir, is_path, is_sorted, load_data
from experiment.build import build_model, load_parts
from experiment.settings import with_places
from experiment.weights import model_settings, read_weights
from models.own import content_of_own
from models.weights import load_weights


class Candidate(NamedTuple):
    """What is evaluated: a model with its weights, in eval mode, and what tells it from others in a record."""

    model: nn.Module
    identity: dict[str, Any]
    settings: Mapping[str, Any]  # of the run that made it; of others' files there are none
    checkpoint: Mapping[str, Any]  # all that is in the file


def load_candidate(path: str | Path, weights: str | None = None, given: Mapping[str, Any] | None = None) -> Candidate:
    """The model of a checkpoint file: one of ours, which knows its settings, or others' with the settings as flags.

    weights: which of the file's, see `experiment.weights.read_weights`. given: the flags that `add_model_flags` adds,
    None where they were left out. Raises ValueError.
    """
    path, before = Path(path), None
    while before != (digest := sha256(path)):  # Training may replace the file while it is read.
        before, chosen = digest, read_weights(path, weights)
    settings = model_settings(chosen, path, given or {})
    theirs = with_places(chosen.settings) if chosen.settings else {}

    # In the memory format of its training, which is the quicker one on the CPU.
    model = build_model({**settings, "channels_last": theirs.get("channels_last") is True})
    load_weights(model, chosen.state_dict, str(path))
    model.eval().requires_grad_(False)
    identity = {**settings, "checkpoint": path.name, "sha256": digest, "weights": chosen.kind}
    identity |= {"weights_key": chosen.key, "model_content": content_of_own(settings["model"])}
    return Candidate(model, identity, theirs, chosen.checkpoint)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as `sha256sum` prints it."""
    content = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
    return content.hexdigest()


def leading(test: Split, n: int) -> tuple[Split, str]:
    """A test set whose first n images are those to evaluate on, and which these are: "first", or "balanced".

    As papers mean it they are the first ones. Where the set is sorted by class, they are a class-balanced choice,
    always the same.
    """
    if n >= len(test.labels) or not is_sorted(test):
        return test, "first"
    rows = torch.arange(len(test.labels))
    chosen = balanced_subset(Split(rows, test.labels), n, seed=0).images
    is_chosen = torch.zeros(len(rows), dtype=torch.bool).index_fill_(0, chosen, True)
    order = torch.cat([chosen, rows[~is_chosen]])
    return Split(test.images[order], test.labels[order]), "balanced"


def load_test(candidate: Candidate, data_dir: str | None, part: str = "test") -> Split:
    """The test images of a checkpoint's dataset: below `data_dir`, or where it was trained from if that is there.

    part: as for `load_part`. Raises ValueError where the checkpoint does not say which images were held out.
    """
    name, stored = candidate.identity["dataset"], candidate.settings.get("data_dir")
    if data_dir is None:
        data_dir = find_data_dir(name, stored if isinstance(stored, str) else None)
    check_part(candidate, part)
    return load_part({**candidate.settings, **candidate.identity, "data_dir": str(data_dir)}, part)


def check_part(candidate: Candidate, part: str) -> None:
    """Raise ValueError where images held out of training are wanted and a file of others does not say which."""
    if part == "validation" and not candidate.settings:
        raise ValueError(f"--images {part}: {candidate.identity['checkpoint']} does not say which were held out")


def load_part(settings: Mapping[str, Any], part: str) -> Split:
    """The images of a dataset to judge a model by, as a run's settings (or those of a model) name it.

    part: "test", or "validation" for those that were held out of training, by which the best epoch was chosen. Raises
    ValueError where there are no test images, with what to do.
    """
    name = settings["dataset"]
    if part == "test" and not is_path(name):
        return load_data(name, settings["data_dir"])[1]
    parts = load_parts({"seed": 0, "rules": 2, "held_out": None, **settings})
    if part not in parts:
        raise ValueError(
            f"{name} has no test images: put some into {name}/test/CLASS/, or name a folder that has them with "
            "--dataset; or take those held out of training, by which the best epoch was chosen: --images validation"
        )
    return parts[part]
