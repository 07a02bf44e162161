"""analyze.py on a tiny run: its numbers against recounts, its choices against hand-made cases, its refusals."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import analyze
from analyze import Search, autoattack_points, by_interval, choose_correct, measure, paired, proportion, quantiles
from data import Split
from dyart.dynamics import wilson_interval
from dyart.margin import Boundary, find_boundary, soft_logit_margin
from dyart.modes import PRECISIONS
from evaluation.candidate import load_candidate, sha256
from experiment.checkpoint import load_checkpoint
from storage.files import write_json
from tests.runs import refusal, run_training, tiny
from tests.test_margin import Strip

FIGURES = ["speed_over_margin", "negative_speeds", "margins", "robustness", "nearest"]
TABLES = ["speeds", "negative_speeds", "margins", "margins_over_time", "robustness", "nearest"]
EXAMPLES = 3


def read(path):
    with open(path, newline="") as file:
        return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _number(text):
    try:
        return float(text)
    except ValueError:
        return text or None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    assert (
        run_training(*tiny(root, "--method", "clean", "--epochs", "3", "--save-every", "1", "--attack-iter", "1")) == 0
    )
    return root / "run"


@pytest.fixture(scope="module")
def analysed(folder):
    records = [
        {"norm": "Linf", "eps": eps, "robust_accuracy": 0.5, "n": 20, "weights": "average", "sha256": digest}
        for eps, digest in ((2 / 255, sha256(folder / "best.pt")), (8 / 255, "of another checkpoint"))
    ]
    write_json(folder / "autoattack.json", records)
    flags = ["--examples", str(EXAMPLES), "--history-examples", "4", "--check-speeds", "2", "--nearest", "2"]
    assert analyze.main([str(folder), *flags, "--methods", "clean", "at", "dyart", "--device", "cpu"]) == 0
    return folder / "figures"


def test_all_figures_and_tables_are_written(analysed):
    assert {path.name for path in analysed.iterdir()} == {
        *(f"{name}.png" for name in [*FIGURES, "speed_check"]),
        *(f"{name}.csv" for name in [*TABLES, "speed_check"]),
        "dynamics.json",
    }
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in analysed.glob("*.png"))


def test_updates_are_taken_in_the_precision_of_the_flag(folder):
    def update(amp):
        args = analyze.build_parser().parse_args([str(folder), "--device", "cpu"])
        subject = analyze.load_subject(args, torch.device("cpu"))
        examples = analyze.load_splits(subject.settings)[0]
        return analyze.directions(subject, ["at"], examples, 20, amp)["at"]

    plain, searches, half = (update(amp) for amp in PRECISIONS)
    for one, other in ((plain, searches), (searches, half), (half, plain)):
        assert 0.9 < sum((one[name] * other[name]).sum() for name in plain) < 1.0001
        assert not all(torch.equal(one[name], other[name]) for name in plain)
        assert all(value.dtype == torch.float32 for value in other.values())


@pytest.mark.parametrize(
    ("flags", "amp"), [([], "searches"), (["--direction", "step"], "none"), (["--amp", "bf16"], "bf16")]
)
def test_the_precision_of_the_updates_is_recorded(folder, tmp_path, flags, amp):
    few = ["--examples", "3", "--history-examples", "1", "--methods", "at", "--output-dir", str(tmp_path)]
    assert analyze.main([str(folder), *few, *flags, "--device", "cpu"]) == 0
    assert json.loads((tmp_path / "dynamics.json").read_text())["amp"] == amp


def test_examples_that_a_search_misses_are_searched_for_longer(monkeypatch):
    """The search is made to miss example 1; the longer one that follows finds it, and touches no other."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double(), torch.rand(4, 3, 2, 2).double()
    y = model(x).argmax(1)
    y[3] = 1 - y[3]
    searched, sizes = analyze.find_boundary, []

    def find_boundary(model, x, labels, **options):
        sizes.append((len(x), options["steps"]))
        boundary = searched(model, x, labels, **options)
        if len(sizes) == 1:
            boundary.found[1], boundary.value[1] = False, 1.0
        return boundary

    monkeypatch.setattr(analyze, "find_boundary", find_boundary)
    search = Search("Linf", math.inf, 5, 4)
    boundary = analyze._find(model, x, y, search)
    assert sizes == [(4, 5), (1, 5 * analyze.LONGER)]
    assert boundary.found.tolist() == [True, True, True, False]
    expected = searched(model, x, y, temperature=math.inf, steps=50)
    torch.testing.assert_close(boundary.margin, expected.margin, rtol=0.05, atol=0)


@pytest.mark.parametrize("spoiled", ["before the step", "after it"])
def test_a_search_that_misses_the_closest_point_is_made_up_for(monkeypatch, spoiled):
    """A linear classifier, whose margins and speeds are known; one first search ends at a point that is farther."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    with torch.no_grad():
        logits = model(torch.full((1, 3, 2, 2), 128 / 255).double())[0]
        model[1].bias[0] += 0.02 - (logits[0] - logits[1])
    images = torch.full((8, 2, 2, 3), 128, dtype=torch.uint8)
    images[:, 0, 0, 0] += torch.arange(8, dtype=torch.uint8)
    along = {"at": {name: torch.randn_like(p) / 10 for name, p in model.named_parameters()}}
    searched = analyze._find
    spoils = []

    @torch.no_grad()
    def find(of, x, y, search, start=None):
        boundary = searched(of, x, y, search, start)
        if start is None and of[1].weight.equal(model[1].weight) == (spoiled == "before the step"):
            weight = (of[1].weight[0] - of[1].weight[1]).detach()
            value = soft_logit_margin(of(x), y, math.inf)[3]
            aside = x[3].flatten().clone()  # Example 3 goes along a single coordinate.
            aside[weight.abs().argmax()] -= 1.001 * value / weight[weight.abs().argmax()]
            boundary.x[3] = aside.view(3, 2, 2)
            spoils.append(((boundary.x[3] - x[3]).abs().max() / boundary.margin[3]).item())
            boundary.margin[3] *= spoils[-1]
            boundary.value[3] = soft_logit_margin(of(boundary.x), y, math.inf)[3]
        return boundary

    monkeypatch.setattr(analyze, "_find", find)
    examples = Split(images, torch.zeros(8, dtype=torch.int64))
    rows, results = analyze.check_speeds(model, examples, Search("Linf", math.inf, 10, 8), along)
    assert len(spoils) == 1 and spoils[0] > 2
    assert results["at"]["examples"] == len(rows) == 8
    assert results["at"]["equal_signs"] == 1
    for row in rows:
        assert row["measured"] == pytest.approx(row["speed"], rel=0.01)


@pytest.mark.parametrize("far", [0, 1])
def test_the_point_of_one_model_leads_the_other_to_the_closer_boundary(far):
    x, y = torch.tensor([[0.52, 0.5]]).double(), torch.zeros(1, dtype=torch.int64)
    models, search = [Strip(), Strip()], Search("Linf", math.inf, 20, 1)
    found = [find_boundary(Strip(), x, y, temperature=math.inf, steps=20, start=x + 0.17 * s) for s in (-0.7, 1)]
    assert [round(boundary.margin.item(), 2) for boundary in found] == [0.12, 0.18]
    settled, moving = analyze._settle(models, found if far else found[::-1], x, y, search)
    assert [round(boundary.margin.item(), 2) for boundary in settled] == [0.12, 0.12]
    assert moving == 0


@pytest.mark.parametrize("gains", [3, 10**6])
def test_searches_go_on_while_an_example_comes_closer(monkeypatch, gains):
    """Example 1 comes closer by a tenth, so many times; example 0 never does, and is not searched again."""
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    found = Boundary(x, torch.tensor([True, True]), torch.ones(2), torch.zeros(2), torch.ones(2, 3))
    sizes = []

    def find(model, x, y, search, start):
        sizes.append(len(x))
        margin = torch.ones(len(x))
        margin[-1] = 0.9 ** min(len(sizes), gains)
        return Boundary(x, torch.ones(len(x), dtype=torch.bool), margin, torch.zeros(len(x)), torch.ones_like(x))

    monkeypatch.setattr(analyze, "_find", find)
    (settled,), moving = analyze._settle([None], [found], x, y, Search("Linf", math.inf, 5, 2))
    rounds = min(gains + 1, analyze.CHECK_ROUNDS)
    assert sizes == [2] + [1] * (rounds - 1)
    torch.testing.assert_close(settled.margin, torch.tensor([1, 0.9 ** min(gains, rounds)]))
    assert moving == (gains > rounds)


def test_methods_are_paired_example_by_example():
    speeds = {"dyart": [1, 1, -1, -1, 1], "at": [-1, -1, -1, 1, -1], "clean": [1, 1, -1, -1, 1]}
    pairs = paired({name: np.array(values) for name, values in speeds.items()}, "dyart")
    assert pairs == {
        "at": {"only_it": 3, "only_dyart": 1, "p": 0.625},  # 2 (C(4, 0) + C(4, 1)) / 2^4
        "clean": {"only_it": 0, "only_dyart": 0, "p": 1.0},
    }
    assert paired({"at": np.array([1.0])}, "dyart") == {}


def test_the_attacks_radius_says_who_is_vulnerable(folder, tmp_path):
    argv = [str(folder), "--examples", "3", "--methods", "at", "--device", "cpu", "--output-dir", str(tmp_path)]
    assert analyze.main([*argv, "--history-examples", "1", "--attack-eps", "1/255"]) == 0
    summary, rows = json.loads((tmp_path / "dynamics.json").read_text()), read(tmp_path / "speeds.csv")
    assert summary["vulnerable_below"] == 1 / 255
    total = summary["negative_speeds_of_vulnerable"]["at"]["total"]
    assert total == sum(row["margin"] < 1 / 255 for row in rows) < len(rows)


def test_summary_counts_the_negative_speeds_in_the_table(analysed):
    summary, rows = json.loads((analysed / "dynamics.json").read_text()), read(analysed / "speeds.csv")
    assert len(rows) == summary["found"]["boundary_points"] <= EXAMPLES
    vulnerable = [row for row in rows if row["margin"] < summary["vulnerable_below"]]
    for method in ("clean", "at", "dyart"):
        counted = summary["negative_speeds_of_vulnerable"][method]
        assert counted["total"] == len(vulnerable)
        assert counted["negative"] == sum(row[f"speed_{method}"] < 0 for row in vulnerable)
    for row in read(analysed / "negative_speeds.csv"):
        inside = [r for r in rows if row["from"] <= r["margin"] < row["to"]]
        assert row["total"] == len(inside)
        assert row["negative"] == sum(r[f"speed_{row['method']}"] < 0 for r in inside)


def test_history_has_each_epoch_of_the_run_once_and_both_splits(analysed, folder):
    rows = read(analysed / "margins_over_time.csv")
    best = load_checkpoint(folder / "best.pt")["epoch"]
    names = {epoch: "best.pt" if epoch == best else f"epoch_000{epoch}.pt" for epoch in (1, 2, 3)}
    assert {(row["checkpoint"], row["epoch"]) for row in rows} == {(name, epoch) for epoch, name in names.items()}
    assert len(rows) == 2 * len(names)


def test_margins_of_wrong_and_of_hopeless_examples():
    """0 where misclassified, inf where right and no boundary in reach; in order, whatever the number of batches."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].weight[0, 0], model[1].weight[1, 0], model[1].bias[:] = 1, -1, torch.tensor([0.0, 0.2])
    images = torch.zeros(5, 2, 2, 3, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([255, 0, 51, 255, 0])  # Φ of class 0 is 2 x_1 - 0.2, that of class 1 minus this
    examples, search = Split(images, torch.tensor([0, 0, 0, 1, 1])), Search("Linf", math.inf, 5, 2)
    margins = measure(model.eval(), examples, search, {}, "")
    assert margins["margin"].tolist() == pytest.approx([0.9, 0, 0.1, 0, 0.1], rel=0.05)
    with torch.no_grad():
        model[1].bias[0] = 9
    margins = measure(model, examples, search, {}, "")
    assert margins["margin"].tolist() == [math.inf] * 3 + [0, 0]


def test_parallel_results_are_in_order_and_errors_come_through():
    cpu = torch.device("cpu")
    assert list(analyze.in_parallel(lambda item: item**2, range(20), cpu)) == [item**2 for item in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(analyze.in_parallel(lambda item: 1 / item, [1, 0, 2], cpu))


def test_robust_share_starts_at_accuracy_and_falls(analysed, folder):
    rows = read(analysed / "robustness.csv")
    accuracy = sum(row["margin"] > 0 for row in read(analysed / "margins.csv") if row["split"] == "test") / EXAMPLES
    assert rows[0]["eps"] == 0
    assert rows[0]["exact"] == pytest.approx(accuracy)
    for key in ("exact", "soft"):
        shares = [row[key] for row in rows]
        assert shares == sorted(shares, reverse=True)


def test_autoattack_is_that_of_the_same_weights_and_norm(analysed, folder):
    identity = load_candidate(folder / "best.pt", "average", dict.fromkeys(analyze.MODEL_SETTINGS), print).identity
    (point,) = autoattack_points(folder, identity, "Linf")
    assert point["eps"] == pytest.approx(2 / 255)
    assert (point["low"], point["high"]) == wilson_interval(10, 20)
    assert autoattack_points(folder, identity, "L2") == []
    assert autoattack_points(None, identity, "Linf") == []


def test_the_optimizers_step_is_analysed_on_the_weights_that_it_trains(folder, tmp_path):
    flags = ["--examples", "2", "--methods", "clean", "--device", "cpu", "--output-dir", str(tmp_path)]
    for direction in ("gradient", "step"):
        assert analyze.main([str(folder), *flags, "--direction", direction, "--nearest", "1"]) == 0
        summary = json.loads((tmp_path / "dynamics.json").read_text())
        expected = ("best.pt", "average") if direction == "gradient" else ("latest.pt", "raw")
        assert (summary["checkpoint"], summary["weights"]) == expected


def test_a_bare_file_needs_its_model_named(folder, tmp_path, capsys):
    state = load_checkpoint(folder / "best.pt")
    torch.save(state["average"], tmp_path / "weights.pt")
    assert "--model" in refusal(capsys, str(tmp_path / "weights.pt"), main=analyze.main)
    flags = ["--model", "wrn-10-1-swish", "--dataset", "digits", "--output-dir", str(tmp_path / "out")]
    flags += ["--examples", "2", "--methods", "clean", "--nearest", "1", "--device", "cpu"]
    assert analyze.main([str(tmp_path / "weights.pt"), *flags]) == 0
    assert not (tmp_path / "out" / "margins_over_time.csv").exists()


def test_one_line_for_what_cannot_be_analysed(folder, tmp_path, capsys):
    def refused(*argv):
        return refusal(capsys, *argv, main=analyze.main)

    assert "or --toy" in refused()
    assert "or --toy" in refused(str(folder), "--toy")
    assert "no such experiment folder" in refused(str(tmp_path / "nowhere"))
    assert "best2.pt" in refused(str(folder), "--checkpoint", "best2.pt")
    assert "'0' is not a whole number at least 1" in refused(str(folder), "--examples", "0")
    assert "--examples 41: the model classifies only" in refused(str(folder), "--examples", "41", "--device", "cpu")
    best = str(folder / "best.pt")
    assert "--direction step: " in refused(best, "--direction", "step", "--device", "cpu")


class Threshold(nn.Module):
    """Class 1 where the mean pixel is above 0.5, with logits ±4 (mean − 0.5); class 2 never."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, x):
        value = self.scale * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-value, value, torch.full_like(value, -100.0)], 1)


def grey(levels):
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 4, 4, 3)


def test_margin_is_zero_where_wrong_and_the_distance_where_right():
    split = Split(grey([0, 51, 204, 255]), torch.tensor([0, 1, 1, 1]))
    margin = measure(Threshold(), split, Search("Linf", math.inf, 10, 3), {}, "")["margin"]
    assert margin[1] == 0
    assert margin[[0, 2, 3]] == pytest.approx([0.5, 0.3, 0.5], abs=3e-3)


def test_margin_is_infinite_where_no_boundary_point_was_found():
    class Constant(Threshold):
        def forward(self, x):
            return super().forward(x) * 0 + torch.tensor([1.0, 0.0, 0.0])

    margin = measure(Constant(), Split(grey([9, 9]), torch.tensor([0, 1])), Search("Linf", math.inf, 3, 2), {}, "")
    assert margin["margin"].tolist() == [math.inf, 0]


def test_only_correct_examples_are_chosen_in_order_over_batches():
    split = Split(grey([0, 1, 255, 2, 3]), torch.tensor([0, 1, 1, 0, 0]))
    chosen = choose_correct(Threshold(), split, 3, math.inf, 2)
    assert chosen.images[:, 0, 0, 0].tolist() == [0, 255, 2]
    assert chosen.labels.tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="only 4 of the training images"):
        choose_correct(Threshold(), split, 5, math.inf, 2)


def test_intervals_hold_each_example_once():
    margin, speed = np.array([0.0, 0.5, 1.0, 2.9, 3.0]), np.array([-1.0, 1.0, -1.0, -1.0, -1.0])
    rows = by_interval(margin, speed, "at", 1.0, 3.0)
    assert [(row["from"], row["to"], row["negative"], row["total"]) for row in rows] == [
        (0, 1, 1, 2),
        (1, 2, 1, 1),
        (2, 3, 1, 1),
    ]
    assert (rows[0]["low"], rows[0]["high"]) == wilson_interval(1, 2)
    assert proportion(np.array([]))["share"] is None


def test_quantiles_are_of_correct_examples_and_count_unfound_margins_as_largest():
    row = quantiles(np.array([0.0, 0.0, 1.0, 2.0, 3.0, math.inf, math.inf]))
    assert (row["examples"], row["correct"]) == (7, 5)
    assert (row["q10"], row["q25"], row["q50"], row["q75"], row["q90"]) == (1, 2, 3, None, None)
    assert quantiles(np.zeros(2))["q50"] is None


def test_toy_is_drawn_and_small(tmp_path, capsys):
    assert analyze.main(["--toy", "--output-dir", str(tmp_path)]) == 0
    assert "AT: 4 of 5 vulnerable points lose margin; DyART: 1 of 5" in capsys.readouterr().out
    assert 10_000 < (tmp_path / "toy.png").stat().st_size < 200_000
