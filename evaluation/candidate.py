"""A checkpoint file, ours or others', as a model with an identity and its test set.

For all that load a finished model: eval.py, export.py and the analysis.
"""

import hashlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from data import DEFAULT_DATA_DIR, Split, load_data
from experiment.build import build_model
from experiment.checkpoint import load_checkpoint
from experiment.weights import model_settings, pick_weights
from models.weights import load_weights


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


def load_test(candidate: Candidate, data_dir: str | None) -> Split:
    """The test set of a checkpoint: below `data_dir`, or where it was trained from if that is there."""
    if data_dir is None:
        trained_from = candidate.settings.get("data_dir")
        data_dir = trained_from if isinstance(trained_from, str) and Path(trained_from).is_dir() else DEFAULT_DATA_DIR
    return load_data(candidate.identity["dataset"], data_dir)[1]
