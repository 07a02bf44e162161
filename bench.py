"""Measure what a training step costs and how close the boundary search comes.

    python bench.py experiments/NAME/burn_in.pt experiments/NAME/best.pt
    python bench.py weights.pt --model wrn-28-10-swish --batch-size 256 --device cuda --amp bf16
    python bench.py experiments/NAME --attacks            # minimum-norm attacks instead: distances over passes

Times are taken interleaved, round after round, and compared within each round, so that a machine that is now faster,
now slower disturbs the ratios little. Prints tables and writes the figures to results/bench-DEVICE.json.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch

from analysis import figures as pictures
from analysis.attacks import compare_attacks
from analysis.company import measure_processes
from analysis.cost import bf16_rate, load_workload, measure_memory, measure_times
from analysis.quality import measure_quality
from dyart.modes import PRECISIONS
from dyart.projection import NORMS
from evaluation.environment import device_name, versions
from experiment import flags
from experiment.weights import add_model_flags
from storage.files import write_json


def build_parser() -> flags.Parser:
    """The flags of bench.py."""
    p = flags.Parser(prog="bench.py", description=__doc__.splitlines()[0])
    p.add_argument(
        "targets", metavar="FOLDER|FILE", nargs="*", help="weights: a folder's best.pt, or files (untrained)"
    )
    add_model_flags(p, "wrn-16-2-swish")
    g = p.add_argument_group("what is measured")
    g.add_argument("--batch-size", type=flags.whole(least=1), default=128)
    g.add_argument("--rounds", type=flags.whole(least=1), default=5, help="each times everything once; after a warm-up")
    g.add_argument("--examples", type=flags.whole(), default=256, help="images for the quality of boundary points")
    g.add_argument("--steps", type=flags.whole(least=1), nargs="*", default=[2, 4], help="other numbers to compare")
    g.add_argument("--norm", choices=list(NORMS), default=None, help="of margins and attacks (the run's, or Linf)")
    g.add_argument("--seed", type=flags.whole(), default=0, help="of the choice of images and of random starts")
    only = "instead of all this, steps that so many processes share out on this machine, against one process"
    g.add_argument("--processes", type=flags.whole(least=1), default=None, help=only)
    attacks = "compare minimum-norm attacks instead: these, such as ours FMN-50, or all"
    g.add_argument("--attacks", metavar="NAME", nargs="*", default=None, help=attacks)
    flags.add_switch(p, "--smoke", default=False, help="a few seconds on digits, to see that it runs")
    g = p.add_argument_group("where and how")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    g.add_argument("--threads", type=flags.whole(least=1), default=torch.get_num_threads(), help="of the CPU")
    g.add_argument("--amp", choices=PRECISIONS, default="none", help="bfloat16 in searches only, or also in training")
    flags.add_switch(g, "--tf32", default=True, help="TensorFloat-32 for float32 on a GPU")
    flags.add_switch(g, "--channels-last", default=True, help="memory layout of images and weights")
    flags.add_switch(g, "--compile", default=False, help="torch.compile")
    flags.add_switch(g, "--cuda-graphs", default=False, help="on a GPU, replay the fast search from a graph")
    g.add_argument("--data-dir", default=None, help="where prepared datasets lie (where training took them from)")
    g.add_argument("--output", default=None, help="the file to write (results/bench-DEVICE.json)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Measure what the flags say. Raises ValueError or OSError for what is wrong with them."""
    options = vars(build_parser().parse_args(argv))
    if options["smoke"]:
        options |= {"dataset": "digits", "model": "wrn-10-1-swish", "batch_size": 8, "rounds": 1}
        options |= {"examples": min(options["examples"], 8), "targets": [], "steps": []}
    device = flags.device(options["device"], cuda_graphs=options["cuda_graphs"])
    if options["attacks"] is not None:
        return attack(options)
    name = device_name(device)
    output = Path(options["output"] or f"results/bench-{re.sub('[^A-Za-z0-9]+', '-', name).strip('-').lower()}.json")
    flags.check_writable(output.parent, "--output")
    torch.set_num_threads(options["threads"])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options["tf32"]
    settings = {key: value for key, value in options.items() if key not in ("targets", "output")}
    if options["compile"]:
        flags.check_compile(device)
    rate = bf16_rate(device)
    report: dict[str, Any] = {"machine": name, "bf16_tflops_per_second": rate, "versions": versions()}
    report |= {"settings": settings, "subjects": []}
    for target in options["targets"] or [None]:
        workload = load_workload(target, options)
        figures = {"weights": workload.identity, "norm": workload.norm}
        correct = workload.correct().float()
        figures["correct"] = correct.mean().item()
        figures["correct_timed"] = correct[: options["batch_size"]].mean().item()
        report["subjects"].append(figures)
        if options["processes"]:
            figures["processes"] = measure_processes(target, workload, options)
            print_processes(figures["processes"], options["processes"])
        else:
            figures["times"] = measure_times(workload, options, rate)
            figures["memory"] = measure_memory(target, workload, options)
            figures["quality"] = measure_quality(workload, options) if options["examples"] else []
            print_tables(figures)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, report)
    print(f"{name}, {options['threads']} threads; figures in {output}")
    return 0


def attack(options: dict[str, Any]) -> int:
    """Compare minimum-norm attacks on each target; goes on from what the output holds, and draws what it then holds."""
    output = Path(options["output"] or "results/attacks.json")
    flags.check_writable(output.parent, "--output")
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options["threads"])
    subjects = []
    for target in options["targets"] or [None]:
        workload = load_workload(target, options)
        rows = compare_attacks(workload, options, output)
        checkpoint = workload.identity["checkpoint"] or "untrained"
        subjects.append((f"{checkpoint}, {workload.norm}", rows))
        print(f"\n{workload.identity['model']}, {checkpoint}, {workload.norm}\n")
        print("| attack | steps | passes | images | found | mean | median | 95 % | largest | optimality | seconds |")
        print("| --- |" + " ---: |" * 10)
        for row in rows:
            passes = f"{row['forward']:.1f} + {row['backward']:.1f}"
            ratios = " | ".join(f"{row.get(key, math.nan):.3f}" for key in ("mean", "median", "q95", "largest"))
            found = f"{row['images']} | {row['found']:.2f}"
            last = f"{row['optimality']:.3f} | {row['seconds']:.1f}"
            print(f"| {row['attack']} | {row['steps']} | {passes} | {found} | {ratios} | {last} |")
    pictures.attacks(output.with_suffix(".png"), subjects)
    print(f"\nfigures in {output} and {output.with_suffix('.png')}")
    return 0


def print_tables(figures: dict[str, Any]) -> None:
    """The figures of one subject, for people."""
    weights = figures["weights"]
    subject = f"{weights['model']}, {weights['checkpoint'] or 'untrained'}, {figures['norm']}"
    print(f"\n{subject}: {figures['correct']:.0%} correct, {figures['correct_timed']:.0%} of the batch that is timed\n")
    print(
        f"| {'':34} | {'ms (quartiles)':>24} | {'ratio (quartiles)':>20} | {'of':24} | passes | of bf16 "
        "| peak MiB | of clean | resident |"
    )
    rules = " | ".join(["-" * 34, "-" * 23 + ":", "-" * 19 + ":", "-" * 24])
    print(f"| {rules} | -----: | ------: | -------: | -------: | -------: |")
    for name, part in figures["times"].items():
        ratio, memory = part.get("ratio"), figures["memory"].get(name, {})
        share = f"{part['of_bf16_rate']:7.1%}" if "of_bf16_rate" in part else " " * 7
        passes = f"{part['passes']:6.2f}" if "passes" in part else " " * 6
        peak = [(memory.get(key), digits) for key, digits in (("mib", 0), ("of_clean", 2), ("resident_of_clean", 2))]
        print(
            f"| {name:34} | {interval(part['seconds'], 1000, 1):>24} | {interval(ratio, 1, 3) if ratio else '':>20} "
            f"| {part.get('of', ''):24} | {passes} | {share} | "
            + " | ".join(" " * 8 if value is None else f"{value:8.{digits}f}" for value, digits in peak)
            + " |"
        )
    if figures["quality"]:
        print(f"\n| {'distances, of the reference':27} | found |  kept |  mean | median |  95 % | mean |Φ| ", end="")
        print("| cosine |  least |  norm |")
        print(f"| {'-' * 27} | ----: | ----: | ----: | -----: | ----: | -------: | -----: | -----: | ----: |")
    for row in figures["quality"]:
        ratios = " | ".join(f"{row.get(key, math.nan):{w}.3f}" for key, w in RATIOS.items())
        print(f"| {row['search']:27} | {row['found']:.3f} | {row['kept']:.3f} | {ratios} |")
    print()


def print_processes(figures: dict[str, Any], size: int) -> None:
    """What steps cost that processes share out, for people."""
    columns = {
        "alone": "one process, ms",
        "together": f"{size} processes, ms",
        "throughput": "throughput, of the one's",
    }
    columns |= {"passes": "passes, ms", "sum": "sum, ms", "rest": "rest, ms"}
    print(f"\n| {'':10} | {' | '.join(f'{name:>24}' for name in columns.values())} |")
    print(f"| {'-' * 10} | {' | '.join('-' * 23 + ':' for _ in columns)} |")
    for name, row in figures.items():
        cells = [interval(row[key], *((1, 3) if key == "throughput" else (1000, 1))) for key in columns]
        print(f"| {name:10} | {' | '.join(f'{cell:>24}' for cell in cells)} |")
    print()


RATIOS = {"ratio_mean": 5, "ratio_median": 6, "ratio_95": 5, "distance_from_boundary": 8}
RATIOS |= {"gradient_cosine": 6, "gradient_cosine_least": 6, "gradient_norm": 5}


def interval(values: dict[str, float], scale: float, digits: int) -> str:
    """A median with its quartiles."""
    low, middle, high = (scale * values[key] for key in ("quartile_1", "median", "quartile_3"))
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


if __name__ == "__main__":
    flags.run(main)
