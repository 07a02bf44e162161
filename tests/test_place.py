"""Folders and bare files: where results go, and that nobody else writes there meanwhile."""

import json

import pytest
import torch
from evaluations import SETTINGS, ShortAutoAttack, new_model, two_checkpoints

import eval as eval_script
from evaluation import attack
from evaluation.place import open_place


@pytest.fixture(autouse=True)
def short_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack, "AutoAttack", ShortAutoAttack)


def test_a_bare_file_has_its_results_beside_it(tmp_path):
    torch.save(new_model(0).state_dict(), tmp_path / "other.pt")
    flags = ["--n", "5", "--device", "cpu", "--model", "wrn-10-1-swish", "--dataset", "digits", "--eps", "1"]
    assert eval_script.main([str(tmp_path / "other.pt"), *flags]) == 0
    results = {"other.pt.autoattack.json", "other.pt.eval.log", ".other.pt.lock-eval"}
    assert {path.name for path in tmp_path.iterdir()} == {"other.pt", *results}
    (record,) = json.loads((tmp_path / "other.pt.autoattack.json").read_text())
    expected = {"checkpoint": "other.pt", "weights": "only", **SETTINGS, "normalize": True}
    assert {name: record[name] for name in expected} == expected


def test_two_evaluations_of_one_folder_or_file_do_not_mix(tmp_path):
    folder = two_checkpoints(tmp_path)
    bare = tmp_path / "bare.pt"
    torch.save(new_model(0).state_dict(), bare)
    flags = ["--n", "1", "--device", "cpu", "--model", "wrn-10-1-swish", "--dataset", "digits"]
    with open_place(folder, None), pytest.raises(ValueError, match="is in use"):
        eval_script.main([str(folder), *flags])
    with open_place(bare, None), pytest.raises(ValueError, match="is in use"):
        eval_script.main([str(bare), *flags])
    assert eval_script.main([str(bare), *flags]) == 0
