"""Evaluate checkpoints by AutoAttack (Croce & Hein, 2020) and keep the figures.

    python eval.py experiments/NAME --eps 2 4 8 --n 1000
    python eval.py weights.pt --model wrn-28-10-swish --dataset cifar10 --eps 8
    python eval.py experiments/NAME --curve      # instead: robust accuracy at every ε, an upper bound, in minutes

Finished evaluations are records in autoattack.json. What an unfinished one has found is written after every batch, to
autoattack.unfinished.json: the same command goes on from there, to the same figures as in one go.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from analysis.curve import lines_of, measure_curve, write_curves
from data import Split, digest
from dyart.projection import NORMS
from evaluation.attack import VERSIONS
from evaluation.candidate import leading, load_candidate, load_test
from evaluation.environment import make_reproducible
from evaluation.jobs import Task, evaluate_all
from evaluation.place import open_place
from evaluation.results import images_of
from experiment import flags
from experiment.folder import Experiment
from experiment.weights import IMAGES_HELP, WEIGHTS_HELP, add_model_flags, read_weights

# The radii of the paper's evaluation (for L2, where it has none, those in use), and the one of leaderboards.
PAPER = {"Linf": ["2", "4", "8", "12", "16"], "L2": ["0.25", "0.5", "0.75", "1"]}
USUAL = {"Linf": "8", "L2": "0.5"}

# --- Flags: after a clear name stands the released code's spelling of the same ----------------------------------------


def build_parser() -> flags.Parser:
    """The flags of eval.py."""
    p = flags.Parser(prog="eval.py", description=__doc__.splitlines()[0])
    p.add_argument("target", metavar="FOLDER|FILE", nargs="?", help="an experiment folder, or a bare checkpoint file")
    p.add_argument("--fname_input", dest="target_flag", default=None, help=argparse.SUPPRESS)

    positive = flags.whole(least=1)
    g = p.add_argument_group("what is evaluated")
    g.add_argument("--checkpoint", metavar="NAME", nargs="+", default=None, help="files of the folder (best.pt)")
    g.add_argument("--weights", metavar="NAME", default=None, help=WEIGHTS_HELP)
    g.add_argument("--images", choices=["test", "validation"], default="test", help=IMAGES_HELP)
    g.add_argument("--n", type=flags.optional(positive), default=None, help="the first N images; none takes all")
    g.add_argument("--output-dir", default=None, help="for results, log and lock (the folder, or beside the file)")
    g.add_argument("--data-dir", default=None, help="where prepared datasets lie (where training took them from)")

    g = p.add_argument_group("the attack")
    eps = "for Linf 8 or 8/255, for L2 0.5; or paper: 2 4 8 12 16, for L2 0.25 0.5 0.75 1 (8, for L2 0.5)"
    g.add_argument("--eps", "--eps_eval", nargs="+", default=None, help=eps)
    g.add_argument("--norm", "--norm_attack", choices=list(NORMS), default=None, help="of the perturbation (the run's)")
    g.add_argument(
        "--version",
        "-v",
        choices=list(VERSIONS),
        default="standard",
        help="custom leaves Square out, few-classes (of 2 or 3) APGD-T",
    )
    curve = (
        "instead of AutoAttack, robust accuracy at every ε: an upper bound, from the distances of minimum_norm_attack"
    )
    flags.add_switch(g, "--curve", default=False, help=curve)
    g.add_argument("--passes", type=flags.whole(least=2), default=20, help="an image, for --curve")
    g.add_argument("--batch-size", "--batch_size_for_eval", type=positive, default=250, help="images a batch")
    g.add_argument("--seed", type=flags.whole(), default=0, help="of the attacks' random numbers")
    usual = ["cuda" if torch.cuda.is_available() else "cpu"]
    g.add_argument("--device", nargs="+", default=usual, help="cpu, cuda, or several: cuda:0 cuda:1 ...")
    g.add_argument(
        "--jobs", type=positive, default=None, help="processes, which share cores and devices (one a device)"
    )
    flags.add_switch(g, "--again", default=False, help="evaluate also what is finished, and replace its record")
    flags.add_switch(g, "--dry-run", default=False, help="print the resolved settings as YAML and stop")

    add_model_flags(p)
    return p


def radii(texts: list[str] | None, norm: str) -> list[flags.Length]:
    """The radii that --eps asks for, or where it is left out the usual one of the norm."""
    if norm not in PAPER and (texts is None or "paper" in texts):
        raise ValueError(f"--eps: say which in {norm}; there is a usual one for {' and '.join(PAPER)} only")
    texts = texts or [USUAL[norm]]
    texts = [radius for text in texts for radius in (PAPER[norm] if text == "paper" else [text])]
    return list(dict.fromkeys(flags.length(text, norm, "--eps") for text in texts))


def norm_of(settings: Mapping[str, Any]) -> str:
    """The norm to attack a run in: the one that it was trained in; the usual one for others' files."""
    return settings["norm"] if settings.get("norm") in list(NORMS) else "Linf"


def settings_of(target: Path, weights: str | None) -> Mapping[str, Any]:
    """The settings of the run that made a folder or a file; none where it is others', or not there."""
    if target.is_file():
        return read_weights(target, weights).settings or {}
    return Experiment.open(target).settings if (target / "args.yaml").exists() else {}


# --- The run ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Evaluate what the flags say. Raises ValueError or OSError, in one line, for what is wrong with them."""
    parser = build_parser()
    args = vars(parser.parse_args(argv))
    targets = [text for text in (args.pop("target_flag"), args.pop("target")) if text is not None]
    if not targets and len(args["device"]) > 1:  # as when it took one device: --device cpu FOLDER
        targets.append(args["device"].pop())
    if len(targets) != 1:
        parser.error("expected one FOLDER or FILE, before the flags that take several values")
    again = args.pop("again")
    args["jobs"] = args["jobs"] or len(args["device"])
    if args.pop("dry_run"):
        norm = args["norm"] or norm_of(settings_of(Path(targets[0]), args["weights"]))
        texts = [radius.text for radius in radii(args["eps"], norm)]
        attacks = ["minimum-norm"] if args["curve"] else VERSIONS[args["version"]]
        settings = {"target": targets[0], **args, "norm": norm, "eps": texts, "attacks": attacks}
        print(yaml.safe_dump(settings, sort_keys=False), end="")
        return 0

    devices = [flags.device(name) for name in args["device"]]
    if args["jobs"] < len(devices):
        raise ValueError(f"--jobs {args['jobs']}: fewer than the {len(devices)} devices, of which each takes one")
    if args["curve"] and args["jobs"] > 1:
        raise ValueError("--curve: one process on one device; on a CPU it takes all cores")
    if args["curve"] and args["eps"] is None:
        args["eps"] = ["paper"]
    make_reproducible()
    output_dir = None if args["output_dir"] is None else Path(args["output_dir"])
    with open_place(Path(targets[0]), args["checkpoint"], output_dir) as (paths, results, log, origin):
        candidates = [load_candidate(path, args["weights"], args) for path in paths]
        norms = [args["norm"] or norm_of(candidate.settings) for candidate in candidates]
        lengths = {norm: radii(args["eps"], norm) for norm in norms}
        tests = [load_test(candidate, args["data_dir"], args["images"]) for candidate in candidates]
        for test in tests:
            if args["n"] is not None and args["n"] > len(test.labels):
                raise ValueError(f"--n {args['n']}: the {args['images']} set has {len(test.labels)} images")
        tasks, curves = [], []
        for candidate, norm, test in zip(candidates, norms, tests, strict=True):
            trained = candidate.settings.get("norm") or "Linf"
            if candidate.settings and norm != trained:  # of others' files it is not known
                said = " (--norm)" if args["norm"] else ""
                log(f"{candidate.identity['checkpoint']}: trained in {trained}, attacked in {norm}{said}")
            n = args["n"] or len(test.labels)
            test, images = leading(test, n)
            what = {"n": n, "images": images, "part": args["images"]}
            what |= {"test_sha256": digest(Split(test.images[:n], test.labels[:n]))}
            if args["curve"]:
                what |= {**candidate.identity, **origin, "norm": norm, "passes": args["passes"]}
                curves.append(measure_curve(candidate.model, test, what, lengths[norm], args["batch_size"], devices[0]))
                for line in lines_of(curves[-1]):
                    log(line)
                continue
            for eps, text in lengths[norm]:
                attack = {"norm": norm, "eps": eps, "eps_text": text, "version": args["version"], "seed": args["seed"]}
                identity = {**candidate.identity, **origin, **what, **attack, "batch_size": args["batch_size"]}
                known = None if again else results.finished(identity)
                if known is None:
                    if changed := " and ".join(results.changed(identity)):
                        what_for = f"{identity['checkpoint']} {norm} {text}"
                        log(f"{what_for}: what was found before is of {changed}; starting again")
                    tasks.append(Task(candidate.model, test, identity))
                else:
                    results.take_up(known)
                    log(f"{summary(known)}, as evaluated before (--again to do it again)")
        if curves:
            log(f"curves in {write_curves(results, curves)}")
            return 0
        try:
            for record in evaluate_all(tasks, args["jobs"], results, devices, log):
                log(summary(record))
        except KeyboardInterrupt:
            log("interrupted; the same command goes on after the last finished batch")
            return 130
        log(f"results in {results.path}")
    return 0


def summary(record: Mapping[str, Any]) -> str:
    """A finished record in one line."""
    return (
        f"{record['checkpoint']} ({record['weights']} weights), {record['norm']} {record['eps_text']}, "
        f"{images_of(record)} {record.get('part', 'test')} images: clean {record['clean_accuracy']:.2%}, "
        f"AutoAttack {record['version']} {record['robust_accuracy']:.2%}"
    )


if __name__ == "__main__":
    flags.run(main)
