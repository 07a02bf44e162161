"""Folders and bare files: where results go, and that nobody else writes there meanwhile."""

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from evaluations import SETTINGS, ShortAutoAttack, new_model, two_checkpoints
from folders import unprivileged
from runs import files, refusal

import analyze
import eval as eval_script
import export
from evaluation import attack
from evaluation.place import open_place
from experiment.folder import named_checkpoints


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


def test_results_go_elsewhere_where_a_zoo_is_read_only(tmp_path):
    """As a user who may not write there: neither the folder nor the place of a bare file is touched."""
    folder = two_checkpoints(tmp_path)
    torch.save(new_model(0).state_dict(), tmp_path / "zoo.pth")
    before = files(tmp_path)
    out = tmp_path / "out"
    flags = ["--n", "4", "--eps", "20", "--version", "custom", "--device", "cpu", "--output-dir", str(out)]
    assert eval_script.main([str(folder), *flags]) == 0
    assert (
        eval_script.main([str(tmp_path / "zoo.pth"), "--model", "wrn-10-1-swish", "--dataset", "digits", *flags]) == 0
    )
    results = {f"{name}.{kind}" for name in ("run", "zoo.pth") for kind in ("autoattack.json", "eval.log")}
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == results
    assert {name: data for name, data in files(tmp_path).items() if not name.startswith("out/")} == before


def test_without_permission_the_way_out_is_named(capsys):
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        folder = two_checkpoints(Path(root))
        torch.save(new_model(0).state_dict(), Path(root) / "zoo.pth")
        os.chmod(folder, 0o555)
        named = ["--model", "wrn-10-1-swish", "--dataset", "digits"]
        with unprivileged():
            for argv in ([str(folder)], [str(Path(root) / "zoo.pth"), *named]):
                assert "cannot write to" in (error := refusal(capsys, *argv, main=eval_script.main)), error
                assert "--output-dir" in error


@pytest.mark.parametrize("name", ["weights.pth", "model_best.pth.tar", "weights.pt"])
def test_a_file_beside_somebodys_args_yaml_is_a_bare_file(tmp_path, name):
    (tmp_path / "args.yaml").write_text("dataset: imagenet\nmodel: resnet50\nlr: 0.1\n")  # as timm writes it
    torch.save(new_model(0).state_dict(), tmp_path / name)
    flags = ["--model", "wrn-10-1-swish", "--dataset", "digits", "--n", "4", "--version", "custom", "--device", "cpu"]
    assert eval_script.main([str(tmp_path / name), *flags, "--eps", "20"]) == 0
    assert (tmp_path / f"{name}.autoattack.json").exists()


def test_every_script_knows_a_checkpoint_by_the_same_names(tmp_path, capsys):
    folder = two_checkpoints(tmp_path)
    for name in ("burn_in", "burn_in.pt"):
        assert [path.name for path in named_checkpoints(folder, [name])] == ["burn_in.pt"]
        assert export.main([str(folder), str(tmp_path / f"{name}.out"), "--checkpoint", name]) == 0
    for script, argv in ((eval_script, []), (analyze, []), (export, [str(tmp_path / "x.pt")])):
        error = refusal(capsys, str(folder), *argv, "--checkpoint", "epoch_0010", main=script.main)
        assert f"--checkpoint epoch_0010: {folder} has best.pt, burn_in.pt" in error
