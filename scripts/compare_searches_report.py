"""End compare_searches.sh: the accuracies of both searches side by side, with their spread over the seeds, and the
difference of the two at the same seed, with its standard error.

python scripts/compare_searches_report.py FOLDER BURN-IN [OUTPUT.json]

Without OUTPUT.json it only says whether the runs that are there already started from BURN-IN.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiment import flags
from experiment.folder import Experiment
from storage.files import read_json, write_json

FIGURES = {"clean_accuracy": "clean", "robust_accuracy": "AutoAttack 4/255"}


def main() -> int:
    """Print the table of all FOLDER/SEARCH-SEED, and write it with each run's figures."""
    folder, burn_in = Path(sys.argv[1]), sys.argv[2]
    for place in sorted(folder.glob("fa*-*")):
        other = Experiment.open(place).settings["pretrained"]
        if other != burn_in:
            raise ValueError(
                f"{place} started from {other}, not from {burn_in}; compare like with like in a new FOLDER"
            )
    if len(sys.argv) == 3:
        return 0
    output, runs = Path(sys.argv[3]), []
    for place in sorted(folder.glob("fa*-*")):
        record = read_json(place / "autoattack.json")[-1]
        experiment = Experiment.open(place)
        search, seed = place.name.split("-")
        run = {"search": search, "seed": int(seed), "training_seconds": experiment.read_metrics()[-1]["seconds"]}
        run |= {key: experiment.settings[key] for key in ("train_subset", "batch_size", "epochs")}
        runs.append(run | {key: record[key] for key in ("model", "n", "eps", "version", *FIGURES)})
    if not runs:
        raise ValueError(f"{folder} has no finished runs; make them with scripts/compare_searches.sh")

    for key in ("train_subset", "batch_size", "epochs", "n", "eps", "version"):
        if len({run[key] for run in runs}) > 1:
            raise ValueError(f"{folder}: its runs differ in {key}; compare like with like, in a new folder")

    print(f"\n{'search':8}{'':>18}{'mean':>8}{'spread':>8}   seeds ({runs[0]['n']} images, accuracy in %)")
    summary = {}
    for search in ("fast", "fab"):
        for key, label in FIGURES.items():
            values = [100 * run[key] for run in runs if run["search"] == search]
            mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
            summary[f"{search}, {key}"] = {"mean": mean / 100, "standard_deviation": spread / 100}
            print(f"{search:8}{label:>18}{mean:8.1f}{spread:8.1f}   " + " ".join(f"{value:.1f}" for value in values))
    by_seed = {(run["search"], run["seed"]): run for run in runs}
    seeds = sorted(seed for search, seed in by_seed if search == "fast" and ("fab", seed) in by_seed)
    for key, label in FIGURES.items() if len(seeds) > 1 else ():
        gains = [100 * (by_seed["fast", seed][key] - by_seed["fab", seed][key]) for seed in seeds]
        mean, error = statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5
        summary[f"fast - fab, {key}"] = {"mean": mean / 100, "standard_error": error / 100, "seeds": len(seeds)}
        print(f"{'fast-fab':8}{label:>18}{mean:+8.1f}{error:8.1f}   " + " ".join(f"{gain:+.1f}" for gain in gains))
    write_json(output, {"summary": summary, "runs": runs})
    print(f"figures in {output}")
    return 0


if __name__ == "__main__":
    flags.run(main)
