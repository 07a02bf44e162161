"""Write an experiment's averaged weights for others: as RobustBench loads them, with a claim, or with a model card.

    python export.py experiments/NAME out.pt
    python export.py experiments/NAME out.safetensors

Both hold names and tensors only, in the names of RobustBench's DMWideResNet where the model is one. out.md says what
the weights are, what AutoAttack left of their accuracy (from autoattack.json), and how to check it: beside out.pt as a
leaderboard's claim, beside out.safetensors as a card to upload with them.
"""

import contextlib
import hashlib
import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from data import image_shape, is_path, num_classes
from evaluation.candidate import Candidate, load_candidate
from evaluation.results import Results, images_of, same_identity
from experiment import flags
from experiment.checkpoint import safetensors_bytes, write_torch
from experiment.folder import named_checkpoints
from experiment.settings import (
    LENGTHS,
    PLACE,
    check_stored,
    deciding,
    not_taken_by,
    resolve,
    resolve_normalization,
    upgraded,
    without_places,
)
from experiment.train_flags import flag_of
from experiment.weights import MODEL_SETTINGS, WEIGHTS_HELP
from models.own import is_own
from storage.files import FileError, naming, replacing, utf8, write_bytes

# What RobustBench ranks: the dataset, norm and ε of its leaderboards.
LEADERBOARDS = {("cifar10", "Linf", "8/255"), ("cifar10", "L2", "0.5"), ("cifar100", "Linf", "8/255")}


def build_parser() -> flags.Parser:
    """The flags of export.py."""
    p = flags.Parser(prog="export.py", description=__doc__.splitlines()[0])
    p.add_argument("folder", metavar="FOLDER", help="an experiment folder")
    out = "the file to write, OUT.pt with a claim or OUT.safetensors with a model card; that goes to OUT.md"
    p.add_argument("out", metavar="OUT.pt|OUT.safetensors", help=out)
    p.add_argument("--model", default=None, help="your own, as in training (FILE.py:FUNCTION), where it is one")
    p.add_argument("--checkpoint", metavar="NAME", default="best.pt", help="file of the folder")
    p.add_argument("--weights", metavar="NAME", default=None, help=WEIGHTS_HELP)
    flags.add_switch(p, "--force", default=False, help="overwrite files that exist")
    return p


# --- The run ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Export what the flags say. Raises ValueError or OSError, in one line, for what is wrong with them."""
    args = build_parser().parse_args(argv)
    folder, out = Path(args.folder), Path(args.out)
    text_file = out.with_suffix(".md")
    if out.suffix == ".md":
        raise ValueError(f"{out}: the weights need another suffix than the claim's, .pt for example")
    if out.parent.resolve() == folder.resolve():
        raise ValueError(f"{out}: choose a place outside the experiment folder")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent}")
    for path in (out, text_file):
        if path.exists() and not args.force:
            raise FileExistsError(f"{path} exists; --force overwrites it")

    (checkpoint,) = named_checkpoints(folder, [args.checkpoint])
    candidate = load_candidate(checkpoint, args.weights, {"model": args.model})
    records = Results(folder / "autoattack").current
    # As others expect them, also from a run in channels_last.
    weights = {name: value.contiguous() for name, value in candidate.model.state_dict().items()}
    if out.suffix == ".safetensors":
        content, kind = safetensors_bytes(weights, *header(candidate)), "card"
        text = card(candidate, records, out, hashlib.sha256(content).hexdigest())
    else:
        content, kind = weights, "claim"
        text = claim(candidate.settings, records, candidate.identity, out)
    write_both(out, content, text_file, text)
    print(f"weights  {out}\n{kind:8} {text_file}")
    return 0


def write_both(out: Path, weights: dict[str, Any] | bytes, text_file: Path, text: str) -> None:
    """Write weights and text, both or neither, and what was there stays until both are on the disk. FileError."""
    is_new = not out.exists()
    try:
        with naming("write", text_file), replacing(text_file) as file:
            file.write(utf8(text))
            file.flush()
            if isinstance(weights, bytes):
                write_bytes(out, weights)
            else:
                write_torch(out, weights)
    except FileError:
        if is_new:
            out.unlink(missing_ok=True)
        raise


# --- The claim --------------------------------------------------------------------------------------------------------


def claim(settings: Mapping[str, Any], records: list[dict[str, Any]], identity: Mapping[str, Any], out: Path) -> str:
    """The text of a leaderboard claim, in Markdown.

    settings: of the run; records: of autoattack.json, those of other weights are passed over; identity: of the weights,
    as `load_candidate` gives it; out: the file that the weights go to.
    """
    mine = [record for record in records if same_identity(record, {**record, **identity})]
    tested = list(filter(is_of_test, mine))
    full = [record for record in tested if record["version"] == "standard" and record["n"] == record["test_size"]]
    lines = [f"# {identity['model']} on {identity['dataset']}", ""]
    lines += [f"- Weights: `{out.name}`, the {identity['weights']} weights of `{identity['checkpoint']}`"]
    lines += [f"- SHA-256 of that checkpoint: {identity['sha256']}"]
    lines += [f"- Architecture: {architecture(identity)}", f"- Additional data: {additional_data(settings)}"]

    if not full:
        missing = "there is no record of AutoAttack's standard version on the whole test set"
        command = f"python eval.py FOLDER --checkpoint {identity['checkpoint']} --weights {identity['weights']}"
        command += " --eps 0.5 --norm L2" if settings.get("norm") == "L2" else " --eps 8"
        lines += ["", f"**No claim can be made: {missing}.** To make one: `{command}`"]
    lines += figures_of(mine)
    for record in full:
        if (record["dataset"], record["norm"], record["eps_text"]) in LEADERBOARDS:
            lines += ["", "RobustBench's entry (link, name, authors and venue are for you to add):", "", "```json"]
            lines += [json.dumps(entry(settings, record), indent=2), "```"]

    return "\n".join([*lines, *to_reproduce(settings, mine, out), ""])


def is_of_test(record: Mapping[str, Any]) -> bool:
    """Whether a record is of test images, not of those held out of training, which exported weights do not say."""
    return record.get("part", "test") == "test"


def figures_of(records: list[dict[str, Any]]) -> list[str]:
    """The lines of a table of AutoAttack's records, shares with their standard errors; none where there are none."""
    lines = ["", "| attack | ε | test images | clean | robust |", "| --- | --- | --- | --- | --- |"] if records else []
    for record in records:
        shown = images_of(record) + ("" if is_of_test(record) else ", of those held out for validation")
        cells = [f"AutoAttack {record['version']}, {record['norm']}", record["eps_text"], shown]
        for share in (record["clean_accuracy"], record["robust_accuracy"]):
            cells += [f"{share:.2%} ± {100 * math.sqrt(share * (1 - share) / record['n']):.2f}"]
        lines += [f"| {' | '.join(cells)} |"]
    return lines


def to_reproduce(settings: Mapping[str, Any], records: list[dict[str, Any]], out: Path) -> list[str]:
    """The lines with the commands of training and evaluation, as far as there are any."""
    commands = []
    with contextlib.suppress(ValueError):  # Settings that this version's flags cannot say.
        commands += ["# the training", train_command(check_stored(settings, "settings"))]
    tested = list(filter(is_of_test, records))
    if tested:
        knows = out.suffix == ".safetensors" and bool(settings)
        lines = (eval_command(record, out, knows) for record in tested)
        commands += ["# the figures, from the exported weights", *lines]
    return ["", "## To reproduce", "", "```", *commands, "```"] if commands else []


# --- The model card ---------------------------------------------------------------------------------------------------


def header(candidate: Candidate) -> tuple[dict[str, str], str, dict[str, Any] | None]:
    """What `safetensors_bytes` is to say of the weights: what they are, and what a checkpoint holds beside them."""
    identity, checkpoint = candidate.identity, candidate.checkpoint
    said = {name: flags.plain(value) for name, value in identity.items()}
    if not candidate.settings:
        return said, "", None
    beside = {name: checkpoint[name] for name in ("epoch", "validation") if name in checkpoint}
    return said, identity["weights_key"], {"settings": without_places(candidate.settings), **beside}


def card(candidate: Candidate, records: list[dict[str, Any]], out: Path, digest: str) -> str:
    """A model card in Markdown, with the head in YAML that the Hugging Face Hub reads.

    candidate: what is exported; records: of autoattack.json, those of other weights are passed over; out: the file that
    the weights go to, digest: its SHA-256.
    """
    identity, settings = candidate.identity, candidate.settings
    mine = [record for record in records if same_identity(record, {**record, **identity})]
    data = identity["dataset"], identity["dataset_content"]
    (height, width, _), classes, images = image_shape(*data), num_classes(*data), Path(identity["dataset"]).name
    name = f"{identity['model']} on {images}"
    head: dict[str, Any] = {"library_name": "pytorch", "pipeline_tag": "image-classification"}
    head["tags"] = ["image-classification", "adversarial-robustness", "dyart", images]
    if tested := list(filter(is_of_test, mine)):
        task = {"type": "image-classification"}
        dataset = {"name": images, "type": images, "split": "test"}
        metrics = [{"type": "accuracy", "name": "clean", "value": tested[-1]["clean_accuracy"]}]
        for record in tested:
            what = f"AutoAttack {record['version']}, {record['norm']}, {record['eps_text']}, {images_of(record)} images"
            metrics += [{"type": "accuracy", "name": what, "value": record["robust_accuracy"]}]
        head["model-index"] = [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}]
    lines = ["---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", "", f"# {name}", ""]

    method = settings.get("method", "unknown")
    lines += [f"Trained for robustness against small perturbations by `train.py` of dyart (method `{method}`)."]
    lines += ["", "## Model", "", f"- {architecture(identity)}"]
    lines += [f"- Input: images (n, 3, {height}, {width}), pixels in [0, 1]; output: logits"]
    lines += [f"- Weights: `{out.name}`, SHA-256 {digest}"]
    lines += [f"- Taken from the {identity['weights']} weights of `{identity['checkpoint']}`, {identity['sha256']}"]
    if settings.get("model_content"):
        lines += [f"- Source of the model: SHA-256 {settings['model_content']}"]
    lines += ["", "```python", *loading(identity, out), "```"]

    size = f"{classes} classes, {width} x {height} pixels"
    lines += ["", "## Data", "", f"- {images}: {size}"]
    if settings.get("train_subset"):
        lines += [f"- Of its training images, {settings['train_subset']} class-balanced ones"]
    lines += [f"- Additional data: {additional_data(settings)}", "", "## Recipe", "", "```yaml"]
    shown = without_places(settings)
    shown = {name: value for name, value in shown.items() if name not in (*PLACE, *MODEL_SETTINGS)}
    lines += [yaml.safe_dump(shown, sort_keys=False).rstrip(), "```", "", "## Figures"]

    scores = candidate.checkpoint.get("validation")
    if isinstance(scores, Mapping) and {"val_clean", "val_robust"} <= scores.keys() and {"norm"} <= settings.keys():
        radius, steps = settings["attack_eps"], settings["validation_attack_iter"]
        attack = f"PGD-{steps}, {settings['norm']}, ε {flags.length_words(radius, settings['norm'])}"
        clean, robust = scores["val_clean"], scores["val_robust"]
        lines += ["", f"On held-out training images: {clean:.2%} clean, {robust:.2%} robust ({attack})."]
    lines += figures_of(mine) or ["", "Not evaluated by AutoAttack."]
    return "\n".join([*lines, *to_reproduce(settings, mine, out), ""])


def loading(identity: Mapping[str, Any], out: Path) -> list[str]:
    """The lines of Python that make the model with its weights."""
    name, classes = identity["model"], num_classes(identity["dataset"], identity["dataset_content"])
    lines = ["from safetensors.torch import load_file", "from models import create_model", ""]
    if is_own(name):
        where, _, function = name.rpartition(":")
        lines[1] = f"from {where.removesuffix('.py')} import {function}"
        lines += [f"model = {function}(num_classes={classes})"]
        if identity["group_norm"]:
            lines[2:2] = ["from models.normalization import replace_batch_norm"]
            lines += ["replace_batch_norm(model)"]
    else:
        lines += [f"model = create_model({name!r}, {classes}, mean={identity['mean']}, std={identity['std']},"]
        lines += [f"                     normalize={identity['normalize']}, group_norm={identity['group_norm']})"]
    return [*lines, f"model.load_state_dict(load_file({out.name!r}))", "model.eval()"]


def architecture(identity: Mapping[str, Any]) -> str:
    """The model, and RobustBench's class that loads its weights if it has one."""
    identity = upgraded(identity)
    name, normalize, group_norm = (identity[key] for key in ("model", "normalize", "group_norm"))
    mean, std = (identity[key] and tuple(identity[key]) for key in ("mean", "std"))
    found = re.fullmatch(r"wrn-(\d+)-(\d+)-swish|preact-resnet(\d+)-swish", name)
    # RobustBench's classes normalize, and have BatchNorm.
    if found is None or group_norm or not normalize:
        input_ = f"normalizing its input by mean {mean} and std {std}" if normalize else "not normalizing its input"
        layers = " with GroupNorm" * group_norm
        maker = "one's own function" if is_own(name) else "`models.create_model`"
        input_ = "taking pixels in [0, 1]" if is_own(name) else input_
        return f"{name}{layers}, {input_}, as {maker} makes it; RobustBench has no class for it"
    shape = f"depth={found[1]}, width={found[2]}" if found[1] else f"depth={found[3]}, width=0"
    kind = "DMWideResNet" if found[1] else "DMPreActResNet"
    classes = num_classes(identity["dataset"], identity["dataset_content"])
    arguments = f"num_classes={classes}, {shape}, activation_fn=nn.SiLU, mean={mean}, std={std}"
    return f"{name}; RobustBench loads it into `{kind}({arguments})`"


def additional_data(settings: Mapping[str, Any]) -> str:
    """The training data beyond the dataset's own."""
    name = settings.get("aux_data_filename")
    if name is None:
        return "none"
    return f"generated images of `{Path(name).name}`, {settings['unsup_fraction']:.0%} of each batch"


def entry(settings: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """A leaderboard entry as in RobustBench's model_info/*.json."""
    clean, robust = (f"{100 * record[name]:.2f}" for name in ("clean_accuracy", "robust_accuracy"))
    return {
        "additional_data": settings.get("aux_data_filename") is not None,
        "number_forward_passes": 1,
        "dataset": record["dataset"],
        "architecture": re.sub(r"wrn-(\d+)-(\d+)-swish", r"WideResNet-\1-\2", record["model"]),
        "eps": record["eps_text"],
        "clean_acc": clean,
        "reported": robust,
        "autoattack_acc": robust,
    }


def train_command(settings: Mapping[str, Any]) -> str:
    """The command that resolves to the settings of a run."""
    defaults = resolve({})
    deciding_ones = deciding(settings) | {"search": settings["search"]}
    given = {name: value for name, value in deciding_ones.items() if value != defaults[name]}
    usual = resolve(given)
    left_out = (*PLACE, *not_taken_by(settings["method"]))
    given |= {name: settings[name] for name in defaults if settings[name] != usual[name] and name not in left_out}
    words = ["python", "train.py"]
    for name, value in given.items():
        is_length = name in LENGTHS and value is not None
        words += [flag_of(name), flags.length_words(value, settings["norm"]) if is_length else flags.plain(value)]
    return shlex.join(words)


def eval_command(record: Mapping[str, Any], out: Path, knows: bool) -> str:
    """The command that evaluates the exported weights as a record says; knows: whether the file has its settings."""
    eps = record["eps_text"]
    try:
        is_same = flags.length(eps, record["norm"], "--eps").value == record["eps"]
    except ValueError:  # of an earlier version, whose --eps for L2 was 8
        is_same = False
    if not is_same:
        eps = flags.length_words(record["eps"], record["norm"])
    record = upgraded(record)
    words = ["python", "eval.py", out.name]
    words += ["--model", record["model"]] if is_own(record["model"]) or not knows else []
    words += ["--dataset", record["dataset"]] if is_path(record["dataset"]) or not knows else []
    words += [] if knows else model_flags(record)
    words += ["--eps", eps, "--norm", record["norm"], "--version", record["version"], "--n", record["n"]]
    words += ["--batch-size", record["batch_size"], "--seed", record["seed"]]
    return shlex.join(map(str, words))


def model_flags(record: Mapping[str, Any]) -> list[str]:
    """The flags of eval.py that make a record's model, beside its name and the dataset's."""
    words = ["--group-norm"] if record["group_norm"] else []
    words += ["--image-size", str(record["image_size"])] if record["image_size"] else []
    # Of own images the statistics are said: they need not be here to be asked.
    known = ("mean", "std") if is_path(record["dataset"]) else ()
    usual = resolve_normalization({name: record[name] for name in ("model", "dataset", *known)})
    usual |= dict.fromkeys(known)
    for name in ("normalize", "mean", "std"):
        if record[name] is not None and record[name] != usual[name]:
            words += [f"--{name}", flags.plain(record[name])]
    return words


if __name__ == "__main__":
    flags.run(main)
