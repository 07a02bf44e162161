"""analyze.py on a tiny run: its numbers against recounts, its choices against hand-made cases, its refusals."""

import csv
import json

import pytest
import torch
from evaluations import identity as record_of
from runs import refusal, run_training, tiny

import analyze
from analysis import measure as measure_module
from analysis import subject as subject_module
from analysis.statistics import interval_of
from analysis.subject import autoattack_points
from dyart.modes import PRECISIONS
from evaluation.candidate import load_candidate, sha256
from evaluation.results import Results
from experiment import build
from experiment.checkpoint import load_checkpoint
from storage.files import write_json

FIGURES = ["speed_over_margin", "negative_speeds", "margins", "robustness", "nearest"]


TABLES = ["speeds", "negative_speeds", "margins", "margins_over_time", "robustness", "nearest"]


EXAMPLES = 3


METHODS = ["clean", "at", "n-fgsm", "fgsm-rs", "dyart"]


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
    found = {"test_size": 400, "clean_accuracy": 0.6, "robust_accuracy": 0.5, "date": "2026-11-25"}
    records = [
        record_of(eps=eps, n=20, sha256=digest) | found
        for eps, digest in ((2 / 255, sha256(folder / "best.pt")), (8 / 255, "of another checkpoint"))
    ]
    write_json(folder / "autoattack.json", records)
    flags = ["--examples", str(EXAMPLES), "--history-examples", "4", "--check-speeds", "2", "--nearest", "2"]
    assert analyze.main([str(folder), *flags, "--methods", *METHODS, "--device", "cpu"]) == 0
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
        subject = subject_module.load_subject(args, torch.device("cpu"))
        examples = build.load_splits(subject.settings)[0]
        return measure_module.directions(subject, ["at"], examples, 20, amp)["at"]

    plain, searches, half = (update(amp) for amp in PRECISIONS)
    for one, other in ((plain, searches), (searches, half), (half, plain)):
        assert 0.9 < sum((one[name] * other[name]).sum() for name in plain) < 1.0001
        assert not all(torch.equal(one[name], other[name]) for name in plain)
        assert all(value.dtype == torch.float32 for value in other.values())


@pytest.mark.parametrize(
    ("flags", "fast", "amp"),
    [
        ([], True, "searches"),
        ([], False, "none"),
        (["--direction", "step"], True, "none"),
        (["--amp", "bf16"], False, "bf16"),
    ],
)
def test_the_precision_of_the_updates_is_recorded(folder, tmp_path, monkeypatch, flags, fast, amp):
    monkeypatch.setattr(analyze, "has_fast_bfloat16", lambda device: fast)
    few = ["--examples", "3", "--history-examples", "1", "--methods", "at", "--output-dir", str(tmp_path)]
    assert analyze.main([str(folder), *few, *flags, "--device", "cpu"]) == 0
    assert json.loads((tmp_path / "dynamics.json").read_text())["amp"] == amp


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
    for method in METHODS:
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


def test_robust_share_starts_at_accuracy_and_falls(analysed, folder):
    rows = read(analysed / "robustness.csv")
    accuracy = sum(row["margin"] > 0 for row in read(analysed / "margins.csv") if row["split"] == "test") / EXAMPLES
    assert rows[0]["eps"] == 0
    assert rows[0]["exact"] == pytest.approx(accuracy)
    for key in ("exact", "soft"):
        shares = [row[key] for row in rows]
        assert shares == sorted(shares, reverse=True)


def test_autoattack_is_that_of_the_same_weights_and_norm(analysed, folder):
    identity = load_candidate(folder / "best.pt").identity
    results = Results(folder / "autoattack")
    (point,) = autoattack_points(results, identity, "Linf")
    assert point["eps"] == pytest.approx(2 / 255)
    assert (point["low"], point["high"]) == interval_of(10, 20)
    assert autoattack_points(results, identity, "L2") == []
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
    (tmp_path / "file").touch()
    assert "--output-dir" in refused(str(folder), "--output-dir", str(tmp_path / "file"), "--device", "cpu")
    assert "'0' is not a whole number at least 1" in refused(str(folder), "--examples", "0")
    assert "--examples 41: the model classifies only" in refused(str(folder), "--examples", "41", "--device", "cpu")
    best = str(folder / "best.pt")
    assert "--checkpoint burn_in: " in refused(best, "--checkpoint", "burn_in", "--device", "cpu")
    step = ["--direction", "step", "--checkpoint", "best"]
    assert "--checkpoint best: --direction step is of latest.pt" in refused(str(folder), *step, "--device", "cpu")
    assert "--direction step: " in refused(best, "--direction", "step", "--device", "cpu")
