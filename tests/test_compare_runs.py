"""scripts/compare_runs.sh: which runs are missing, what is written down of one, what is compared with what."""

import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import finished_run

import train
from analysis import comparison as compared
from models import create_model

ROOT = Path(__file__).resolve().parents[1]
TRAIN = "--dataset digits --model wrn-10-1-swish --train-subset 16 --batch-size 8 --epochs 1 --scheduler cyclic"


@pytest.fixture
def script():
    """scripts/compare_runs_report.py as a module."""
    spec = importlib.util.spec_from_file_location("report", ROOT / "scripts" / "compare_runs_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def report(script, tmp_path, monkeypatch, capsys):
    """report(content, words...): what the script prints of a file with this content, and what the file holds then."""
    file = tmp_path / "compared.json"

    def call(content, *words):
        file.write_text(json.dumps(content))
        monkeypatch.setattr(sys, "argv", ["compare_runs_report.py", str(file), str(tmp_path / "runs"), *words])
        capsys.readouterr()
        assert script.main() == 0
        return capsys.readouterr().out, json.loads(file.read_text())

    return call


def comparison(**changed):
    """The content of a file that asks for two searches with two seeds."""
    content = {"question": "?", "train": TRAIN, "variants": {"one": "--search shared", "two": "--search fast"}}
    content |= {"seeds": [0, 3], "attack": "custom", "images": 256, "radii": ["4", "8"], "against": ["two"]}
    return content | changed


def test_runs_are_compared_seed_by_seed_and_run_once(report, tmp_path):
    todo, content = report(comparison(), "--todo")
    lines = [line.split() for line in todo.splitlines()]
    assert [line[0] for line in lines] == ["one-0", "two-0", "one-3", "two-3"]
    assert lines[2][1:] == [*TRAIN.split(), "--search", "shared", "--seed", "3"]
    assert report(comparison(), "--attack")[0].split() == [
        *("--eps", "4", "8", "--n", "256", "--batch-size", "128", "--version", "custom")
    ]
    for variant, gain in (("one", 0.0), ("two", 0.0625)):
        for seed, clean in ((0, 0.5), (3, 0.75)):
            argv = next(line[1:] for line in lines if line[0] == f"{variant}-{seed}")
            robust = dict.fromkeys(("4/255", "8/255"), 0.25 + gain * clean)
            finished_run(tmp_path / "runs" / f"{variant}-{seed}", argv, clean, robust)
            content = report(content, "--measure", f"{variant}-{seed}")[1]
    assert content["question"] == "?" and len(content["runs"]) == 4
    run = content["runs"][0]
    assert run["accuracy"] == {"clean": 50.0, "4/255": 25.0, "8/255": 25.0}
    assert run["validation"] == [[25.0, 12.5]] and run["training_seconds"] == 2
    assert run["clean_epochs_spent"] == pytest.approx(6.6 / 3, abs=0.01)  # passes of an image, of a clean step's

    table, content = report(content)
    gains = [-100 * 0.0625 * clean for clean in (0.5, 0.75)]
    mean, error = statistics.mean(gains), statistics.stdev(gains) / 2**0.5
    assert content["summary"]["one - two"] == {
        "seeds": 2,
        "clean": [0.0, 0.0],
        **dict.fromkeys(("4/255", "8/255"), [round(mean, 2), round(error, 2)]),
    }
    assert f"| one - two | +0.0 ± 0.0 | {mean:+.1f} ± {error:.1f} |" in table
    assert content["summary"]["one"]["clean"] == [62.5, round(statistics.stdev([50, 75]), 2)]
    assert report(content, "--todo")[0] == ""
    assert report(content | {"seeds": [0, 3, 4]}, "--todo")[0].split()[0] == "one-4"


def test_shares_of_negative_speeds_are_compared_where_all_runs_tracked_them(report, tmp_path):
    content = comparison(seeds=[0])
    for variant, share in (("one", 0.25), ("two", 0.4)):
        argv = [*TRAIN.split(), *content["variants"][variant].split(), "--seed", "0"]
        finished_run(tmp_path / "runs" / f"{variant}-0", argv, 0.5, {"4/255": 0.25}, {"negative_speeds": share})
        content = report(content, "--measure", f"{variant}-0")[1]
    table, content = report(content)
    assert "| | clean | 4/255 | negative speeds | seeds | spent |" in table
    assert "| one - two | +0.0 | +0.0 | -15.0 | 1 |" in table
    assert [run["negative_speeds"] for run in content["runs"]] == [[25.0], [40.0]]
    del content["runs"][1]["negative_speeds"]
    assert "| | clean | 4/255 | seeds | spent |" in report(content)[0]


def test_margins_are_those_of_the_last_epoch_on_held_out_images(report, tmp_path):
    short = f"{TRAIN} --burn-in-epochs 0 --validation-size 8 --validation-attack-iter 1"
    content = comparison(train=short, attack="margins", images=16, radii=["1", "64"], seeds=[0])
    flags = [*short.split(), "--output-dir", str(tmp_path / "runs"), "--name", "one-0", "--device", "cpu"]
    assert train.main(flags) == 0
    assert report(content, "--attack")[0].split() == []
    (run,) = report(content, "--measure", "one-0")[1]["runs"]
    accuracies = list(run["accuracy"].values())
    assert list(run["accuracy"]) == ["clean", "1/255", "64/255"] and accuracies == sorted(accuracies, reverse=True)
    # 16 images, of which the run itself looked at 8.
    assert accuracies[0] * 16 % 100 == 0


def test_what_the_flags_meant_is_not_compared_with_what_they_mean(report, tmp_path):
    torch.save(create_model("wrn-10-1-swish").state_dict(), tmp_path / "a.pt")
    content = comparison(train=f"{TRAIN} --pretrained {tmp_path}/a.pt")
    finished_run(tmp_path / "runs" / "one-0", TRAIN.split(), 0.5, {"4/255": 0.25})
    with pytest.raises(
        ValueError, match=r"runs/one-0: one-0 was trained with burn_in_epochs 10, now 0, pretrained_sha256 N"
    ):
        report(content, "--measure", "one-0")
    finished_run(tmp_path / "runs" / "one-3", content["train"].split(), 0.5, {"4/255": 0.25})
    content = report(content, "--measure", "one-3")[1]
    assert "seed" not in content["settings"]["one"]
    # A setting that came later was what it is for folders from before.
    of_one = {name: value for name, value in content["settings"]["one"].items() if name != "adaptive_steps"}
    before = content | {"settings": content["settings"] | {"one": of_one}}
    report(before, "--todo")
    with pytest.raises(ValueError, match="one was trained with adaptive_steps False, now True; compare"):
        report(before | {"variants": content["variants"] | {"one": "--adaptive-steps true"}}, "--todo")
    torch.save(create_model("wrn-10-1-swish").state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="one was trained with pretrained_sha256 .*, now .*in a new place"):
        report(content)
    content["train"] = TRAIN
    content["settings"]["one"] = content["settings"]["one"] | {"search_steps": 1, "pretrained_sha256": None}
    with pytest.raises(ValueError, match="one was trained with search_steps 1, now 3"):
        report(content, "--todo")
    with pytest.raises(ValueError, match="variant 'a b' is to be the name of a folder"):
        report(comparison(variants={"a b": ""}), "--todo")
    with pytest.raises(ValueError, match="has no finished runs"):
        report(comparison(variants={"other": ""}, against=[]))
    for against in (None, "two", ["three"]):
        with pytest.raises(ValueError, match="against .* is to be a list of its variants"):
            report(comparison(against=against))


def test_runs_of_different_code_are_named(report, tmp_path):
    content = comparison(seeds=[0, 3])
    for seed in (0, 3):
        finished_run(tmp_path / "runs" / f"one-{seed}", [*TRAIN.split(), "--seed", str(seed)], 0.5, {"4/255": 0.25})
        content = report(content, "--measure", f"one-{seed}")[1]
    assert "not trained by one code" not in report(content)[0]
    content["runs"][0]["code"] = "0000000"
    table = report(content)[0]
    assert "not trained by one code:\n  0000000: one-0\n" in table and ": one-3\n" in table


def test_the_commit_is_the_last_of_the_code_that_trains(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", tmp_path, *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(compared, "ROOT", tmp_path)
    assert compared.trained_by() is None
    git("init", "-q")
    (tmp_path / "train.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "trains")
    trains = git("rev-parse", "--short=7", "HEAD")
    (tmp_path / "README.md").write_text("1")
    git("add", ".")
    git("commit", "-qm", "does not")
    assert compared.trained_by() == trains
    (tmp_path / "train.py").write_text("2")
    assert compared.trained_by() == f"{trains}+"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compared.trained_by() is None
