"""What a checkpoint file holds, ours or others': which weights, and which settings make their model.

For whoever loads a model: train.py's --pretrained, and the evaluation.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data import DATASETS
from experiment.checkpoint import load_checkpoint
from experiment.folder import Experiment
from experiment.settings import check_settings
from models.weights import load_weights
from storage.files import FileError

# Where our checkpoints, and those of others, keep which weights.
WEIGHTS = {
    "average": ["average", "wa_model", "model_state_dict"],
    "raw": ["model", "unaveraged_model", "unaveraged_model_state_dict"],
}
MODEL_SETTINGS = {"dataset": str, "model": str, "group_norm": bool, "normalize": bool}
# Where our checkpoints, and those of others, keep the averaged weights.
AVERAGE_KEYS = ("average", "wa_model", "model_state_dict", "state_dict")


def model_settings(state: Mapping[str, Any], path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make a checkpoint's model and choose its data: its own, or where it has none the flags'."""
    if "settings" not in state:
        if given["model"] is None:
            raise ValueError(f"{path} has no settings in it: say what it is with --model (and --dataset, --normalize)")
        defaults = {"dataset": "cifar10", "group_norm": False, "normalize": False}
        return {name: defaults[name] if given[name] is None else given[name] for name in MODEL_SETTINGS}
    if not isinstance(state["settings"], Mapping):
        raise FileError(f"{path}: its settings are a {type(state['settings']).__name__}")
    settings = {name: state["settings"][name] for name in MODEL_SETTINGS if name in state["settings"]}
    check_settings(settings, MODEL_SETTINGS, path)
    for name, value in given.items():
        if value is not None and value != settings[name]:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {value}: {path} was trained with {settings[name]}; leave the flag out")
    if settings["dataset"] not in DATASETS:
        raise FileError(f"{path}: unknown dataset {settings['dataset']!r}; known are {', '.join(DATASETS)}")
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


def load_pretrained(model: nn.Module, source: str) -> None:
    """Load averaged weights: of a folder's latest checkpoint, of a checkpoint file, or a bare state dict."""
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"--pretrained {source}: no such file or folder")
    if path.is_dir():
        loaded = Experiment.open(path).load_latest()
        if loaded is None:
            raise FileError(f"--pretrained {source}: the folder holds no checkpoint yet")
        state, path = loaded.state, loaded.path
        wanted = state["settings"]["burn_in_epochs"] + state["settings"]["epochs"]
        if state["progress"]["epoch"] < wanted:
            raise FileError(
                f"--pretrained {source}: {state['progress']['epoch']} of its {wanted} epochs are finished; "
                f"go on with --resume {source}, or name one of its checkpoint files"
            )
    else:
        state = load_checkpoint(path, foreign=True)
    weights = next((state[key] for key in AVERAGE_KEYS if isinstance(state.get(key), Mapping)), state)
    load_weights(model, weights, f"--pretrained {path}")
