"""End quickstart.sh: the table of clean and robust accuracy, burn-in against DyART, and a picture of the run.

python scripts/quickstart_report.py FOLDER
"""

import sys
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiment import flags
from experiment.folder import Experiment
from storage.files import FileError, naming, read_json, replacing

# Okabe and Ito's colours, which people tell apart whatever their sight.
MODELS = {"burn_in.pt": ("burn-in", "#D55E00", "s"), "best.pt": ("DyART", "#0072B2", "o")}


def robust_accuracies(records: list[dict]) -> dict[str, dict[float, float]]:
    """Robust accuracy by checkpoint and ε in units of 1/255; ε = 0 is clean accuracy."""
    table: dict[str, dict[float, float]] = {}
    for record in records:
        row = table.setdefault(record["checkpoint"], {0.0: record["clean_accuracy"]})
        row[record["eps"] * 255] = record["robust_accuracy"]
    return {name: dict(sorted(table[name].items())) for name in MODELS if name in table}


def print_table(table: dict[str, dict[float, float]], record: dict) -> None:
    """The table in per cent, headed by what was evaluated."""
    attack = f"AutoAttack ({record['version']}), {record['norm']}"
    print(f"\n{attack}, the first {record['n']} test images, accuracy in %:\n")
    print(f"{'':10}" + "".join(f"{'clean' if eps == 0 else f'{eps:g}/255':>9}" for eps in next(iter(table.values()))))
    for name, row in table.items():
        print(f"{MODELS[name][0]:10}" + "".join(f"{100 * value:9.1f}" for value in row.values()))


def draw(rows: list[dict], attack: str, table: dict[str, dict[float, float]], record: dict, path: Path) -> None:
    """Training curves, the margin that DyART pushes up, and robust accuracy over ε; written to `path`.

    attack: what the validation's robust accuracy is that of.
    """
    figure, (curves, margins, robust) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for name, label, colour in (("val_clean", "clean", "#D55E00"), ("val_robust", attack, "#0072B2")):
        curves.plot(epochs, [100 * row[name] for row in rows], marker="o", color=colour, label=label)
    curves.set(xlabel="epoch", ylabel="validation accuracy [%]", title="Training", ylim=(0, None))
    curves.legend()
    dyart = [row for row in rows if row.get("margin_q50") is not None]
    where = [row["epoch"] for row in dyart]
    margins.plot(where, [row["margin_q50"] for row in dyart], marker="o", color="#0072B2", label="median")
    quartiles = [[row[f"margin_q{percent}"] for row in dyart] for percent in (25, 75)]
    margins.fill_between(where, *quartiles, color="#0072B2", alpha=0.2, label="middle half")
    margins.set(xlabel="epoch", ylabel="margin of training images [1/255]", title="Distance to the boundary")
    margins.legend()
    burn_in = max((row["epoch"] for row in rows if row["stage"] == "burn-in"), default=0)
    for axis in (curves, margins):
        axis.axvline(burn_in + 0.5, color="grey", linestyle=":", linewidth=1)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for name, row in table.items():
        label, colour, marker = MODELS[name]
        robust.plot(list(row), [100 * value for value in row.values()], marker=marker, color=colour, label=label)
    robust.set(xlabel=f"ε of the {record['norm']} attack [1/255]", ylabel="accuracy [%]", title="AutoAttack")
    robust.set_ylim(0, None)
    robust.legend()
    path.parent.mkdir(exist_ok=True)
    with naming("write", path), replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def main() -> int:
    """Read a folder that quickstart.sh has filled, print, draw."""
    folder = Path(sys.argv[1])
    records = read_json(folder / "autoattack.json")
    table = robust_accuracies(records)
    if set(table) != set(MODELS):
        raise FileError(f"{folder / 'autoattack.json'}: expected records of {' and '.join(MODELS)}")
    picture = folder / "figures" / "quickstart.png"
    run = Experiment.open(folder)
    attack = f"robust (PGD-{run.settings['validation_attack_iter']}, {255 * run.settings['attack_eps']:g}/255)"
    draw(run.read_metrics(), attack, table, records[0], picture)
    print_table(table, records[0])
    print(f"\nmodels    {folder / 'burn_in.pt'}, {folder / 'best.pt'}\nfigures   {folder / 'autoattack.json'}")
    print(f"picture   {picture}")
    return 0


if __name__ == "__main__":
    flags.run(main)
