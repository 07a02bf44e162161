"""The figures that analyze.py draws, each from the table that stands beside it as csv."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen before)
import numpy as np  # noqa: E402

from storage.files import naming, replacing  # noqa: E402

NAMES = {"clean": "clean", "at": "AT", "trades": "TRADES", "mart": "MART", "dyart": "DyART"}
NAMES |= {"n-fgsm": "N-FGSM", "fgsm-rs": "FGSM-RS"}
# Of Okabe & Ito's palette, which stays apart under the common forms of colour blindness.
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#56B4E9",
    "#777777",
)
COLOURS = {"clean": GREY, "at": VERMILLION, "trades": ORANGE, "mart": PURPLE, "dyart": BLUE}
COLOURS |= {"n-fgsm": SKY, "fgsm-rs": GREEN}
MARKERS = {"clean": "s", "at": "v", "trades": "D", "mart": "^", "dyart": "o", "n-fgsm": "P", "fgsm-rs": "X"}
plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})


class Scale(NamedTuple):
    """How margins of a norm are shown: axis values are pixels in [0, 1] times `factor`; `interval` is in those."""

    factor: float
    unit: str
    interval: float


SCALES = {"Linf": Scale(255, "1/255", 1), "L2": Scale(1, "l2 distance, pixels in [0, 1]", 0.05)}


def save_figure(figure: plt.Figure, path: Path, **options: Any) -> None:
    """Write a figure as PNG, all of it or nothing. Raises FileError."""
    with naming("write", path), replacing(path) as file:
        figure.savefig(file, format="png", **options)


def _finish(figure: plt.Figure, path: Path) -> None:
    save_figure(figure, path)
    plt.close(figure)


def speed_over_margin(path: Path, rows: Sequence[dict[str, Any]], methods: Sequence[str], below: float, norm: str):
    """A panel for each method: an example's speed over its margin, red where the boundary comes nearer."""
    scale = SCALES[norm]
    margin = np.array([row["margin"] for row in rows]) * scale.factor
    speeds = {method: np.array([row[f"speed_{method}"] for row in rows]) * scale.factor for method in methods}
    size = np.clip(2500 / len(margin), 4, 14)
    highest = np.percentile(np.abs(np.concatenate(list(speeds.values()))), 99)
    figure, axes = plt.subplots(
        1, len(methods), figsize=(2.5 * len(methods) + 0.8, 3.4), sharex=True, sharey=True, layout="constrained"
    )
    for axis, method in zip(np.atleast_1d(axes), methods, strict=True):
        shown = np.clip(speeds[method], -highest, highest)
        negative = shown < 0
        vulnerable = margin < below * scale.factor
        share = f"{negative[vulnerable].mean():.0%} of the" if vulnerable.any() else "no"
        axis.axhline(0, color="black", linewidth=0.8)
        axis.scatter(margin[~negative], shown[~negative], s=size, color=BLUE, alpha=0.6, linewidth=0)
        axis.scatter(margin[negative], shown[negative], s=size, color=VERMILLION, alpha=0.6, linewidth=0)
        axis.set_title(f"{NAMES[method]}\n{share} vulnerable negative", fontsize=10)
        axis.set_xlim(0, np.percentile(margin, 99.5) * 1.05)
    figure.supxlabel(f"margin R ({scale.unit}); vulnerable: R < {below * scale.factor:g}", fontsize=10)
    np.atleast_1d(axes)[0].set_ylabel(f"speed dR/dt ({scale.unit}\nper unit length of the update)")
    _finish(figure, path)


def negative_share(path: Path, rows: Sequence[dict[str, Any]], methods: Sequence[str], norm: str):
    """Share of negative speeds in each interval of margins with 5 examples or more, with its confidence interval."""
    scale = SCALES[norm]
    figure, (axis, counts) = plt.subplots(
        2, 1, figsize=(7, 4.6), sharex=True, height_ratios=(4, 1), layout="constrained"
    )
    for index, method in enumerate(methods):
        of_method = [row for row in rows if row["method"] == method and row["total"] >= 5]
        centre = np.array([(row["from"] + row["to"]) / 2 for row in of_method])
        share, low, high = (100 * np.array([row[key] for row in of_method]) for key in ("share", "low", "high"))
        shift = (index - (len(methods) - 1) / 2) * 0.14 * scale.interval
        # Rounding may put a share of exactly 0 or 1 just outside its interval.
        errors = np.maximum([share - low, high - share], 0)
        style = {"color": COLOURS[method], "marker": MARKERS[method], "markersize": 5, "linewidth": 1, "capsize": 2}
        axis.errorbar(centre + shift, share, errors, label=NAMES[method], **style)
    axis.set_ylim(0, 100)
    axis.set_ylabel("negative speeds (%)\nwith 95 % intervals")
    axis.legend(ncols=len(methods), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    first = [row for row in rows if row["method"] == methods[0]]
    centre = [(row["from"] + row["to"]) / 2 for row in first]
    counts.bar(centre, [row["total"] for row in first], 0.9 * scale.interval, color="#bbbbbb")
    counts.set_ylabel("examples")
    counts.set_xlabel(f"margin R ({scale.unit}), in intervals of {scale.interval:g}")
    _finish(figure, path)


def margins(path: Path, samples: dict[str, np.ndarray], history: Sequence[dict[str, Any]], norm: str):
    """Left: the margins of train and test images. Right: their quantiles over the checkpoints of the run."""
    scale = SCALES[norm]
    styles = {"train": (BLUE, "-", "o"), "test": (VERMILLION, "--", "v")}
    panels = 2 if history else 1
    figure, axes = plt.subplots(1, panels, figsize=(5 * panels, 3.6), layout="constrained", squeeze=False)
    axis = axes[0, 0]
    positive = {split: values[(values > 0) & np.isfinite(values)] * scale.factor for split, values in samples.items()}
    highest = max((np.percentile(values, 99) for values in positive.values() if len(values)), default=1.0)
    bins = np.linspace(0, highest, 31)
    for split, values in positive.items():
        colour, line, _ = styles[split]
        weights = np.full(len(values), 100 / max(len(values), 1))
        median = f", median {np.median(values):.2f}" if len(values) else ""
        label = f"{split} ({len(values)} correct{median})"
        axis.hist(
            values, bins, weights=weights, histtype="step", color=colour, linestyle=line, linewidth=1.6, label=label
        )
    axis.set_xlabel(f"margin R of correct examples ({scale.unit})")
    axis.set_ylabel("correct examples (%)")
    axis.legend(frameon=False)
    if history:
        axis = axes[0, 1]
        for split, (colour, line, marker) in styles.items():
            of_split = sorted((row for row in history if row["split"] == split), key=lambda row: row["epoch"])
            epochs = [row["epoch"] for row in of_split]
            # None, for a checkpoint without correct examples or a margin that was not found, becomes a gap.
            columns = {key: np.array([row[key] for row in of_split], float) for key in ("q10", "q50", "q90")}
            q10, q50, q90 = (values * scale.factor for values in columns.values())
            axis.plot(epochs, q50, color=colour, linestyle=line, marker=marker, markersize=4, label=f"{split}, median")
            axis.fill_between(epochs, q10, q90, color=colour, alpha=0.15, label=f"{split}, 10 to 90 %", linewidth=0)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("epoch")
        axis.set_ylabel(f"margin R of correct examples ({scale.unit})")
        axis.legend(frameon=False)
    _finish(figure, path)


def _autoattack(axis: plt.Axes, points: Sequence[dict[str, Any]], scale: Scale):
    if points:
        at, share, low, high = (np.array([point[key] for point in points]) for key in ("eps", "share", "low", "high"))
        style = {"color": VERMILLION, "marker": "D", "linestyle": "none", "capsize": 3}
        errors = 100 * np.maximum([share - low, high - share], 0)
        axis.errorbar(at * scale.factor, 100 * share, errors, label="AutoAttack, 95 % interval", **style)


def curves(path: Path, subjects: Sequence[dict[str, Any]]):
    """A panel for each checkpoint: robust accuracy over ε from minimum-norm distances, beside AutoAttack's.

    subjects: `title`, `norm`, `rows` of eps and robust_accuracy, `autoattack` points, `end` of the axis of ε.
    """
    figure, axes = plt.subplots(
        1, len(subjects), figsize=(5.2 * len(subjects), 4), layout="constrained", squeeze=False, sharey=True
    )
    for axis, subject in zip(axes[0], subjects, strict=True):
        scale = SCALES[subject["norm"]]
        eps, share = (np.array([row[key] for row in subject["rows"]]) for key in ("eps", "robust_accuracy"))
        label = "upper bound, from minimum-norm distances"
        axis.step(eps * scale.factor, 100 * share, where="post", color=BLUE, linewidth=1.8, label=label)
        _autoattack(axis, subject["autoattack"], scale)
        axis.set(ylim=(0, 100), xlim=(0, subject["end"] * scale.factor), title=subject["title"])
        axis.set_xlabel(f"perturbation ε ({scale.unit})")
    axes[0, 0].set_ylabel("robust accuracy (%)")
    axes[0, 0].legend(frameon=False)
    _finish(figure, path)


def robustness(path: Path, rows: Sequence[dict[str, Any]], attacks: Sequence[dict[str, Any]], norm: str):
    """Share of test images with R > ε over ε, for the exact and the soft boundary, beside AutoAttack."""
    scale = SCALES[norm]
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    eps = np.array([row["eps"] for row in rows]) * scale.factor
    for key, colour, line, label in (
        ("exact", BLUE, "-", "exact margin R > ε (bounds robust accuracy from above)"),
        ("soft", GREEN, "--", "soft margin R_β > ε"),
    ):
        axis.plot(eps, [100 * row[key] for row in rows], color=colour, linestyle=line, linewidth=1.8, label=label)
    _autoattack(axis, attacks, scale)
    axis.set_ylim(0, 100)
    axis.set_xlim(left=0)
    axis.set_xlabel(f"perturbation ε ({scale.unit})")
    axis.set_ylabel("test images (%)")
    axis.legend(frameon=False)
    _finish(figure, path)


def nearest(path: Path, examples: Sequence[dict[str, Any]], norm: str):
    """A column for each example: x, its boundary point x̂, and x̂ − x scaled to the full range around grey."""
    scale = SCALES[norm]
    figure, axes = plt.subplots(
        3, len(examples), figsize=(1.35 * len(examples) + 0.5, 4.6), layout="constrained", squeeze=False
    )
    for column, example in enumerate(examples):
        move = example["boundary"] - example["x"]
        shown = (example["x"], example["boundary"], 0.5 + 0.5 * move / max(np.abs(move).max(), 1e-12))
        for row, image in enumerate(shown):
            axes[row, column].imshow(np.clip(image, 0, 1), interpolation="nearest")
            axes[row, column].set(xticks=[], yticks=[])
            for spine in axes[row, column].spines.values():
                spine.set_visible(False)
        axes[0, column].set_title(f"R = {example['margin'] * scale.factor:.2g}", fontsize=9)
        axes[1, column].set_title(f"{example['label']} → {example['predicted']}", fontsize=9)
    for row, label in enumerate(("x", "x̂", "x̂ − x, scaled")):
        axes[row, 0].set_ylabel(label)
    figure.suptitle(f"nearest to the boundary: margin R ({scale.unit}), class of x → class beyond it", fontsize=10)
    _finish(figure, path)


def speed_check(path: Path, rows: Sequence[dict[str, Any]], results: dict[str, dict[str, Any]], norm: str):
    """A panel for each method: the measured change of each margin over the length of a small step, and the speed."""
    scale = SCALES[norm]
    figure, axes = plt.subplots(
        1, len(results), figsize=(2.6 * len(results) + 0.6, 3.4), layout="constrained", squeeze=False
    )
    for axis, (method, result) in zip(axes[0], results.items(), strict=True):
        of_method = [row for row in rows if row["method"] == method]
        predicted, measured = (
            np.array([row[key] for row in of_method]) * scale.factor for key in ("speed", "measured")
        )
        if of_method:
            ends = [min(predicted.min(), measured.min()), max(predicted.max(), measured.max())]
            axis.plot(ends, ends, color="black", linewidth=0.8)
        axis.scatter(predicted, measured, s=9, color=COLOURS[method], marker=MARKERS[method], linewidth=0, alpha=0.8)
        title = NAMES[method]
        if result["correlation"] is not None:
            title += f"\ncorrelation {result['correlation']:.3f}\nequal signs {result['equal_signs']:.1%}"
        axis.set_title(title, fontsize=10)
    figure.supxlabel(f"predicted speed ({scale.unit} per unit length of update)", fontsize=10)
    axes[0, 0].set_ylabel("measured change of R\nover the step's length")
    _finish(figure, path)


def attacks(path: Path, subjects: Sequence[tuple[str, Sequence[dict[str, Any]]]]):
    """A panel for each subject: what an attack's distances exceed the best known by, over its passes."""
    figure, axes = plt.subplots(
        1, len(subjects), figsize=(4.2 * len(subjects), 3.8), layout="constrained", squeeze=False, sharey=True
    )
    palette = [BLUE, VERMILLION, ORANGE, GREEN, PURPLE, SKY, GREY]
    names = list(dict.fromkeys(row["attack"] for _, rows in subjects for row in rows))
    for axis, (title, rows) in zip(axes[0], subjects, strict=True):
        for index, name in enumerate(names):
            points = sorted((row["forward"] + row["backward"], row["mean"]) for row in rows if row["attack"] == name)
            if points:
                passes, mean = np.array(points).T
                style = {"color": palette[index % len(palette)], "marker": "osv^DPX"[index % 7], "markersize": 4}
                axis.plot(passes, np.maximum(100 * (mean - 1), 0.01), label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel="forward + backward passes an image", title=title)
    axes[0, 0].set_ylabel("mean distance above the best known (%)")
    axes[0, 0].legend(frameon=False, fontsize=8)
    _finish(figure, path)
