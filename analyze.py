"""See the decision boundary move: margins, the boundary's speed under each training method, and the figures of both.

    python analyze.py experiments/NAME
    python analyze.py weights.pt --model wrn-28-10-swish --dataset cifar10 --output-dir figures
    python analyze.py --toy

Figures and their numbers (csv, and a summary in dynamics.json) go to the folder's figures/.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from analysis import figures
from analysis.measure import Search, choose_correct, directions, measure, measure_history, nearest_examples, shuffled
from analysis.speed_check import check_speeds
from analysis.statistics import by_interval, paired, proportion, quantiles, robust_shares
from analysis.subject import autoattack_points, load_subject
from analysis.toy import draw_toy
from data import Split
from dyart.losses import LOSSES
from dyart.modes import PRECISIONS, has_fast_bfloat16
from evaluation.candidate import load_part
from evaluation.environment import versions
from evaluation.results import Results
from experiment import flags
from experiment.build import load_splits
from experiment.weights import IMAGES_HELP, add_model_flags
from storage.files import naming, write_csv, write_json

# Iterations for boundary points: walks to the nearest of several classes want more than `find_boundary` does.
SEARCH_STEPS = 20
# As in the paper.
COMPARED = ["clean", "at", "trades", "mart", "dyart"]


def build_parser() -> flags.Parser:
    """The flags of analyze.py."""
    p = flags.Parser(prog="analyze.py", description=__doc__.splitlines()[0])
    p.add_argument("target", metavar="FOLDER|FILE", nargs="?", help="an experiment folder, or a bare checkpoint file")
    flags.add_switch(p, "--toy", default=False, help="instead draw a two-dimensional example, in seconds")
    p.add_argument("--output-dir", default=None, help="for the figures (FOLDER/figures; results for --toy)")

    g = p.add_argument_group("what is analysed")
    g.add_argument("--checkpoint", metavar="NAME", default=None, help="file of the folder (best.pt)")
    g.add_argument("--methods", nargs="+", choices=list(LOSSES), default=COMPARED, help="to compare")
    g.add_argument("--examples", type=flags.whole(least=1), default=1000, help="images of train and of test")
    g.add_argument("--images", choices=["test", "validation"], default="test", help=IMAGES_HELP)
    g.add_argument("--boundary", choices=["exact", "soft"], default="exact", help="whose speed is shown")
    eps = "of the baselines' attack; smaller margins are vulnerable (the run's)"
    g.add_argument("--attack-eps", type=flags.length_text(flags.number(above=0)), default=None, help=eps)
    g.add_argument(
        "--direction", choices=["gradient", "step"], default="gradient", help="step: of latest.pt's optimizer"
    )
    amp = "bfloat16, in the updates only (searches where it is quick, else none; with --direction step, the run's)"
    g.add_argument("--amp", choices=PRECISIONS, default=None, help=amp)
    steps = "iterations for boundary points"
    g.add_argument("--search-steps", type=flags.whole(least=1), default=SEARCH_STEPS, help=steps)
    g.add_argument("--history-examples", type=flags.whole(least=1), default=100, help="images, for other checkpoints")
    g.add_argument("--check-speeds", metavar="N", type=flags.whole(), default=0, help="measure N margins' real changes")
    g.add_argument("--nearest", type=flags.whole(least=1), default=8, help="examples shown as images")
    g.add_argument("--batch-size", type=flags.whole(least=1), default=128, help="images at a time")
    g.add_argument("--seed", type=flags.whole(), default=0, help="of the choice of images")
    g.add_argument("--data-dir", default=None, help="where prepared datasets lie (as in training)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")

    add_model_flags(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Analyse what the flags say. Raises ValueError or OSError, in one line, for what is wrong with them."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.toy == (args.target is not None):
        parser.error("expected one FOLDER or FILE to analyse, or --toy")
    if args.toy:
        output = args.output_dir or "results"
        flags.check_writable(output, "--output-dir")
        print(draw_toy(Path(output)))
    else:
        print(report(analyze(args)))
    return 0


def analyze(args: Any) -> dict[str, Any]:
    """Measure, draw and write what the flags ask for; returns the summary that dynamics.json holds.

    Raises ValueError or OSError for what cannot be used.
    """
    started = time.monotonic()
    device = flags.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    subject = load_subject(args, device)
    model, settings, norm = subject.model, subject.settings, subject.settings["norm"]
    default = Path("figures") if subject.folder is None else subject.folder / "figures"
    output = Path(args.output_dir or default)
    flags.check_writable(output, "--output-dir")
    with naming("create", output):
        output.mkdir(parents=True, exist_ok=True)
    scale, below = figures.SCALES[norm], settings["attack_eps"]

    train = shuffled(load_splits(settings, generated_too=False).train, args.seed)
    test = shuffled(load_part(settings, args.images), args.seed)
    test = Split(test.images[: args.examples], test.labels[: args.examples])
    exact = Search(norm, math.inf, args.search_steps, args.batch_size)
    soft = exact._replace(temperature=settings["temperature"])
    search = exact if args.boundary == "exact" else soft

    examples = choose_correct(model, train, args.examples, search.temperature, args.batch_size)
    usual = "searches" if has_fast_bfloat16(device) else "none"
    amp = args.amp or (settings["amp"] if args.direction == "step" else usual)
    along = directions(subject, args.methods, examples, args.batch_size, amp)
    measured = measure(model, examples, search, along, "speeds on train")
    found = np.isfinite(measured["margin"])
    margin = measured["margin"][found]
    speeds = {method: measured[method][found] for method in args.methods}
    if not len(margin):
        raise ValueError(f"no boundary point was found for any of {len(found)} examples; try more --search-steps")

    rows = [
        {"margin": margin[i], **{f"speed_{method}": speed[i] for method, speed in speeds.items()}}
        for i in range(len(margin))
    ]
    write_csv(output / "speeds.csv", rows)
    figures.speed_over_margin(output / "speed_over_margin.png", rows, args.methods, below, norm)

    interval, highest = scale.interval / scale.factor, min(2 * below, np.percentile(margin, 99))
    rows = [row for method in args.methods for row in by_interval(margin, speeds[method], method, interval, highest)]
    write_csv(output / "negative_speeds.csv", rows)
    shown = [row | {"from": row["from"] * scale.factor, "to": row["to"] * scale.factor} for row in rows]
    figures.negative_share(output / "negative_speeds.png", shown, args.methods, norm)

    on_test = {
        kind: measure(model, test, of, {}, f"{kind} margins on test")["margin"]
        for kind, of in (("exact", exact), ("soft", soft))
    }
    of_train = Split(train.images[: args.examples], train.labels[: args.examples])
    samples = {"train": measured["margin"], "test": on_test["exact" if search is exact else "soft"]}
    over_time = measure_history(subject, args, search, {"train": of_train, "test": test}, samples)
    rows = [{"split": split, "margin": value} for split, values in samples.items() for value in values]
    write_csv(output / "margins.csv", rows)
    if over_time:
        write_csv(output / "margins_over_time.csv", over_time)
    figures.margins(output / "margins.png", samples, over_time, norm)

    results = None if subject.folder is None else Results(subject.folder / "autoattack")
    attacks = autoattack_points(results, subject.identity, norm, args.images)
    radii = np.linspace(0, max([2 * below, *(attack["eps"] for attack in attacks)]), 65).tolist()
    rows = robust_shares(on_test["exact"], on_test["soft"], radii)
    write_csv(output / "robustness.csv", rows)
    figures.robustness(output / "robustness.png", rows, attacks, norm)

    shown = nearest_examples(model, examples, measured["margin"], args.nearest, search)
    write_csv(output / "nearest.csv", [{key: row[key] for key in ("margin", "label", "predicted")} for row in shown])
    figures.nearest(output / "nearest.png", shown, norm)

    summary = {
        **subject.identity,
        "norm": norm,
        "images": args.images,
        "boundary": args.boundary,
        "temperature": None if search is exact else search.temperature,
        "direction": args.direction,
        "amp": amp,
        "seed": args.seed,
        "search_steps": args.search_steps,
        "vulnerable_below": below,
        "nothing_found_on_test": {kind: int(np.isinf(margins).sum()) for kind, margins in on_test.items()},
        "found": {"examples": len(found), "boundary_points": int(found.sum())},
        "negative_speeds_of_vulnerable": {
            method: proportion(speed[margin < below] < 0) for method, speed in speeds.items()
        },
        "paired_with_dyart": paired({method: speed[margin < below] for method, speed in speeds.items()}, "dyart"),
        "mean_speed_of_vulnerable": {
            method: float(speed[margin < below].mean()) if (margin < below).any() else None
            for method, speed in speeds.items()
        },
        "margins": {split: quantiles(values) for split, values in samples.items()},
        "robust_at_attack_eps": robust_shares(on_test["exact"], on_test["soft"], [below])[0],
        "autoattack": attacks,
    }
    if args.check_speeds:
        chosen = Split(examples.images[: args.check_speeds], examples.labels[: args.check_speeds])
        rows, summary["speed_check"] = check_speeds(model, chosen, search, along)
        write_csv(output / "speed_check.csv", rows)
        figures.speed_check(output / "speed_check.png", rows, summary["speed_check"], norm)
    summary |= {"seconds": round(time.monotonic() - started, 1), "device": str(device), **versions()}
    write_json(output / "dynamics.json", summary)
    return summary | {"output": str(output)}


def report(summary: dict[str, Any]) -> str:
    """What a run prints in the end."""
    scale = figures.SCALES[summary["norm"]]
    below = f"R < {summary['vulnerable_below'] * scale.factor:g} ({scale.unit})"
    lines = [f"negative speeds among the examples with {below}, {summary['boundary']} boundary, with 95 % intervals:"]
    for method, row in summary["negative_speeds_of_vulnerable"].items():
        share = "no such example"
        if row["total"]:
            share = f"{row['share']:6.1%}  [{row['low']:.1%}, {row['high']:.1%}]  {row['negative']} of {row['total']}"
        if row["total"] and (other := summary["paired_with_dyart"].get(method)):
            share += f"; McNemar against DyART: p = {other['p']:.2g}"
        lines.append(f"  {figures.NAMES[method]:8}{share}")
    for method, row in summary.get("speed_check", {}).items():
        text = f"no correlation of {row['examples']} examples"
        if row["correlation"] is not None:
            text = f"correlation {row['correlation']:.4f}, equal signs {row['equal_signs']:.1%} of {row['examples']}"
        lines.append(f"  {figures.NAMES[method]:8}measured against predicted speeds: {text}")
    lines.append(
        "Shares with R > ε: the boundary point that was found is an adversarial example, so the exact curve, like "
        "AutoAttack's robust accuracy, bounds the true robust accuracy from above; the soft margin is a lower bound of "
        "the exact one where both are found exactly."
    )
    if missed := summary["nothing_found_on_test"]["exact"]:
        lines.append(
            f"no boundary point was found for {missed} of the test images: they count as robust, and need not be"
        )
    lines.append(f"figures in {summary['output']} ({summary['seconds']:.0f} s)")
    return "\n".join(lines)


if __name__ == "__main__":
    flags.run(main)
