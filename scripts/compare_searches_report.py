"""End compare_searches.sh: the accuracies with each search side by side, with their spread over the seeds, and the
differences at the same seed, with their standard errors.

python scripts/compare_searches_report.py FOLDER BURN-IN [OUTPUT.json]

Without OUTPUT.json it only says whether the runs that are there already started from BURN-IN.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.results import Results
from experiment import flags
from experiment.folder import Experiment
from storage.files import write_json

SEARCHES = ("shared", "fast", "fab")
SAME = ("model", "lambda_robust", "clip_grad", "train_subset", "batch_size", "epochs", "n", "version")


def main() -> int:
    """Print the table of all FOLDER/SEARCH-SEED, and write it with each run's figures."""
    folder, burn_in = Path(sys.argv[1]), sys.argv[2]
    places = sorted(place for search in SEARCHES for place in folder.glob(f"{search}-*"))
    for place in places:
        other = Experiment.open(place).settings["pretrained"]
        if other != burn_in:
            raise ValueError(f"{place} started from {other}, not from {burn_in}: compare in a new FOLDER")
    if len(sys.argv) == 3:
        return 0
    runs = []
    for place in places:
        experiment, records = Experiment.open(place), Results(place / "autoattack").current
        search, seed = place.name.split("-")
        row = experiment.read_metrics()[-1]
        run = {"search": search, "seed": int(seed), "training_seconds": row["seconds"], "clean": None}
        run |= {key: {**experiment.settings, **records[0]}[key] for key in SAME}
        for record in sorted(records, key=lambda record: record["eps"]):
            run["clean"] = record["clean_accuracy"]
            run[f"AutoAttack {record['eps_text']}/255"] = record["robust_accuracy"]
        runs.append(run)
    if not runs:
        raise ValueError(f"{folder} has no finished runs; make them with scripts/compare_searches.sh")
    for key in SAME:
        if len({run[key] for run in runs}) > 1:
            raise ValueError(f"{folder}: its runs differ in {key}; compare like with like, in a new folder")

    names = ["clean", *(key for key in runs[0] if key.startswith("AutoAttack"))]
    by_seed = {(run["search"], run["seed"]): run for run in runs}
    print(f"\n{'':12}{'':>18}{'mean':>8}{'spread':>8}   seeds ({runs[0]['n']} images, accuracy in %)")
    summary = {}
    for search in SEARCHES:
        for name in names:
            values = [100 * run[name] for run in runs if run["search"] == search]
            mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
            summary[f"{search}, {name}"] = {"mean": mean / 100, "standard_deviation": spread / 100}
            print(f"{search:12}{name:>18}{mean:8.1f}{spread:8.1f}   " + " ".join(f"{value:.1f}" for value in values))
    for one, other in (("shared", "fast"), ("shared", "fab"), ("fast", "fab")):
        seeds = sorted(seed for search, seed in by_seed if search == one and (other, seed) in by_seed)
        for name in names if len(seeds) > 1 else ():
            gains = [100 * (by_seed[one, seed][name] - by_seed[other, seed][name]) for seed in seeds]
            mean, error = statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5
            summary[f"{one} - {other}, {name}"] = {"mean": mean / 100, "standard_error": error / 100}
            print(
                f"{f'{one}-{other}':12}{name:>18}{mean:+8.1f}{error:8.1f}   "
                + " ".join(f"{gain:+.1f}" for gain in gains)
            )
    write_json(Path(sys.argv[3]), {"summary": summary, "runs": runs})
    print(f"figures in {sys.argv[3]}")
    return 0


if __name__ == "__main__":
    flags.run(main)
