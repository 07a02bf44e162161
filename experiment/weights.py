"""What a checkpoint file holds, ours or others': which weights, and which settings make their model.

For whoever loads a model, train.py's --pretrained and the evaluation alike: one reading, one choice among several sets
of weights, one check of what they fit.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from data import CONTENT, DATASETS, is_path, same_classes
from experiment import flags
from experiment.checkpoint import load_checkpoint
from experiment.folder import Experiment
from experiment.images import add_dataset_flags, resolve_images
from experiment.settings import check_settings, resolve_normalization, upgraded
from experiment.train_flags import add_normalization_flags, as_swish_models_do, flag_of, with_own_model
from models.own import check_used, content_of_own, is_own
from models.weights import load_weights, statistics_of
from storage.files import FileError

logger = logging.getLogger(__name__)

# The settings that make a checkpoint's model and choose its data.
MODEL_SETTINGS = {"dataset": str, "model": str, "group_norm": bool, "normalize": bool}
MODEL_SETTINGS |= {"mean": (list, type(None)), "std": (list, type(None))}
MODEL_SETTINGS |= {"image_size": (int, type(None)), "dataset_content": (str, type(None))}

# Those that choose the data: of own images, other ones of the same classes go with the same weights.
OF_IMAGES = ("dataset", "image_size", "dataset_content")

IMAGES_HELP = "which; validation: those held out of training, by which the best epoch was chosen"
WEIGHTS_HELP = "of a file with several: average, raw or a name in the file (the average, where there is one)"

# --- Which weights ----------------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """One of the sets of weights in a file.

    kind: "average", "raw", or "only" where the file has one set and does not say which. key: the name that it has in
    the file, "" where it is the file. settings: of the run that wrote the file, None for others' files. checkpoint: all
    that is in the file.
    """

    kind: str
    key: str
    state_dict: Mapping[str, Tensor]
    settings: dict[str, Any] | None
    checkpoint: dict[str, Any]


def read_weights(path: Path, wanted: str | None = None) -> Weights:
    """The weights of a checkpoint file, ours or others'.

    wanted: "average", "raw" or a name in the file; None takes the average where the file has one. Raises FileError, and
    ValueError where the file has no such weights, or several that could be meant.
    """
    return choose_weights(load_checkpoint(path, foreign=True), path, wanted)


def choose_weights(checkpoint: dict[str, Any], path: Path, wanted: str | None = None) -> Weights:
    """`read_weights` of a file that is read already."""
    # Others may have something else under this name.
    settings = checkpoint.get("settings") if "format" in checkpoint else None
    if settings is not None and not isinstance(settings, Mapping):
        raise FileError(f"{path}: its settings are a {type(settings).__name__}")
    sets = {key: found for key, value in checkpoint.items() if (found := _weights_in(value)) is not None}
    kinds = {key: _kind(key, sets) for key in sets}
    if wanted in sets:
        return Weights(kinds[wanted], wanted, sets[wanted], settings, checkpoint)
    averages = [key for key in sets if kinds[key] == "average"]
    is_bare = not sets and all(isinstance(value, Tensor) for value in checkpoint.values())
    if wanted in (None, "average") and not averages:
        if is_bare:
            return Weights("only", "", checkpoint, settings, checkpoint)
        if len(sets) == 1 and (wanted is None or "unaveraged" not in next(iter(sets))):
            ((key, state_dict),) = sets.items()
            return Weights("only", key, state_dict, settings, checkpoint)
    keys = [key for key in sets if kinds[key] == "raw"] if wanted == "raw" else []
    keys = averages if wanted in (None, "average") else keys
    if len(keys) == 1:
        return Weights(kinds[keys[0]], keys[0], sets[keys[0]], settings, checkpoint)
    asked = "" if wanted is None else f"--weights {wanted}: "
    if is_bare and checkpoint:
        raise ValueError(f"{asked}{path} is a single set of weights without a name: leave --weights out")
    if not sets:
        held = ", ".join(map(str, list(checkpoint)[:10])) or "nothing"
        raise ValueError(f"{asked}{path} holds no set of weights (names to tensors) but {held}")
    held = ", ".join(f"{key} ({kinds[key]})" for key in sets)
    problem = "more than one could be meant" if keys or wanted is None else "not there"
    raise ValueError(f"{asked}{path} holds {held}: {problem}; name one with --weights")


def _weights_in(value: Any) -> Mapping[str, Tensor] | None:
    """A state dict: names to tensors, or a dict that wraps one and no other."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(name, str) for name in value):
        return None
    if all(isinstance(entry, Tensor) for entry in value.values()):
        return value if any("." in name for name in value) else None
    inner = [found for entry in value.values() if (found := _weights_in(entry)) is not None]
    return inner[0] if len(inner) == 1 else None


def _kind(key: str, keys: Mapping[str, Any]) -> str:
    """Whether a set of weights is an average, by its name: state_dict_ema, model_ema, averaged_model, wa_model, ..."""
    words = re.split("[^a-z]+", key.lower())
    if {"ema", "avg", "average", "averaged", "swa", "wa", "shadow"} & set(words):
        return "average"
    # The released code calls the average model_state_dict, and the trained weights unaveraged_model_state_dict.
    return "average" if f"unaveraged_{key}" in keys else "raw"


# --- Whose model ------------------------------------------------------------------------------------------------------


def add_model_flags(parser: flags.Parser, default_model: str | None = None) -> None:
    """The flags of a model for a file that does not say what it is, as others write them."""
    g = parser.add_argument_group("for a file without settings in it, as others write them")
    shown = f" ({default_model})" if default_model else ""
    own = "your own, FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION, which is to be named for files with settings too"
    g.add_argument("--model", default=None, help=f"wrn-D-W[-swish], preact-resnetD[-swish], resnetD{shown}, or {own}")
    add_dataset_flags(g)
    flags.add_switch(g, "--group-norm", "--GroupNorm", default=None, help="GroupNorm in the place of BatchNorm")
    add_normalization_flags(g, default=None)


def model_settings(weights: Weights, path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make the model of `weights` and choose its data: the file's, or where it has none the flags'.

    given: the flags of `add_model_flags`, None where they were left out; others are passed over. Statistics that a
    file keeps among its weights are its model's. Raises ValueError where file and flags differ, FileError where the
    file's settings are no such settings.
    """
    data_dir = given.get("data_dir")
    given = with_own_model({name: given[name] for name in MODEL_SETTINGS if given.get(name) is not None})
    statistics = statistics_of(weights.state_dict)
    if weights.settings is not None:
        settings = model_settings_of(weights.settings, path)
        check_same_model({"model": given.get("model", settings["model"])}, settings, path)
        check_own(weights.settings, path)
        if "mean" not in weights.settings:  # Then the flag was kept as it was given, and said nothing of Swish models.
            given = as_swish_models_do(given, settings["model"], f" ({path})")
        if is_path(given.get("dataset", "")) and is_path(settings["dataset"]):  # other images of the same classes
            given = {"image_size": settings["image_size"], **given}
            given["dataset_content"] = resolve_images({**given, "data_dir": data_dir})["dataset_content"]
            check_same_model(given, settings, path)
            return settings | {name: given[name] for name in OF_IMAGES}
    elif "model" not in given:
        raise ValueError(f"{path} has no settings in it: say what it is with --model (and --dataset, --normalize)")
    else:
        settings = {"dataset": "cifar10", "group_norm": False, "normalize": None, "image_size": None, **given}
        content = resolve_images({**settings, "data_dir": data_dir}).get("dataset_content")
        settings |= {"dataset_content": content}
        if statistics and settings["normalize"] is not False and not is_own(settings["model"]):
            settings = statistics | settings
        settings |= resolve_normalization({**settings, "data_dir": data_dir})
        if not settings["normalize"] and settings["model"].endswith("-swish"):
            though = "though the Swish models of train.py and of the released code do"
            logger.warning("--normalize false: %s is taken not to normalize, %s", path, though)
    check_same_model(given, settings, path)
    return {name: settings[name] for name in MODEL_SETTINGS}


def model_settings_of(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The model's part of the settings in a file of ours, checked."""
    settings = upgraded(settings)
    settings = {name: settings[name] for name in MODEL_SETTINGS if name in settings}
    check_settings(settings, MODEL_SETTINGS, path)
    for name in ("mean", "std"):
        numbers = settings[name] is None or [type(value) for value in settings[name]] == [float] * 3
        if not numbers or (settings[name] is None) == settings["normalize"]:
            raise FileError(f"{path}: {name} {settings[name]} with normalize {settings['normalize']}")
    name, content = settings["dataset"], settings["dataset_content"]
    if name not in DATASETS and not is_path(name):
        raise FileError(f"{path}: unknown dataset {name!r}; known are {', '.join(DATASETS)}")
    if is_path(name) != bool(content and CONTENT.fullmatch(content)):
        raise FileError(f"{path}: dataset {name} with dataset_content {content}")
    return settings


def check_own(settings: Mapping[str, Any], source: Path) -> None:
    """Raise ValueError where settings in a file name code that no command line has; warn where it is not as it was."""
    name, before = settings["model"], settings.get("model_content")
    check_used(name, source)
    now = content_of_own(name)
    if now is not None and before not in (None, now):
        logger.warning("--model %s: the file is not the one that %s was trained with", name, source)


def check_same_model(wanted: Mapping[str, Any], theirs: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError, naming all that differs, where a file was trained as another model than the one wanted."""
    differ = [name for name in MODEL_SETTINGS if name in wanted and wanted[name] != theirs[name]]
    if wanted.get("dataset_content") and theirs["dataset_content"]:
        differ = [name for name in differ if name not in OF_IMAGES]
        if not same_classes(wanted["dataset_content"], theirs["dataset_content"]):
            counts = [values["dataset_content"].partition("x")[0] for values in (wanted, theirs)]
            raise ValueError(
                f"--dataset {wanted['dataset']}: {path} was trained on other classes, those of {theirs['dataset']} "
                f"({counts[0]} here, {counts[1]} there; their names and order count)"
            )
    if differ:
        asked, trained = (
            " ".join(f"{flag_of(name)} {flags.plain(values[name])}" for name in differ) for values in (wanted, theirs)
        )
        raise ValueError(f"{asked}: {path} was trained with {trained}")


def load_pretrained(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Load the weights that --pretrained names: a folder's latest checkpoint, a checkpoint file, a bare state dict.

    Raises ValueError, or FileError or FileNotFoundError, also where they are of another model than `settings` say.
    """
    path = Path(settings["pretrained"])
    flag = f"--pretrained {path}"
    if not path.exists():
        raise FileNotFoundError(f"{flag}: no such file or folder")
    if path.is_dir():
        loaded = Experiment.open(path).load_latest()
        if loaded is None:
            raise FileError(f"{flag}: the folder holds no checkpoint yet")
        state = loaded.state
        wanted = state["settings"]["burn_in_epochs"] + state["settings"]["epochs"]
        if state["progress"]["epoch"] < wanted:
            raise FileError(
                f"{flag}: {state['progress']['epoch']} of its {wanted} epochs are finished; "
                f"go on with --resume {path}, or name one of its checkpoint files"
            )
        path = loaded.path
        weights = choose_weights(state, path, settings["pretrained_weights"])
    else:
        weights = read_weights(path, settings["pretrained_weights"])
    if weights.settings is not None:
        check_same_model(settings, model_settings_of(weights.settings, path), path)
    load_weights(model, weights.state_dict, f"--pretrained {path}")
