"""For compare_methods.sh: which runs are missing, and what each method made of each budget, as a table and a picture.

python scripts/compare_methods_report.py FLAGS                  the table, also into --output, and the picture beside it
python scripts/compare_methods_report.py FLAGS --todo PART      for each missing run of tuning, runs or leaders: its
                                                                folder, the flags of train.py, and after each -- the
                                                                flags of an eval.py
python scripts/compare_methods_report.py --measure FOLDER       after a run, which machine and code trained it, there

A run is finished where --output or --folder has it. Those that chose a rate are judged on held-out images by
minimum_norm_attack (eval.py --curve), which takes seconds; runs over seeds begin when a method's choice is complete.
They are attacked by AutoAttack at --eps, and by minimum_norm_attack at half of it, an upper bound.
What a method's flags stood for is kept in --output: where that or a folder's settings are not what they stand for now,
nothing is compared. Of each run there is the commit that trained it, and where those differ the table says so.
"""

import argparse
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
matplotlib.use("Agg")
import matplotlib.pyplot as plt

from analysis.budget import LEARNING_RATES, METHODS, plan, spent
from analysis.comparison import check_alike, deciding, deciding_settings, made_by, of_several_codes
from evaluation.results import Results
from experiment import flags
from experiment.folder import Experiment
from storage.files import naming, read_json, replacing, write_json

# Seeds that choose are not among those that are reported.
TUNING_SEED = 1000
PARTS = ("tuning", "runs", "leaders")
# How many methods of each budget are attacked by all of AutoAttack: of those that are one --method of train.py, which
# may be here with several numbers of steps or several λ, the best.
LEADERS = 3
# The attack that chooses: beside AutoAttack's versions, which judge.
CURVE = "minimum-norm"
# The file of a run's folder that says which machine and code trained it.
TRAINED = "trained.json"


def build_parser() -> argparse.ArgumentParser:
    """The flags of compare_methods.sh, and --todo."""
    p = flags.Parser(prog="compare_methods.sh", description=__doc__)
    p.add_argument("--budget", type=_numbers, default=_numbers("9 18 36"), help="clean epochs' worth of passes")
    p.add_argument("--seeds", type=_numbers, default=_numbers("0 1 2"), help="seeds of the runs that are reported")
    p.add_argument("--methods", type=_methods, default=list(METHODS), help=f"some of {', '.join(METHODS)}")
    p.add_argument("--dataset", default="cifar10", help="as for train.py")
    p.add_argument("--model", default="wrn-10-1-swish", help="as for train.py")
    p.add_argument("--eps", default="8", help="radius of the methods' attacks and of AutoAttack, in 1/255")
    p.add_argument("--n", type=int, default=500, help="images that AutoAttack custom takes")
    p.add_argument("--leaders-n", type=int, default=1000, help="images that AutoAttack standard and the curve take")
    p.add_argument("--folder", type=Path, default=Path("experiments/compare-methods"), help="of the runs")
    p.add_argument("--output", type=Path, default=Path("results/compare-methods.json"), help="of the figures")
    p.add_argument("--device", default="cpu", help="as for train.py")
    p.add_argument("--train", default="", help="more flags of train.py for all runs, as one word")
    p.add_argument("--todo", choices=PARTS, default=None, help="print what is missing of a part")
    p.add_argument("--measure", type=Path, metavar="FOLDER", default=None, help="write down what trained a run")
    return p


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def _methods(text: str) -> list[str]:
    unknown = set(text.split()) - set(METHODS)
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not among {', '.join(METHODS)}")
    return text.split()


class Run:
    """One training of the comparison: what it is called, its flags, and what came of it."""

    def __init__(self, args: argparse.Namespace, method: str, budget: int, seed: int, chosen: dict[str, Any]):
        self.args, self.tuning = args, seed == TUNING_SEED
        self.settings = plan(method, budget) or {}
        self.settings |= chosen
        self.key = {"method": method, "budget": budget, "seed": seed, "dataset": args.dataset, "model": args.model}
        self.key |= {"eps": args.eps, "n": args.n, "train": args.train, **chosen}
        words = [method, f"budget{budget}", *(f"{name}{value}" for name, value in chosen.items()), f"seed{seed}"]
        self.folder = args.folder / "-".join(words)

    @property
    def name(self) -> str:
        """What it is one of several runs of, at other rates and with other seeds."""
        key = self.key
        words = [key["method"], f"for {key['budget']}", key["dataset"], key["model"], f"{key['eps']}/255", key["train"]]
        return " ".join(words).strip()

    @property
    def flags(self) -> str:
        """Its flags of train.py."""
        given = {"dataset": self.args.dataset, "model": self.args.model, "device": self.args.device}
        given |= {"seed": self.key["seed"], "scheduler": "cyclic", "batch_size": 128, "burn_in_batch_size": 128}
        given |= {"validation_size": 500, "validation_attack_iter": 10, **self.settings}
        if self.settings["method"] not in ("clean", "dyart"):
            given["attack_eps"] = f"{self.args.eps}/255"
            if 0 < self.settings.get("attack_iter", 10) < 10:
                given["attack_step"] = f"{float(self.args.eps) / 2:g}/255"
        return " ".join([*(f"--{name.replace('_', '-')} {value}" for name, value in given.items()), self.args.train])

    def commands(self, version: str) -> str:
        """What compare_methods.sh runs for it."""
        curve = f"--curve --eps {float(self.args.eps) / 2:g} {self.args.eps} --n {self.args.leaders_n}"
        attack = f"--eps {self.args.eps} --n {self.images(version)} --version {version} --batch-size 250"
        attacks = [] if self.curve() else [f"{curve} --images {self.part}"]
        attacks += [] if version == CURVE else [attack]
        words = [f"{self.folder} {self.flags}".strip()]
        return " -- ".join(words + [f"{attack} --device {self.args.device}" for attack in attacks])

    @property
    def part(self) -> str:
        """The images that it is judged on."""
        return "validation" if self.tuning else "test"

    def images(self, version: str) -> int:
        """How many images an attack takes."""
        return self.args.n if version == "custom" else self.args.leaders_n

    def curve(self) -> dict[str, Any] | None:
        """What eval.py --curve has left in the folder."""
        path, of_part = self.folder / "curve.json", {"part": self.part, "n": self.args.leaders_n}
        curves = read_json(path) if path.exists() else []
        return next((curve for curve in curves if of_part.items() <= curve.items()), None)

    def record(self, version: str) -> dict[str, Any] | None:
        """What AutoAttack has left in the folder."""
        wanted = {"version": version, "n": self.images(version), "part": self.part, "eps_text": f"{self.args.eps}/255"}
        records = Results(self.folder / "autoattack").current
        return next((record for record in records if wanted.items() <= {"part": "test", **record}.items()), None)

    def outcome(self, version: str) -> dict[str, Any] | None:
        """Its figures by an attack, if the folder holds all of them."""
        curve = self.curve()
        judge = curve if version == CURVE else self.record(version)
        if curve is None or judge is None:
            return None
        bounds = curve["robust_accuracy"]
        experiment = Experiment.open(self.folder)
        check_alike(self.name, deciding(experiment.settings), deciding_settings(self.flags), self.folder)
        rows = experiment.read_metrics()
        run = {**self.key, "version": version, "n": self.images(version), "clean": judge["clean_accuracy"]}
        run["robust"] = bounds[f"{self.args.eps}/255"] if version == CURVE else judge["robust_accuracy"]
        run["robust_half"] = bounds[f"{float(self.args.eps) / 2:g}/255"]
        run |= {"clean_epochs_spent": round(spent(experiment.settings, rows), 2), "epochs": len(rows)}
        run |= {"training_seconds": round(sum(row["seconds"] for row in rows))}
        trained = self.folder / TRAINED
        return run | (read_json(trained) if trained.exists() else {})


class Comparison:
    """All runs that the flags ask for, with those that are finished."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        content = read_json(args.output) if args.output.exists() else {}
        self.known: list[dict[str, Any]] = content.get("runs", [])
        # By the names of runs, what their flags stood for and what they stand for now.
        self.settings: dict[str, dict[str, Any]] = content.get("settings", {})
        self.now: dict[str, dict[str, Any]] = {}
        self.middle = sorted(args.budget)[(len(args.budget) - 1) // 2]

    def figures(self, run: Run, version: str = "custom") -> dict[str, Any] | None:
        """What is known of a run by an attack; what its folder knows is kept."""
        if run.name not in self.now:
            self.now[run.name] = deciding_settings(run.flags)
            if "lr" in run.key:  # a record says it for itself
                del self.now[run.name]["lr"]
        now = self.now[run.name]
        version = CURVE if run.tuning else version
        key = run.key | {"version": version, "n": run.images(version)}
        if run.name in self.settings:
            check_alike(run.name, self.settings[run.name], now, self.args.output)
            for known in self.known:
                if all(known.get(name) == value for name, value in key.items()):
                    return known
        found = run.outcome(version)
        if found is not None:
            self.known.append(found)
            self.settings.setdefault(run.name, now)
        return found

    def tuning(self, method: str) -> list[Run]:
        """The runs that choose a method's rate; none where the middle budget does not buy an epoch."""
        if plan(method, self.middle) is None:
            return []
        return [Run(self.args, method, self.middle, TUNING_SEED, {"lr": rate}) for rate in LEARNING_RATES]

    def chosen(self, method: str) -> dict[str, Any] | None:
        """The rate of the highest robust, then clean accuracy on held-out images; None while runs are missing.

        Of rates that are alike in both, the lowest.
        """
        figures = [self.figures(run) for run in self.tuning(method)]
        if None in figures:
            return None
        if not figures:
            return {}
        return {"lr": max(figures, key=lambda figure: (figure["robust"], figure["clean"]))["lr"]}

    def runs(self) -> list[Run]:
        """The runs that are reported, as far as their settings are chosen: leaders' budgets first to last."""
        known = {method: chosen for method in self.args.methods if (chosen := self.chosen(method)) is not None}
        return [
            Run(self.args, method, budget, seed, chosen)
            for budget in sorted(self.args.budget)
            for seed in self.args.seeds
            for method, chosen in known.items()
            if plan(method, budget) is not None
        ]

    def leaders(self) -> list[Run]:
        """The runs of the methods that lead a budget by the shorter attack."""
        found, every = [], self.runs()
        for budget in sorted(self.args.budget):
            runs = [run for run in every if run.key["budget"] == budget]
            means = {
                method: statistics.mean(figures["robust"] for figures in known)
                for method in self.args.methods
                if (known := [f for run in runs if run.key["method"] == method and (f := self.figures(run))])
            }
            best: dict[str, str] = {}
            for method in sorted(means, key=means.__getitem__, reverse=True):
                best.setdefault(METHODS[method]["method"], method)
            found += [run for run in runs if run.key["method"] in list(best.values())[:LEADERS]]
        return found

    def todo(self, part: str) -> list[str]:
        """The commands of the missing runs of a part."""
        if part == "leaders":
            return [run.commands("standard") for run in self.leaders() if self.figures(run, "standard") is None]
        runs = self.runs() if part == "runs" else [run for name in self.args.methods for run in self.tuning(name)]
        return [run.commands(CURVE if run.tuning else "custom") for run in runs if self.figures(run) is None]

    def table(self) -> list[dict[str, Any]]:
        """A row for each budget, method and attack: means and standard deviations over the seeds, in %."""
        groups: dict[tuple, list[dict[str, Any]]] = {}
        for run in self.runs():
            for version in ("custom", "standard"):
                figures = self.figures(run, version)
                if figures is not None:
                    groups.setdefault((run.key["budget"], run.key["method"], version), []).append(figures)
        rows = []
        for (budget, method, version), figures in groups.items():
            row: dict[str, Any] = {"budget": budget, "method": method, "version": version, "n": figures[0]["n"]}
            row |= {name: figures[0][name] for name in ("lr", "epochs") if name in figures[0]}
            row["seeds"] = len(figures)
            for name in ("clean", "robust_half", "robust"):
                values = [100 * figure[name] for figure in figures]
                row[name] = [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None]
            for name in ("clean_epochs_spent", "training_seconds"):
                row[name] = statistics.mean(figure[name] for figure in figures)
            rows.append(row)
        return sorted(rows, key=lambda row: (row["budget"], row["version"], -row["robust"][0]))


def show(rows: list[dict[str, Any]], eps: str) -> None:
    """The table, the most robust first."""
    head = ["budget", "method", "clean", f"≤ at {float(eps) / 2:g}/255", f"{eps}/255"]
    head += ["AutoAttack", "images", "seeds", "spent", "s"]
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for row in rows:
        cells = [f"{m:.1f}" + (f" ± {sd:.1f}" if sd is not None else "") for m, sd in map(row.get, FIGURES)]
        cells = [str(row["budget"]), row["method"], *cells, row["version"], str(row["n"]), str(row["seeds"])]
        print("| " + " | ".join([*cells, f"{row['clean_epochs_spent']:.1f}", f"{row['training_seconds']:.0f}"]) + " |")


FIGURES = ("clean", "robust_half", "robust")


def draw(rows: list[dict[str, Any]], eps: str, path: Path) -> None:
    """Robust over clean accuracy, a curve a budget, and robust accuracy over cost, a curve a method."""
    figure, (trade, cost) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    rows = [row for row in rows if row["version"] == "custom"]
    for budget in sorted({row["budget"] for row in rows}):
        points = sorted((row["clean"][0], row["robust"][0], row["method"]) for row in rows if row["budget"] == budget)
        trade.plot(*zip(*[point[:2] for point in points], strict=True), "o", label=f"{budget} clean epochs' worth")
        for clean, robust, method in points:
            trade.annotate(method, (clean, robust), fontsize=6, xytext=(3, 3), textcoords="offset points")
    trade.set(xlabel="clean accuracy [%]", ylabel=f"AutoAttack {eps}/255 [%]")
    for method in METHODS:
        points = sorted((row["clean_epochs_spent"], *row["robust"]) for row in rows if row["method"] == method)
        if points:
            at, mean, spread = zip(*points, strict=True)
            cost.errorbar(at, mean, [value or 0 for value in spread], marker="o", capsize=2, label=method)
    cost.set(xlabel="cost [clean epochs]", ylabel=f"AutoAttack {eps}/255 [%]", xscale="log")
    trade.legend(fontsize=7)
    cost.legend(fontsize=7)
    with naming("write", path), replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def main() -> int:
    """Print what is missing, or print, write and draw what there is."""
    args = build_parser().parse_args()
    if args.measure:
        if not (args.measure / TRAINED).exists():
            write_json(args.measure / TRAINED, made_by(Experiment.open(args.measure).settings))
        return 0
    comparison = Comparison(args)
    if args.todo:
        print("".join(f"{line}\n" for line in comparison.todo(args.todo)), end="")
        return 0
    rows = comparison.table()
    for method in args.methods:  # what chose is kept as well
        comparison.chosen(method)
    command = shlex.join(["bash", "scripts/compare_methods.sh", *sys.argv[1:]])
    content = {"command": command, "table": rows, "runs": comparison.known, "settings": comparison.settings}
    write_json(args.output, content)
    show(rows, args.eps)
    if rows:
        draw(rows, args.eps, args.output.with_suffix(".png"))
    trained = [(run.folder.name, found.get("code")) for run in comparison.runs() if (found := comparison.figures(run))]
    print("\n".join([*of_several_codes(trained), f"figures in {args.output}"]))
    return 0


if __name__ == "__main__":
    flags.run(main)
