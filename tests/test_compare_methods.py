"""scripts/compare_methods.sh: what is run, what is chosen on held-out images, who leads, and the table."""

import importlib.util
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from runs import finished_run

from analysis import comparison

ROOT = Path(__file__).resolve().parents[1]
# What the stand-ins for trainings come to, by their flags.
BY_RATE = {"0.2": 0.2, "0.4": 0.3, "0.8": 0.25}
OF_DYART = 0.05


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """report(words...): what the script prints, of two methods at one budget."""
    spec = importlib.util.spec_from_file_location("report", ROOT / "scripts" / "compare_methods_report.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    flags = ["--methods", "n-fgsm dyart-short", "--budget", "8", "--seeds", "0 1", "--dataset", "digits", "--n", "32"]
    flags += ["--leaders-n", "64", "--folder", str(tmp_path / "runs"), "--output", str(tmp_path / "methods.json")]

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["compare_methods_report.py", *flags, *words])
        capsys.readouterr()
        assert script.main() == 0
        return capsys.readouterr().out

    return call


def finish(line):
    """Do as if the training and the attack of a line had been run."""
    (folder, *train), *attacks = (shlex.split(part) for part in line.split(" -- "))
    given = dict(zip(train[::2], train[1::2], strict=True))
    robust = BY_RATE[given["--lr"]]
    if given["--method"] == "dyart":
        robust += OF_DYART
    robust += 0.02 * int(given["--seed"]) if given["--seed"] in "01" else 0
    finished_run(Path(folder), train, 0.5, {})
    for attack in attacks:
        if attack[0] == "--curve":
            eps = attack[attack.index("--eps") + 1 : attack.index("--n")]
            bounds = {f"{radius}/255": robust + 0.01 * (8 - int(radius)) for radius in eps}
            record = {"n": int(attack[attack.index("--n") + 1]), "part": attack[attack.index("--images") + 1]}
            record |= {"clean_accuracy": 0.5, "robust_accuracy": bounds}
            (Path(folder) / "curve.json").write_text(json.dumps([record]))
            continue
        words = dict(zip(attack[::2], attack[1::2], strict=True))
        found = {f"{words['--eps']}/255": robust}
        record = {"n": int(words["--n"]), "version": words["--version"], "part": "test"}
        finished_run(Path(folder), train, 0.5, found, **record)


def test_choices_are_made_on_held_out_images_and_runs_follow_them(report, tmp_path):
    tuning = report("--todo", "tuning").splitlines()
    assert len(tuning) == 3 + 3 and all(line.count(" -- ") == 1 and "--seed 1000" in line for line in tuning)
    assert all("-- --curve --eps 4 8 --n 64 --images validation" in line for line in tuning)
    for line in tuning[:-1]:
        finish(line)
    # n-fgsm has chosen; a rate of dyart-short is still to be tried.
    assert [line.split("--method ")[1].split()[0] for line in report("--todo", "runs").splitlines()] == ["n-fgsm"] * 2
    assert report("--todo", "tuning").splitlines() == tuning[-1:]
    finish(tuning[-1])

    runs = report("--todo", "runs").splitlines()
    assert len(runs) == 4 and all("--eps 8 --n 32 --version custom" in line for line in runs)
    assert all("--images test" in line and "validation --" not in line for line in runs)
    assert all(f"--lr {max(BY_RATE, key=BY_RATE.get)} " in line for line in runs)
    for line in runs:
        finish(line)
    leaders = report("--todo", "leaders").splitlines()
    assert len(leaders) == 4 and all("--eps 8 --n 64 --version standard" in line for line in leaders)
    assert not any("--curve" in line for line in leaders)  # which is there already
    for line in leaders:
        finish(line)
    table = report()
    assert [report("--todo", part) for part in ("tuning", "runs", "leaders")] == ["", "", ""]
    rows = [line for line in table.splitlines() if "| custom |" in line]
    assert rows[0].startswith("| 8 | dyart-short | 50.0 ± 0.0 | 40.0 ± 1.4 | 36.0 ± 1.4 | custom | 32 | 2 |")
    assert rows[1].startswith("| 8 | n-fgsm | 50.0 ± 0.0 | 35.0 ± 1.4 | 31.0 ± 1.4 |")
    content = json.loads((tmp_path / "methods.json").read_text())
    assert len(content["runs"]) == 6 + 4 + 4 and len(content["table"]) == 4
    assert (tmp_path / "methods.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    shutil.rmtree(tmp_path / "runs")  # what is known is not run again
    assert report() == table

    # Nor is it compared with what was trained otherwise.
    assert "not trained by one code" not in table
    content["runs"][6]["code"] = "0000000"
    (tmp_path / "methods.json").write_text(json.dumps(content))
    assert "not trained by one code:\n  0000000: n-fgsm-budget8-lr0.4-seed0\n  code not known: dyart-" in report()
    content["settings"]["dyart-short for 8 digits wrn-10-1-swish 8/255"]["clip_grad"] = 1.0
    (tmp_path / "methods.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"dyart-short for 8 digits .* was trained with clip_grad 1\.0, now 3\.0; comp"
    ):
        report()


def test_a_folder_of_other_trainings_is_not_taken_for_these(report, tmp_path, monkeypatch):
    lines = report("--todo", "tuning").splitlines()
    for line in lines:
        finish(line)
    with pytest.raises(
        ValueError, match=r"lr0\.2-seed1000: n-fgsm for 8 .* with weight_decay 0\.0005, now 0\.01; comp"
    ):
        report("--train", "--weight-decay 0.01", "--todo", "tuning")
    # Which code and machine it was is written down at once, and once.
    folder = Path(lines[0].split()[0])
    for code in ("1111111", "2222222"):
        monkeypatch.setattr(comparison, "trained_by", lambda code=code: code)
        report("--measure", str(folder))
    assert json.loads((folder / "trained.json").read_text())["code"] == "1111111"
    report()
    runs = json.loads((tmp_path / "methods.json").read_text())["runs"]
    assert [run.get("code") for run in runs if run["method"] == "n-fgsm"] == ["1111111", None, None]


def test_leaders_are_of_different_methods(report, tmp_path):
    methods = "n-fgsm dyart-short dyart-short-75 dyart-short-300 at-2 at-3 trades"
    report("--methods", methods, "--budget", "18")
    for part in ("tuning", "runs"):
        for line in report("--methods", methods, "--budget", "18", "--seeds", "0", "--todo", part).splitlines():
            finish(line)
    leaders = report("--methods", methods, "--budget", "18", "--seeds", "0", "--todo", "leaders").splitlines()
    assert sorted(line.split("--method ")[1].split()[0] for line in leaders) == ["at", "dyart", "n-fgsm"]
