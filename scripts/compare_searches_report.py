"""For compare_searches.sh: which runs are missing, and the accuracies with each search side by side, with their spread
over the seeds and the differences at the same seed.

python scripts/compare_searches_report.py BURN-IN FOLDER OUTPUT.json            the table, also into OUTPUT.json
python scripts/compare_searches_report.py BURN-IN FOLDER OUTPUT.json SEEDS      prints the runs that are missing

A run is finished where OUTPUT.json has it, from the same weights and with the same settings, or FOLDER/SEARCH-SEED.
"""

import hashlib
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.results import Results
from experiment import flags
from experiment.folder import Experiment
from experiment.recipes import TRAINING
from experiment.weights import read_weights
from storage.files import read_json, write_json

SEARCHES = tuple(TRAINING)
EPS = ("4/255", "8/255")
# What runs must have in common to be compared.
SAME = ("burn_in", "model", "lambda_robust", "clip_grad", "train_subset", "batch_size", "epochs", "n", "version")


def digest_of_weights(path: Path) -> str:
    """What tells the weights of a file, whatever else is in it."""
    content = hashlib.sha256()
    for name, tensor in sorted(read_weights(path, None).state_dict.items()):
        content.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return content.hexdigest()


def finished_runs(burn_in: Path, folder: Path, output: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The finished runs by search and seed. Raises ValueError where they cannot be compared."""
    weights = digest_of_weights(burn_in)
    known = read_json(output)["runs"] if output.exists() else []
    steps = {search: training["search_steps"] for search, training in TRAINING.items()}
    known = [run for run in known if run.get("search_steps") == steps[run["search"]]]  # as it is trained with now
    runs = {(run["search"], run["seed"]): run for run in known if run.get("burn_in") == weights}
    for place in sorted(place for search in SEARCHES for place in folder.glob(f"{search}-*")):
        experiment, results = Experiment.open(place), Results(place / "autoattack")
        settings, records = experiment.settings, {record["eps_text"]: record for record in results.current}
        if settings["pretrained"] != str(burn_in):
            raise ValueError(f"{place} started from {settings['pretrained']}, not from {burn_in}: use a new FOLDER")
        if settings["search_steps"] != steps[settings["search"]]:
            raise ValueError(f"{place} was trained with {settings['search_steps']} steps; use a new FOLDER")
        if not records.keys() >= set(EPS):
            continue
        record = records[EPS[0]]
        run = {"search": settings["search"], "seed": settings["seed"], "burn_in": weights}
        run |= {"search_steps": settings["search_steps"]}
        run |= {key: {**settings, **record}[key] for key in SAME if key != "burn_in"}
        run |= {"training_seconds": experiment.read_metrics()[-1]["seconds"], "clean": record["clean_accuracy"]}
        run |= {f"AutoAttack {eps}": records[eps]["robust_accuracy"] for eps in EPS}
        runs[run["search"], run["seed"]] = run
    for key in SAME:
        if len({run[key] for run in runs.values()}) > 1:
            raise ValueError(f"{folder} and {output}: runs differ in {key}; compare like with like, in new ones")
    return runs


def main() -> int:
    """Print what is missing, or print and write the table."""
    burn_in, folder, output = map(Path, sys.argv[1:4])
    runs = finished_runs(burn_in, folder, output)
    if len(sys.argv) > 4:
        wanted = [(search, int(seed)) for seed in sys.argv[4].split() for search in SEARCHES]
        print("".join(f"{search}-{seed}\n" for search, seed in wanted if (search, seed) not in runs), end="")
        return 0
    if not runs:
        raise ValueError(f"{folder} has no finished runs; make them with scripts/compare_searches.sh")

    names = ["clean", *(f"AutoAttack {eps}" for eps in EPS)]
    print(f"\n{'':12}{'':>18}{'mean':>8}{'spread':>8}   seeds ({next(iter(runs.values()))['n']} images, accuracy in %)")
    summary = {}
    for search in SEARCHES:
        for name in names:
            values = [100 * runs[search, seed][name] for other, seed in sorted(runs) if other == search]
            if not values:
                continue
            mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
            summary[f"{search}, {name}"] = {"mean": mean, "standard_deviation": spread, "seeds": len(values)}
            print(f"{search:12}{name:>18}{mean:8.1f}{spread:8.1f}   " + " ".join(f"{value:.1f}" for value in values))
    for one, other in (("shared", "fast"), ("shared", "fab"), ("fast", "fab")):
        seeds = sorted(seed for search, seed in runs if search == one and (other, seed) in runs)
        for name in names if len(seeds) > 1 else ():
            gains = [100 * (runs[one, seed][name] - runs[other, seed][name]) for seed in seeds]
            mean, error = statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5
            summary[f"{one} - {other}, {name}"] = {"mean": mean, "standard_error": error, "seeds": len(seeds)}
            pair, each = f"{one}-{other}", " ".join(f"{gain:+.1f}" for gain in gains)
            print(f"{pair:12}{name:>18}{mean:+8.1f}{error:8.1f}   {each}")
    write_json(output, {"summary": summary, "runs": [runs[key] for key in sorted(runs)]})
    print(f"figures, in %, in {output}")
    return 0


if __name__ == "__main__":
    flags.run(main)
