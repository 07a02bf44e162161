"""For compare_runs.sh: which trainings of a comparison are missing, what came of one, and the table of all.

python scripts/compare_runs_report.py FILE.json FOLDER                  the table, also into FILE.json
python scripts/compare_runs_report.py FILE.json FOLDER --todo           the missing runs: name, flags of train.py
python scripts/compare_runs_report.py FILE.json FOLDER --attack         the flags of eval.py, where it is what attacks
python scripts/compare_runs_report.py FILE.json FOLDER --measure NAME   writes down what came of a finished run

FILE.json says what is compared, and takes what came of it:

- `train`: flags of train.py that all runs have; `variants`: by name, those that a variant adds; `seeds`;
- `attack`: "margins" for minimum_norm_attack at 20 passes, on held-out images and the weights of the last epoch; or a
  version of AutoAttack, on test images and best.pt;
- `images`: how many; `radii`: as for eval.py --eps;
- `against`: the variants that the others are compared with, seed by seed; whatever else it says is kept.

A run is finished where FILE.json has it. What a variant's flags stood for is kept there as well: where they have come
to mean something else, nothing is compared. Of each run there is the commit that trained it, and where those differ
the table says so. Runs with --track-dynamics have a column of their shares of negative speeds, means over the epochs.
"""

import argparse
import itertools
import re
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from analysis.budget import spent
from analysis.comparison import check_alike, deciding, deciding_settings, made_by, of_several_codes
from analysis.curve import measure_distances
from data import first_examples
from evaluation.candidate import load_candidate, load_part
from evaluation.results import Results
from experiment import flags
from experiment.folder import Experiment
from storage.files import read_json, write_json

PASSES = 20
# The column of what --track-dynamics saw, where all runs have it.
NEGATIVE = "negative speeds"


class Comparison:
    """What FILE.json asks for, and the runs that it has."""

    def __init__(self, file: Path, folder: Path):
        self.file, self.folder, self.content = file, folder, read_json(file)
        self.runs: list[dict[str, Any]] = self.content.setdefault("runs", [])
        known, against = self.content.setdefault("settings", {}), self.content.get("against")
        for variant in self.content["variants"]:
            if not re.fullmatch(r"[\w.+,-]+", variant):
                raise ValueError(f"{file}: variant {variant!r} is to be the name of a folder, without spaces")
            now = deciding_settings(self.flags(variant, self.content["seeds"][0]))
            check_alike(variant, known.setdefault(variant, now), now, file)
        if not isinstance(against, list) or not set(against) <= self.content["variants"].keys():
            raise ValueError(f"{file}: against {against!r} is to be a list of its variants")

    def flags(self, variant: str, seed: int) -> str:
        """The flags of train.py for a run."""
        return f"{self.content['train']} {self.content['variants'][variant]} --seed {seed}"

    def todo(self) -> list[str]:
        """The missing runs, seed by seed."""
        there = {(run["variant"], run["seed"]) for run in self.runs}
        wanted = [(variant, seed) for seed in self.content["seeds"] for variant in self.content["variants"]]
        return [
            f"{variant}-{seed} {self.flags(variant, seed)}" for variant, seed in wanted if (variant, seed) not in there
        ]

    def attack(self) -> str:
        """The flags of eval.py; nothing where margins are measured."""
        if self.content["attack"] == "margins":
            return ""
        radii, n = " ".join(self.content["radii"]), self.content["images"]
        return f"--eps {radii} --n {n} --batch-size {min(n, 128)} --version {self.content['attack']}"

    def measure(self, name: str) -> None:
        """What came of a finished run, into its folder."""
        experiment = Experiment.open(self.folder / name)
        settings, rows = experiment.settings, experiment.read_metrics()
        variant, _, seed = name.rpartition("-")
        now = deciding_settings(self.flags(variant, int(seed)))
        check_alike(name, deciding(settings), now, experiment.folder)
        accuracies = self._margins(experiment) if self.content["attack"] == "margins" else self._autoattack(experiment)
        run = {"variant": variant, "seed": int(seed), "accuracy": accuracies}
        run |= {"clean_epochs_spent": round(spent(settings, rows), 2)}
        run |= {"training_seconds": round(sum(row["seconds"] for row in rows)), **made_by(settings)}
        run["validation"] = [[round(100 * row[key], 1) for key in ("val_clean", "val_robust")] for row in rows]
        tracked = [row["negative_speeds"] for row in rows if row.get("negative_speeds") is not None]
        if tracked:  # --track-dynamics
            run["negative_speeds"] = [round(100 * share, 1) for share in tracked]
        write_json(self.folder / name / "compared.json", run)

    def _margins(self, experiment: Experiment) -> dict[str, Any]:
        candidate = load_candidate(experiment.folder / "latest.pt", None, {})
        settings = {**experiment.settings, "validation_size": None}
        split, norm = first_examples(load_part(settings, "validation"), self.content["images"], 0), settings["norm"]
        distance = measure_distances(candidate.model, split, norm, PASSES, 128, experiment.folder.name)
        radii = [flags.length(text, norm, "radii") for text in self.content["radii"]]
        robust = {eps.text: round(100 * float((distance > eps.value).mean()), 3) for eps in radii}
        return {"clean": round(100 * float((distance > 0).mean()), 3), **robust}

    def _autoattack(self, experiment: Experiment) -> dict[str, Any]:
        records = Results(experiment.folder / "autoattack").current
        clean = {round(100 * record["clean_accuracy"], 3) for record in records}
        robust = {record["eps_text"]: round(100 * record["robust_accuracy"], 3) for record in records}
        return {"clean": clean.pop(), **robust}

    def collect(self) -> None:
        """Take in what the folder has."""
        there = {(run["variant"], run["seed"]) for run in self.runs}
        for path in sorted(self.folder.glob("*/compared.json")):
            run = read_json(path)
            if (run["variant"], run["seed"]) not in there and run["variant"] in self.content["variants"]:
                self.runs.append(run)
        order = list(self.content["variants"])
        self.runs.sort(key=lambda run: (order.index(run["variant"]), run["seed"]))

    def table(self) -> list[str]:
        """Means and standard deviations over the seeds, in %; of differences at the same seed the standard error.

        Below them, where the runs were not all trained by the same code, which commit trained which.
        """
        names = list(self.runs[0]["accuracy"])
        names += [NEGATIVE] if all("negative_speeds" in run for run in self.runs) else []
        by_seed = {variant: self._by_seed(variant) for variant in self.content["variants"]}
        rows: dict[str, list[dict[str, float]]] = {variant: list(runs.values()) for variant, runs in by_seed.items()}
        for against, (variant, runs) in itertools.product(self.content["against"], by_seed.items()):
            pairs = [(runs[seed], by_seed[against][seed]) for seed in runs if seed in by_seed[against]]
            if variant != against and pairs:
                rows[f"{variant} - {against}"] = [{name: a[name] - b[name] for name in names} for a, b in pairs]
        summary = self.content["summary"] = {}
        lines = ["| | " + " | ".join(names) + " | seeds | spent |", "|" + " --- |" * (len(names) + 3)]
        for label, runs in rows.items():
            if not runs:
                continue
            difference, n = label not in by_seed, len(runs)
            summary[label], cells = {"seeds": n}, []
            for name in names:
                values = [run[name] for run in runs]
                spread = statistics.stdev(values) / (n**0.5 if difference else 1) if n > 1 else None
                summary[label][name] = [round(statistics.mean(values), 2), None if spread is None else round(spread, 2)]
                cells.append(f"{statistics.mean(values):{'+' if difference else ''}.1f}")
                cells[-1] += "" if spread is None else f" ± {spread:.1f}"
            spent_here = [run["spent"] for run in runs if run.get("spent") is not None]
            cells += [str(n), f"{statistics.mean(spent_here):.1f}" if spent_here else ""]
            lines.append("| " + " | ".join([label, *cells]) + " |")
        lines += of_several_codes((f"{run['variant']}-{run['seed']}", run.get("code")) for run in self.runs)
        return lines

    def _by_seed(self, variant: str) -> dict[int, dict[str, float]]:
        """The figures of a variant's runs."""
        return {
            run["seed"]: {**run["accuracy"], **_negative(run), "spent": run.get("clean_epochs_spent")}
            for run in self.runs
            if run["variant"] == variant
        }


def _negative(run: dict[str, Any]) -> dict[str, float]:
    """The mean share of negative speeds over the epochs of a run that tracked them, by its column."""
    return {NEGATIVE: statistics.mean(run["negative_speeds"])} if "negative_speeds" in run else {}


def main() -> int:
    """Print what is missing, write down what came of a run, or print and write the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", type=Path, metavar="FILE.json")
    p.add_argument("folder", type=Path, metavar="FOLDER")
    p.add_argument("--todo", action="store_true")
    p.add_argument("--attack", action="store_true")
    p.add_argument("--measure", metavar="NAME")
    args = p.parse_args()
    comparison = Comparison(args.file, args.folder)
    if args.attack:
        print(comparison.attack())
        return 0
    if args.measure:
        comparison.measure(args.measure)
    comparison.collect()
    if args.todo:
        print("".join(f"{line}\n" for line in comparison.todo()), end="")
        return 0
    if not comparison.runs:
        raise ValueError(f"{args.file} has no finished runs: bash scripts/compare_runs.sh {args.file}")
    table = comparison.table()
    write_json(args.file, comparison.content)
    if not args.measure:
        print("\n".join([*table, f"accuracy in %, {comparison.content['images']} images; figures in {args.file}"]))
    return 0


if __name__ == "__main__":
    flags.run(main)
