"""The flags of train.py: each is defined in `build_parser`; after a clear name stands the released code's spelling.

`parse` gives those that a command line has, by their clear names. What the others then are, settings.py resolves.
"""

import argparse
import logging
from collections.abc import Mapping
from typing import Any

import torch

from data import DEFAULT_DATA_DIR
from dyart.losses import LOSSES
from dyart.modes import PRECISIONS
from dyart.projection import NORMS
from experiment import flags
from experiment.flags import add_switch, number, optional, path, whole
from experiment.images import add_dataset_flags, add_own_flags
from experiment.recipes import MOMENTUM, TRAINING, recipe_of
from experiment.schedules import SCHEDULES
from models import create_model
from models.own import is_own, short_name, use_own

logger = logging.getLogger(__name__)

PROCESS_TIMEOUT_MINUTES = 10.0

# --- Types of flags and groups of them --------------------------------------------------------------------------------


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
    adaptive = "with shared: of these as many as a margin needs, and train on no margin beyond --r0"
    add_switch(g, "--adaptive-steps", default=False, help=adaptive)
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


# --- A command line ---------------------------------------------------------------------------------------------------


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
