"""The settings of a run: the paper's recipes, the flags that change them, and what args.yaml may hold."""

import argparse
import difflib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from data import DATASETS, DEFAULT_DATA_DIR, describe, is_path
from dyart.losses import LOSSES, SHARED, SHARED_STEPS, SINGLE_STEP
from dyart.margin import SEARCHES
from dyart.modes import PRECISIONS
from dyart.projection import NORMS
from experiment import flags
from experiment.flags import add_switch, number, optional, path, whole
from experiment.images import OWN, add_dataset_flags, add_own_flags, find_own_images, mean_and_std, resolve_images
from experiment.schedules import SCHEDULES
from models import create_model
from models.own import content_of_own, is_own, short_name, use_own
from storage.files import FileError

logger = logging.getLogger(__name__)

# --- Recipes (Xu et al., 2023, section 5 and appendix): what a flag leaves open is taken from here -------------------

CIFAR10 = {
    "model": "wrn-28-10-swish",
    "burn_in_epochs": 10,
    "burn_in_batch_size": 256,
    "epochs": 200,
    "scheduler": "cosinew",
    "lr": 0.1,
    "batch_size": 256,
    "r0": 16 / 255,
    "alpha": 3.0,
    "lambda_robust": 1000.0,
    "clip_grad": 0.1,
    "search": "fast",
}
RECIPES = {
    "cifar10": CIFAR10,
    "cifar100": CIFAR10,
    "tiny-imagenet": CIFAR10
    | {"model": "preact-resnet18", "burn_in_epochs": 20, "epochs": 100}
    | {"r0": 32 / 255, "alpha": 5.0, "lambda_robust": 500.0, "clip_grad": 1.0},
    # Not the paper's: the dataset that the tests run on.
    "digits": CIFAR10 | {"model": "wrn-10-1-swish", "epochs": 20, "batch_size": 64},
}
GENERATED_DATA = {"epochs": 800, "batch_size": 512, "lambda_robust": 800.0}
GROUP_NORM = {"scheduler": "step", "epochs": 100, "alpha": 8.0, "lambda_robust": 400.0, "clip_grad": None}
GROUP_NORM_TINY_IMAGENET = {"lr": 0.05, "r0": 20 / 255, "alpha": 3.0, "lambda_robust": 500.0, "clip_grad": None}
# Not the paper's, which has no l2: r0 is twice the radius of attack, as in the other recipes; alpha keeps alpha r0, and
# lambda the robust term's share of the gradient, for 1/|grad|_2 is some 44 times 1/|grad|_1 (docs/results.md).
L2 = {"r0": 1.0, "alpha": 0.2, "lambda_robust": 25.0}
# Not the paper's, whose clipping holds a short training back: for up to some 30 epochs (docs/results.md).
SHORT = {"burn_in_epochs": 4, "burn_in_batch_size": 128, "epochs": 26, "batch_size": 128, "scheduler": "cyclic"}
SHORT |= {"lambda_robust": 150.0, "clip_grad": 3.0, "search": SHARED}
SHORT_DATASETS = ("cifar10", "cifar100", "digits")
ATTACK_EPS = {"Linf": 8 / 255, "L2": 128 / 255}
MOMENTUM = 0.9
PROCESS_TIMEOUT_MINUTES = 10.0


def recipe_of(dataset: str) -> dict[str, Any]:
    """The paper's recipe of a dataset; that of CIFAR-10 for one's own images, of which nothing is known."""
    return CIFAR10 if is_path(dataset) else RECIPES[dataset]


def recipe(
    dataset: str, method: str, *, generated: bool, group_norm: bool, norm: str = "Linf", name: str = "paper"
) -> dict[str, Any]:
    """The defaults of a dataset and method. Clean training alone is the burn-in: constant rate.

    Raises ValueError where there is no recipe of this name.
    """
    values = dict(recipe_of(dataset))
    if name == "short":
        if not (dataset in SHORT_DATASETS or is_path(dataset)) or generated or group_norm or norm != "Linf":
            only = f"{', '.join(SHORT_DATASETS)} in Linf, without generated data and GroupNorm"
            raise ValueError(f"--recipe short: is for {only}; for others nobody has looked for one")
        values |= SHORT
    if generated:
        values |= GENERATED_DATA
    if group_norm:
        values |= GROUP_NORM_TINY_IMAGENET if dataset == "tiny-imagenet" else GROUP_NORM
    if norm == "L2":
        values |= L2 | ({"r0": 2 * L2["r0"]} if dataset == "tiny-imagenet" else {})
    if method == "clean":
        values |= {"epochs": values["burn_in_epochs"], "scheduler": "constant", "lr": 0.1}
        values["batch_size"] = values["burn_in_batch_size"]
    # Clipping belongs to DyART's recipe; the baselines share its optimizer, schedule and average only.
    if method != "dyart":
        values |= {"burn_in_epochs": 0, "clip_grad": None}
    return values


# --- Flags: after a clear name stands the released code's spelling of the same ----------------------------------------


def model_name(text: str) -> str:
    """A model's name, checked by building it without memory for its weights; one's own is checked where it is used."""
    try:
        if is_own(text):
            short_name(text)
            return text
        with torch.device("meta"):
            create_model(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def folder_name(text: str) -> str:
    """The name of a folder, or a part of one."""
    if "/" in text or "\0" in text or text in (".", ".."):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be the name of a folder; where it is made: --output-dir")
    return text


def released_beta(text: str) -> float:
    """The weight of a baseline's KL term, or the released code's -1, which means that there is none."""
    value = number(least=-1)(text)
    if -1 < value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 (nor -1, the released spelling of AT)")
    return value


def add_normalization_flags(group: Any, default: Any) -> None:
    """The flags that say whether a model normalizes its input, and by what."""
    add_switch(group, "--normalize", default=default, help="normalize inside the model (the Swish models do)")
    for name, what in (("--mean", "mean"), ("--std", "standard deviation")):
        help_ = f"{what} of the colour channels to normalize by (the dataset's)"
        group.add_argument(name, metavar="R,G,B", type=flags.triple, default=default, help=help_)


def build_parser() -> flags.Parser:
    """The flags of train.py; those whose default is SUPPRESS take it from the recipe, or from other flags."""
    p = flags.Parser(prog="train.py", description="Train into an experiment folder: burn-in, then a method.")
    from_recipe = argparse.SUPPRESS
    positive = number(above=0)
    length = flags.length_text(positive)

    g = p.add_argument_group("what is trained")
    add_dataset_flags(g, "cifar10")
    add_own_flags(g)
    g.add_argument("--data-dir", type=path, default=str(DEFAULT_DATA_DIR), help="where prepared datasets lie")
    g.add_argument(
        "--model",
        type=model_name,
        default=from_recipe,
        help="wrn-D-W[-swish], preact-resnetD[-swish], resnetD, or your own, FILE.py:FUNCTION or "
        "PACKAGE.MODULE:FUNCTION (the recipe's)",
    )
    add_switch(g, "--group-norm", "--GroupNorm", default=False, help="GroupNorm in the place of BatchNorm")
    add_normalization_flags(g, default=from_recipe)
    g.add_argument("--method", choices=list(LOSSES), default="dyart", help="of training, after the burn-in")
    recipes = "which values the flags have that are left out; short: for up to some 30 epochs"
    g.add_argument("--recipe", choices=["paper", "short"], default="paper", help=recipes)
    g.add_argument("--pretrained", metavar="FILE|FOLDER", type=path, default=None, help="weights to start from")
    which = "of a file with several: average, raw or a name in the file (the average, where there is one)"
    g.add_argument("--pretrained-weights", "--weights", metavar="NAME", default=None, help=which)

    g = p.add_argument_group("training (where no default is given: the recipe's)")
    g.add_argument(
        "--burn-in-epochs", type=whole(), default=from_recipe, help="epochs of clean training before the method"
    )
    g.add_argument("--burn-in-lr", type=positive, default=0.1, help="its constant learning rate")
    g.add_argument("--burn-in-batch-size", type=whole(least=1), default=from_recipe, help="its batch size")
    g.add_argument("--epochs", type=whole(least=1), default=from_recipe, help="epochs of the method")
    g.add_argument("--batch-size", type=whole(least=1), default=from_recipe, help="images a step")
    g.add_argument("--lr", type=positive, default=from_recipe, help="learning rate, at its peak")
    g.add_argument("--scheduler", choices=list(SCHEDULES), default=from_recipe, help="of the learning rate")
    g.add_argument(
        "--momentum", type=number(least=0, most=0.999), default=MOMENTUM, help="one-cycle schedules set their own"
    )
    add_switch(g, "--nesterov", default=True, help="Nesterov momentum")
    g.add_argument("--weight-decay", type=number(least=0), default=5e-4, help="not on a WRN's normalization layers")
    g.add_argument(
        "--clip-grad", "--clip_grad", type=optional(positive), default=from_recipe, help="gradient norm, or none"
    )
    g.add_argument("--tau", type=number(least=0, most=0.999999), default=0.995, help="decay of the weight average")
    add_switch(g, "--augment", default=True, help="random crop and flip")
    g.add_argument("--train-subset", type=optional(whole(least=1)), default=None, help="this many, class-balanced")
    g.add_argument("--seed", type=whole(most=2**32 - 1), default=0, help="of weights, batches and attacks")

    g = p.add_argument_group("DyART (where no default is given: the recipe's)")
    g.add_argument(
        "--r0", "--h_prime_r0", type=length, default=from_recipe, help="larger margins are left alone: 16/255"
    )
    g.add_argument(
        "--alpha", "--h_prime_alpha", type=number(least=0), default=from_recipe, help="priority of small margins"
    )
    g.add_argument(
        "--lambda-robust", "--lam_robust", type=number(least=0), default=from_recipe, help="of the robust term"
    )
    g.add_argument("--temperature", type=positive, default=5.0, help="of the soft logit margin")
    g.add_argument("--norm", choices=list(NORMS), default="Linf", help="of margins and attacks")
    g.add_argument(
        "--search", choices=list(TRAINING), default=from_recipe, help="for boundary points; fab: as released"
    )
    steps = "iterations; with shared, linearizations (the search's own)"
    g.add_argument("--search-steps", type=optional(whole(least=1)), default=None, help=steps)
    from_zero = flags.length_text(number(least=0))
    g.add_argument("--init-radius", type=optional(from_zero), default=None, help="twice the starting noise")
    high_quality = "leave poor boundary points out (true; there is no telling with shared)"
    add_switch(g, "--high-quality", "--use_high_quality", default=from_recipe, help=high_quality)
    overshoot = (
        "train so far beyond boundary points, as a share of their distance (0.05; with fab, whose are beyond, 0)"
    )
    g.add_argument("--overshoot", type=number(least=0), default=from_recipe, help=overshoot)

    g = p.add_argument_group("baselines, and the attack of baselines and validation")
    g.add_argument("--beta", type=released_beta, default=6.0, help="of TRADES and MART")
    g.add_argument("--attack-eps", type=length, default=from_recipe, help="8/255 for Linf, 128/255 for L2")
    g.add_argument("--attack-step", type=length, default=from_recipe, help="of PGD: a quarter of --attack-eps")
    g.add_argument("--attack-iter", type=whole(least=1), default=10, help="PGD steps of AT, TRADES and MART")
    g.add_argument("--validation-attack-iter", type=whole(least=1), default=40, help="PGD steps of validation")
    g.add_argument("--validation-size", type=optional(whole(least=1)), default=None, help="images, of those held out")
    g.add_argument("--validation-batch-size", "--batch-size-validation", type=whole(least=1), default=512, help="same")

    g = p.add_argument_group("generated data")
    g.add_argument(
        "--aux-data-filename", metavar="FILE.npz", type=path, default=None, help="with `image` and `label`; any size"
    )
    g.add_argument("--cache-dir", type=path, default=None, help="for the copy of a compressed one (beside the file)")
    # Which file it was, for when it has moved; filled in when a run begins.
    g.add_argument("--aux-data-content", default=None, help=argparse.SUPPRESS)
    g.add_argument("--unsup-fraction", type=number(least=0, most=1), default=0.7, help="generated share of a batch")

    g = p.add_argument_group("the run")
    g.add_argument("--output-dir", default="experiments", help="where experiment folders are made")
    g.add_argument(
        "--name", type=folder_name, default=None, help="of the folder; by default dataset-method-model and what differs"
    )
    g.add_argument(
        "--name-extra", "--fname_extra", metavar="TEXT", type=folder_name, default="", help="appended to the name"
    )
    exists = "a folder is never overwritten; resume: go on with it, if it has the same settings"
    g.add_argument("--if-exists", choices=["rename", "stop", "resume"], default="rename", help=exists)
    g.add_argument("--resume", metavar="FOLDER", default=None, help="go on with this experiment folder")
    g.add_argument(
        "--save-every", "--save_intermediate_models", type=whole(), default=0, help="epochs, to epoch_NNNN.pt"
    )
    g.add_argument("--track-dynamics", type=whole(), default=0, help="epochs: speeds into metrics.csv; 0: never")
    g.add_argument("--checkpoint-minutes", type=optional(positive), default=None, help="also within an epoch")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    g.add_argument("--amp", choices=PRECISIONS, default="none", help="bfloat16 in searches only, or in all of a step")
    add_switch(g, "--channels-last", default=True, help="memory format of weights and images")
    add_switch(g, "--tf32", default=True, help="TensorFloat-32 for float32 on a GPU")
    add_switch(g, "--compile", default=False, help="torch.compile the model")
    graphs = "on a GPU, replay the boundary search from a captured graph (not with --detect-anomaly)"
    add_switch(g, "--cuda-graphs", default=False, help=graphs)
    sync = "with several processes, each on a GPU: statistics of the whole batch, not of each process's rows"
    add_switch(g, "--sync-batch-norm", default=False, help=sync)
    wait = "how long one of several processes waits for another"
    g.add_argument("--process-timeout-minutes", type=positive, default=PROCESS_TIMEOUT_MINUTES, help=wait)
    add_switch(g, "--detect-anomaly", default=False, help="say which operation made a NaN; slow")
    add_switch(g, "--tensorboard", default=False, help="curves, margins and images, too (needs the package)")
    add_switch(g, "--dry-run", default=False, help="print the resolved settings as YAML and stop")

    # The file of one's own model when the run began, for when it has changed; filled in by `resolve`.
    p.add_argument("--model-content", default=None, help=argparse.SUPPRESS)
    # What has changed in how settings are followed. 2: validation images, class-balanced where a dataset is sorted; the
    # momentum of BatchNorm's statistics in short runs.
    p.add_argument("--rules", type=whole(least=1, most=2), default=2, help=argparse.SUPPRESS)

    # Released spellings that have no flag of their own here; `translate` says what they mean.
    add_switch(p, "--clean_training", default=from_recipe, help=argparse.SUPPRESS)
    add_switch(p, "--DyART", dest="dyart", default=from_recipe, help=argparse.SUPPRESS)
    add_switch(p, "--mart", default=from_recipe, help=argparse.SUPPRESS)
    p.add_argument("--iter_FAB", type=whole(least=1), default=from_recipe, help=argparse.SUPPRESS)
    p.add_argument("--eps_FAB", type=from_zero, default=from_recipe, help=argparse.SUPPRESS)
    p.add_argument("--attack", choices=["linf-pgd", "l2-pgd"], default=from_recipe, help=argparse.SUPPRESS)
    p.add_argument("--resume_fname", default=from_recipe, help=argparse.SUPPRESS)
    return p


# Settings that are lengths: on a command line the norm decides what they mean.
LENGTHS = ("r0", "init_radius", "attack_eps", "attack_step")
# Flags that are not settings of a run: what to do rather than what to train.
ACTIONS = ("resume", "dry_run", "name", "name_extra", "if_exists", "output_dir", "process_timeout_minutes")
# Settings that say where and how, not what comes out: they are not in a folder's name, and may change on resume.
PLACE = ("data_dir", "device", "save_every", "track_dynamics", "checkpoint_minutes", "detect_anomaly")
PLACE += ("tf32", "compile", "cuda_graphs", "cache_dir", "aux_data_content", "model_content", "tensorboard")
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
LATER |= {"model_content": None, "tensorboard": False}
# What goes with each search in training. The released one ends some 5 % beyond the boundary, the others at it: trained
# on points of the fast one as they are, models are a little more accurate and a little less robust (docs/results.md),
# trained 5 % beyond them, alike.
TRAINING = {
    SHARED: {"search_steps": SHARED_STEPS, "overshoot": 0.05, "high_quality": False},
    "fast": {"search_steps": SEARCHES["fast"][1], "overshoot": 0.05, "high_quality": True},
    "fab": {"search_steps": SEARCHES["fab"][1], "overshoot": 0.0, "high_quality": True},
}
NULLABLE = {"clip_grad", "train_subset", "search_steps", "init_radius", "validation_size"}
NULLABLE |= {"cache_dir", "aux_data_content", "model_content", *OWN}
NULLABLE |= {"mean", "std", "pretrained", "pretrained_weights", "aux_data_filename", "checkpoint_minutes"}

# --- Settings: flags and recipe resolved, as they stand in args.yaml --------------------------------------------------


def parse(argv: list[str] | None) -> dict[str, Any]:
    """The flags that were given, by their clear names; defaults are left out."""
    parser, left_out = build_parser(), object()
    namespace = argparse.Namespace(**{action.dest: left_out for action in parser._actions})
    given = vars(parser.parse_args(argv, namespace))
    given = translate({name: value for name, value in given.items() if value is not left_out})
    given = with_own_model(given)
    if "resume" not in given:  # The model is the folder's there.
        dataset = given.get("dataset", parser.get_default("dataset"))
        hint = "; for one that does not: --mean 0,0,0 --std 1,1,1"
        given = as_swish_models_do(given, given.get("model", recipe_of(dataset)["model"]), hint)
    return given


def with_own_model(given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a command line, a model of one's own by its short name; its code runs here. Raises ValueError."""
    model = given.get("model")
    return {**given, "model": use_own(model)} if model is not None and is_own(model) else dict(given)


def as_swish_models_do(given: dict[str, Any], model: str, hint: str = "") -> dict[str, Any]:
    """The flags without a `--normalize false` for a Swish model, which is warned of.

    The released scripts give this flag to Swish models, and theirs normalize all the same.
    """
    if given.get("normalize") is not False or {"mean", "std"} & given.keys() or not model.endswith("-swish"):
        return given
    logger.warning("--normalize false: Swish models normalize, as in the released code%s", hint)
    return {name: value for name, value in given.items() if name != "normalize"}


def translate(given: dict[str, Any]) -> dict[str, Any]:
    """Put clear names in the place of the released code's spellings. Raises ValueError where flags contradict."""
    given = dict(given)

    def means(flag: str, name: str, value: Any) -> None:
        if given.setdefault(name, value) != value:
            raise ValueError(f"{flag} contradicts {flag_of(name)} {given[name]}")

    dyart = given.pop("dyart", None)
    for selected, flag, method in (
        (given.pop("clean_training", False), "--clean_training true", "clean"),
        (given.pop("mart", False), "--mart", "mart"),
        (dyart, "--DyART true", "dyart"),
    ):
        if selected:
            means(flag, "method", method)
    if dyart is False and given.setdefault("method", "trades" if given.get("beta", -1) > 0 else "at") == "dyart":
        raise ValueError("--DyART False contradicts --method dyart")
    if given.get("beta") == -1 and given.get("method") not in ("trades", "mart"):
        del given["beta"]
    # These two were written for the released search, and they mean what they meant.
    for released, name in (("iter_FAB", "search_steps"), ("eps_FAB", "init_radius")):
        if released in given:
            value = given.pop(released)
            means(f"--{released} {value}", name, value)
            given.setdefault("search", "fab")
    if "attack" in given:
        attack = given.pop("attack")
        means(f"--attack {attack}", "norm", {"linf-pgd": "Linf", "l2-pgd": "L2"}[attack])
    folder, wanted = given.pop("resume_fname", None), given.get("resume", "none").lower()
    if wanted in ("true", "false"):
        del given["resume"]
    if wanted == "true" and folder is None:
        raise ValueError("--resume True: say which folder, with --resume_fname FOLDER or --resume FOLDER")
    if folder is not None and wanted not in ("true", "false"):
        raise ValueError(f"--resume_fname {folder}: needs --resume True beside it; or just --resume {folder}")
    return given | ({"resume": folder} if wanted == "true" else {})


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


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


def upgraded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a file, with those that the version which wrote them did not have; unchecked."""
    settings = LATER | dict(settings)
    known = type(settings.get("normalize")) is bool and type(settings.get("model")) is str
    if known and "mean" not in settings and settings.get("dataset") in list(DATASETS):
        # Then the Swish models normalized whatever the setting said.
        normalize = settings["normalize"] or settings["model"].endswith("-swish")
        settings |= resolve_normalization({**settings, "normalize": normalize})
    return settings


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
