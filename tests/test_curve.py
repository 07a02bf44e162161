"""eval.py --curve: robust accuracy at every ε, from distances."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from evaluations import Stairs, contents, digits, learn_digits, two_checkpoints
from torch import nn

import eval as eval_script
from analysis.curve import curve_of, lines_of, measure_curve, measure_distances
from data import Split, to_input
from dyart.minimum_norm import minimum_norm_attack
from experiment.flags import length
from storage.files import write_json

CPU = torch.device("cpu")
WHAT = {"checkpoint": "best.pt", "weights": "average", "norm": "Linf", "passes": 10, "images": "first", "part": "test"}


def test_steps_of_a_curve_by_hand():
    rows = curve_of(np.array([0.0, 0.2, math.inf, 0.1, 0.2]))
    assert [(row["eps"], row["robust_accuracy"]) for row in rows] == [
        (0.0, pytest.approx(0.8)),
        (0.1, pytest.approx(0.6)),
        (0.2, pytest.approx(0.2)),
    ]
    assert curve_of(np.array([math.inf, math.inf])) == [{"eps": 0.0, "robust_accuracy": 1.0}]


def test_distances_are_those_of_the_attack_in_the_order_of_the_images():
    model = learn_digits(nn.Identity)
    some = Split(digits().images[:30], digits().labels[:30])
    found = measure_distances(model, some, "L2", 10, 8, "distances")
    expected = minimum_norm_attack(model, to_input(some.images), some.labels, norm="L2", passes=10).distance
    np.testing.assert_allclose(found, expected.double().numpy(), rtol=1e-4)
    assert (found[found > 0] > 0).any() and (found == 0).any()


def test_masked_gradients_are_said_not_to_be_robustness():
    record = measure_curve(learn_digits(Stairs), digits(), {**WHAT, "n": 40}, [length("8", "Linf", "")], 20, CPU)
    correct = round(40 * record["clean_accuracy"])
    assert 0 < correct == record["nothing_found"] and record["robust_accuracy"] == {"8/255": correct / 40}
    assert lines_of(record)[1] == f"nothing was found for {correct} of them: they count as robust, and need not be"


def test_a_folder_from_the_command_line(tmp_path, capsys):
    folder = two_checkpoints(tmp_path)
    points = {"dataset": "digits", "model": "wrn-10-1-swish", "group_norm": False, "normalize": False}
    assert eval_script.main([str(folder), "--curve", "--n", "20", "--device", "cpu", "--checkpoint", "best"]) == 0
    (record,) = json.loads((folder / "curve.json").read_text())
    assert list(record["robust_accuracy"]) == ["2/255", "4/255", "8/255", "12/255", "16/255"]
    with open(folder / "curve.csv", newline="") as file:
        rows = [(float(row["eps"]), float(row["robust_accuracy"])) for row in csv.DictReader(file)]
    assert rows[0] == (0, record["clean_accuracy"]) and rows == sorted(rows, key=lambda row: (row[0], -row[1]))
    for text, share in record["robust_accuracy"].items():
        assert share == [robust for eps, robust in rows if eps <= int(text.removesuffix("/255")) / 255][-1]
    assert (folder / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not (folder / "autoattack.json").exists()
    assert "first 20 of" in capsys.readouterr().out and "robust at most" in (folder / "eval.log").read_text()
    # Beside what AutoAttack found for the same weights.
    points |= {key: record[key] for key in ("sha256", "weights", "checkpoint", "norm", "n", "test_size", "date")}
    points |= {"eps": 4 / 255, "eps_text": "4/255", "version": "custom", "seed": 0, "batch_size": 20}
    write_json(folder / "autoattack.json", [points | {"clean_accuracy": 0.5, "robust_accuracy": 0.1}])
    before = contents(folder)
    again = [str(folder), "--curve", "--n", "20", "--device", "cpu", "--checkpoint", "best", "--eps", "4"]
    assert eval_script.main(again) == 0
    assert contents(folder)["curve.csv"] == before["curve.csv"] and contents(folder)["curve.png"] != before["curve.png"]


def test_a_bare_file_has_its_curve_beside_it(tmp_path):
    (two_checkpoints(tmp_path) / "best.pt").rename(tmp_path / "weights.pt")
    assert eval_script.main([str(tmp_path / "weights.pt"), "--curve", "--n", "10", "--passes", "2"]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert {"weights.pt.curve.csv", "weights.pt.curve.json", "weights.pt.curve.png"} <= names


def test_several_processes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--curve: one process on one device"):
        eval_script.main([str(tmp_path), "--curve", "--jobs", "2"])
