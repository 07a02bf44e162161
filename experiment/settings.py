"""The settings of a run, as args.yaml and every checkpoint hold them: flags and recipe resolved, one plain value each.

What a setting means is said by its flag, in train_flags.py (`--burn-in-epochs` is burn_in_epochs); what it is where the
flag is left out, by recipes.py. Here they are put together, and read again from files that may be of other versions.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from data import DATASETS, describe, is_path
from dyart.losses import SHARED, SINGLE_STEP
from dyart.margin import SEARCHES
from experiment import flags
from experiment.images import OWN, find_own_images, mean_and_std, resolve_images
from experiment.recipes import ATTACK_EPS, MOMENTUM, TRAINING, recipe
from experiment.schedules import SCHEDULES
from experiment.train_flags import build_parser, flag_of
from models.own import content_of_own, is_own
from storage.files import FileError

# --- Which settings there are -----------------------------------------------------------------------------------------

# Settings that are lengths: on a command line the norm decides what they mean.
LENGTHS = ("r0", "init_radius", "attack_eps", "attack_step")
# Flags that are not settings of a run: what to do rather than what to train.
ACTIONS = ("resume", "dry_run", "name", "name_extra", "if_exists", "output_dir", "process_timeout_minutes")
# Settings that say where and how, not what comes out: they are not in a folder's name, and may change on resume.
PLACE = ("data_dir", "device", "save_every", "track_dynamics", "checkpoint_minutes", "detect_anomaly")
PLACE += ("tf32", "compile", "cuda_graphs", "cache_dir", "aux_data_content", "model_content", "tensorboard")
# Of these, what is of one machine: exported weights go on with what is the default where they are read.
OF_MACHINE = ("data_dir", "device", "cache_dir")
# Settings that decide what others are by default; of a search's own there is TRAINING.
DECIDING = (
    "dataset",
    "dataset_content",
    "method",
    "recipe",
    "model",
    "norm",
    "group_norm",
    "aux_data_filename",
    "pretrained",
)
# Settings that were added since format 1 of the folder, with what a folder without them goes on with (see `upgraded`).
LATER = {"tf32": True, "cuda_graphs": False, "overshoot": 0.0, "recipe": "paper"}
LATER |= dict.fromkeys(OWN) | {"sync_batch_norm": False}
LATER |= {"rules": 1, "pretrained_weights": None, "cache_dir": None, "aux_data_content": None}
LATER |= {"model_content": None, "tensorboard": False, "adaptive_steps": False}
NULLABLE = {"clip_grad", "train_subset", "search_steps", "init_radius", "validation_size"}
NULLABLE |= {"cache_dir", "aux_data_content", "model_content", *OWN}
NULLABLE |= {"mean", "std", "pretrained", "pretrained_weights", "aux_data_filename", "checkpoint_minutes"}

# --- From flags and recipe --------------------------------------------------------------------------------------------


def not_taken_by(method: str) -> tuple[str, ...]:
    """The settings of PGD that are not to be given for a method. Its validation's step is a quarter of --attack-eps."""
    return ("attack_step", "attack_iter") if method in SINGLE_STEP else ()


def with_lengths(given: Mapping[str, Any], norm: str) -> dict[str, Any]:
    """The flags with the lengths among them as numbers, in units of pixels in [0, 1]."""
    texts = {name: given[name] for name in LENGTHS if isinstance(given.get(name), str)}
    return dict(given) | {
        name: flags.length(text, norm, flag_of(name), zero=True).value for name, text in texts.items()
    }


def resolve(given: dict[str, Any]) -> dict[str, Any]:
    """Every setting of a run from the flags that were given. Raises ValueError where they do not go together."""
    values = vars(build_parser().parse_args([])) | given
    values = with_lengths(values, values["norm"])
    dataset, method, norm = values["dataset"], values["method"], values["norm"]
    generated = values["aux_data_filename"] is not None
    # What is given goes before the recipe.
    group_norm, name = values["group_norm"], values["recipe"]
    values = recipe(dataset, method, generated=generated, group_norm=group_norm, norm=norm, name=name) | values
    values |= resolve_images(values)
    values |= resolve_normalization(values) | {"model_content": content_of_own(values["model"])}
    values.setdefault("attack_eps", ATTACK_EPS[values["norm"]])
    values.setdefault("attack_step", values["attack_eps"] / 4)
    alone = [name for name in ("high_quality", "init_radius", "cuda_graphs") if values.get(name)]
    if alone and "search" not in given:
        values["search"] = "fast"
    if alone and values["search"] == SHARED:
        flag = f"{flag_of(alone[0])} {flags.plain(given[alone[0]])}"
        raise ValueError(f"{flag}: goes with --search {' or '.join(SEARCHES)}, not with {SHARED}")
    if values["adaptive_steps"] and values["search"] != SHARED:
        raise ValueError(f"--adaptive-steps true: goes with --search {SHARED}, not with {values['search']}")
    own = TRAINING[values["search"]]
    values = own | values
    if values["search_steps"] is None:
        values["search_steps"] = own["search_steps"]
    if values["pretrained"] is not None and method == "dyart":
        if given.get("burn_in_epochs"):
            raise ValueError(f"--burn-in-epochs {given['burn_in_epochs']}: --pretrained takes the place of a burn-in")
        values["burn_in_epochs"] = 0
    if values["pretrained"] is None and values["pretrained_weights"] is not None:
        raise ValueError(f"--weights (--pretrained-weights) {values['pretrained_weights']}: needs --pretrained FILE")
    if method == "clean" and values["burn_in_epochs"]:
        raise ValueError(f"--burn-in-epochs {values['burn_in_epochs']}: clean training is the burn-in; use --epochs")
    if method in ("trades", "mart") and values["beta"] <= 0:
        raise ValueError(f"--beta {values['beta']:g}: {method} needs a number above 0")
    for name in not_taken_by(method):
        if name in given:
            raise ValueError(f"{flag_of(name)} {given[name]}: {method} takes one step, whose length --attack-eps sets")
    if "unsup_fraction" in given and not generated:
        raise ValueError(f"--unsup-fraction {given['unsup_fraction']}: of what? Name a file with --aux-data-filename")
    if values["momentum"] != MOMENTUM and SCHEDULES[values["scheduler"]].cycles_momentum:
        own = ", ".join(name for name, schedule in SCHEDULES.items() if not schedule.cycles_momentum)
        raise ValueError(
            f"--momentum {values['momentum']}: {values['scheduler']} sets its own; --scheduler {own} use it"
        )
    return {name: value for name, value in values.items() if name not in ACTIONS}


def resolve_normalization(values: Mapping[str, Any]) -> dict[str, Any]:
    """normalize, mean and std of a model, from those of them that are given, its name and its dataset.

    Where the model does not normalize, mean and std are None. Raises ValueError where what is given does not fit.
    """
    given = {name: values[name] for name in ("mean", "std") if values.get(name) is not None}
    normalize = values.get("normalize")
    if is_own(values["model"]) and (given or normalize):
        flag = f"--{next(iter(given), 'normalize')}"
        where = "inside it, or not at all (models/normalization.py has a layer for it)"
        raise ValueError(f"{flag}: a model of your own, {values['model']}, normalizes {where}")
    if given and normalize is False:
        name, value = next(iter(given.items()))
        raise ValueError(f"--{name} {flags.plain(value)}: without effect where --normalize is false")
    if min(given.get("std", [1])) <= 0:
        raise ValueError(f"--std {flags.plain(given['std'])}: must be positive")
    if normalize is None:
        normalize = bool(given) or values["model"].endswith("-swish")
    usual = {"mean": None, "std": None}
    if normalize and len(given) < 2:
        usual = mean_and_std(values)
    return {"normalize": normalize, **usual, **given}


# --- From files -------------------------------------------------------------------------------------------------------


def upgraded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a file, with those that the version which wrote them did not have; unchecked."""
    settings = LATER | dict(settings)
    known = type(settings.get("normalize")) is bool and type(settings.get("model")) is str
    if known and "mean" not in settings and settings.get("dataset") in list(DATASETS):
        # Then the Swish models normalized whatever the setting said.
        normalize = settings["normalize"] or settings["model"].endswith("-swish")
        settings |= resolve_normalization({**settings, "normalize": normalize})
    return settings


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings without the paths of its machine, but for those that name its images and its model."""
    settings = {name: value for name, value in settings.items() if name not in OF_MACHINE}
    files = ("pretrained", "aux_data_filename")
    return settings | {name: Path(settings[name]).name for name in files if settings.get(name)}


def with_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in an exported file, with the places of this machine that `without_places` left out; upgraded."""
    return {name: value for name, value in resolve({}).items() if name in OF_MACHINE} | upgraded(settings)


def check_stored(settings: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
    """Hold settings read from a file against the flags they come from: names, types and ranges.

    Returns them, with those that the version which wrote them did not have. Raises FileError.
    """
    settings = upgraded(settings)
    spec: dict[str, Any] = {}
    for name, value in resolve({}).items():
        kind = float if value is None else type(value)
        texts = ("pretrained", "pretrained_weights", "aux_data_filename", "aux_data_content", "cache_dir")
        texts += ("model_content", "dataset_content")
        kind = str if name in texts else kind
        kind = int if name in ("train_subset", "search_steps", "validation_size", "image_size") else kind
        kind = list if name in ("mean", "std") else kind
        spec[name] = (kind, type(None)) if name in NULLABLE else kind
    check_settings(settings, spec, source)
    argv = [f"{flag_of(name)}={flags.plain(value)}" for name, value in settings.items() if value is not None]

    def refuse(message: str) -> NoReturn:
        raise FileError(f"{source}: {message}")

    parser = build_parser()
    parser.error = refuse
    parser.parse_args(argv)
    if is_path(settings["dataset"]) != (settings["dataset_content"] is not None):
        refuse(f"dataset {settings['dataset']} with dataset_content {settings['dataset_content']}")
    return {name: settings[name] for name in spec}


def check_settings(
    settings: Mapping[str, Any], spec: Mapping[str, type | tuple[type, ...]], source: str | Path = "args.yaml"
) -> None:
    """Hold `settings` against the type, or types, that `spec` gives for every name (type(None): may be null).

    An int passes for a float; a bool passes for neither. Raises FileError, one line with everything that is
    unknown (and the nearest known name), missing or ill-typed; `source` is the file it names.
    """
    problems = [f"setting {key!r} is missing" for key in spec if key not in settings]
    for key, value in settings.items():
        if key not in spec:
            near = difflib.get_close_matches(key, spec, n=1)
            problems.append(f"unknown setting {key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
            continue
        types = spec[key] if isinstance(spec[key], tuple) else (spec[key],)
        if type(value) not in types and not (type(value) is int and float in types):
            names = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            problems.append(f"{key!r} must be {names}, is {str(value)[:50]!r} ({type(value).__name__})")
    if problems:
        raise FileError(f"{source}: " + "; ".join(problems))


# --- In words ---------------------------------------------------------------------------------------------------------


def deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide what others are by default; own images also decide by their mean and deviation."""
    own = ("normalize", "mean", "std") if is_path(settings["dataset"]) else ()
    return {name: settings[name] for name in (*DECIDING, *own)}


def as_yaml(settings: Mapping[str, Any]) -> str:
    """Settings as args.yaml has them, and what there is to know of own images as comments."""
    text = yaml.safe_dump(dict(settings), sort_keys=False)
    if is_path(settings["dataset"]):
        text += "".join(f"# {line}\n" for line in describe(find_own_images(settings)).splitlines())
    return text


def default_name(settings: dict[str, Any]) -> str:
    """dataset-method-model and each setting that differs from the recipe."""
    usual = resolve(deciding(settings)) | TRAINING[settings["search"]]
    model = re.sub(r"(\.py)?:", "-", settings["model"])  # of one's own
    words = [Path(settings["dataset"]).stem, settings["method"], model]
    words += [word for word, on in (("L2", settings["norm"] == "L2"), ("groupnorm", settings["group_norm"])) if on]
    words += ["generated"] if settings["aux_data_filename"] else []
    words += ["short"] if settings["recipe"] == "short" else []
    for name, value in settings.items():
        if name not in (*PLACE, *not_taken_by(settings["method"])) and value != usual[name]:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            words.append(f"{name.replace('_', '-')}={shown}")
    return "-".join(words).replace("/", "_")[:200]
