"""bench.py --attacks: what is counted, how figures come about, and that a comparison goes on where it stopped."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import bench
from analysis import attacks
from analysis.attacks import Passes, chosen, optimality, rows_of


def test_passes_are_counted_in_images():
    model, passes = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), Passes()
    x = torch.rand(5, 1, 2, 2, requires_grad=True)
    with passes.counted(model):
        logits = model(x)
        for column in logits.unbind(1):
            torch.autograd.grad(column.sum(), x, retain_graph=True)
        with torch.no_grad():
            model(x[:2])
    model(x)
    assert (passes.forward, passes.backward) == (7, 15)


def test_optimality_is_one_for_the_best_and_zero_for_no_attack():
    best = np.array([0.1, 0.2, 0.5])
    assert optimality(best, best) == 1
    assert optimality(np.full(3, math.inf), best) == 0
    # Areas by hand, up to ε = 0.5: of the attack (0.2 + 0.2 + 0.5) / 3, of the best 0.8 / 3, of no attack 0.5.
    assert optimality(np.array([0.2, 0.2, 0.6]), best) == pytest.approx(1 - (0.9 - 0.8) / (1.5 - 0.8))


def test_rows_are_relative_to_the_best_of_all_and_complete():
    def record(name, batch, *distances):
        counts = {"forward": 2.0, "backward": 3.0, "seconds": 1.0}
        return {"attack": name, "steps": 10, "batch": batch, "distances": list(distances)} | counts

    records = [record("a", 0, 1.0, 2.0), record("a", 1, 3.0), record("b", 0, 2.0, 1.0), record("b", 1, None)]
    first, second = rows_of([*records, record("half", 0, 0.1, 0.1)])
    assert (first["mean"], first["found"], first["largest"]) == (pytest.approx(4 / 3), 1, 2)
    assert (second["mean"], second["found"], second["seconds"]) == (1.5, pytest.approx(2 / 3), 2)


def test_a_comparison_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    output = tmp_path / "attacks.json"
    command = ["--smoke", "--threads", "1", "--device", "cpu", "--output", str(output), "--attacks"]
    assert bench.main([*command, "ours-4"]) == 0
    (record,) = json.loads(output.read_text())
    assert record["forward"] == record["backward"] == 4
    assert len(record["distances"]) > 0 and output.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    done, run = [], attacks.run_attack
    monkeypatch.setattr(attacks, "run_attack", lambda *args: done.append(args[1:3]) or run(*args))
    assert bench.main([*command, "ours-4", "ours-7"]) == 0
    assert done == [("ours", 7)]
    assert "| ours | 7 | 7.0 + 7.0 |" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["nobody", "DDN", "ours-0"])
def test_an_unknown_attack_is_named(text):
    with pytest.raises(ValueError, match=f"--attacks {text}: for Linf choose from"):
        chosen([text], "Linf")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(attacks.importlib.util, "find_spec", lambda name: None)
    assert chosen(["ours-4", "FAB-20"], "Linf") == [("ours", 4), ("FAB", 20)]
    with pytest.raises(ValueError, match="adv-lib is not installed"):
        chosen([], "Linf")
