"""The scripts, started from another folder as a user does: what they run, where it goes, and what they refuse."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from evaluation.results import IDENTITY, Results
from experiment.folder import Experiment
from experiment.recipes import TRAINING
from experiment.settings import resolve
from models import create_model

ROOT = Path(__file__).parents[1]
SMALL = "--dataset digits --model wrn-10-1-swish --device cpu --epochs 1 --train-subset 16 --batch-size 16 "
SMALL += "--validation-size 4 --validation-attack-iter 1 --attack-iter 1 --output-dir out"


@pytest.fixture
def script(tmp_path):
    """Runs a script with flags from a folder of its own: (exit status, standard output, standard error)."""
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    user = tmp_path / "user's folder"
    user.mkdir()
    environment = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def run(name: str, flags: str = "") -> tuple[int, str, str]:
        command = ["bash", str(ROOT / "scripts" / f"{name}.sh"), *shlex.split(flags)]
        done = subprocess.run(command, cwd=user, env=environment, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout, done.stderr

    run.folder = user
    return run


def stored(folder: Path) -> dict:
    return yaml.safe_load((folder / "args.yaml").read_text())


def test_dyart_starts_from_the_burn_in_that_clean_training_made(script):
    out = script.folder / "out"
    status, _, error = script("Cifar10_DyART", SMALL)
    assert status == 2 and error.count("\n") == 1 and not out.exists()
    command = error.partition("make it with: ")[2].strip()
    assert command == f"bash {ROOT}/scripts/Cifar10_clean_training.sh --output-dir out"

    status, _, error = script("Cifar10_clean_training", SMALL)
    assert status == 0, error
    burn_in = out / "Cifar10-burn-in"
    assert stored(burn_in)["method"] == "clean" and stored(burn_in)["scheduler"] == "constant"
    status, _, error = script("Cifar10_clean_training", SMALL)
    assert status == 2 and "out/Cifar10-burn-in exists" in error and "resume.sh" in error and error.count("\n") == 1

    status, _, error = script("Cifar10_DyART", SMALL + " --name robust")
    assert status == 0, error
    settings = stored(out / "robust")
    assert settings["method"] == "dyart" and settings["pretrained"] == str(burn_in)
    assert settings["burn_in_epochs"] == 0 and settings["lambda_robust"] == 1000
    assert sorted(path.name for path in out.iterdir()) == ["Cifar10-burn-in", "robust"]

    status, output, error = script("resume", "out/robust --device cpu")
    assert status == 0 and "all 1 epochs are finished" in output + error
    # The GroupNorm variant needs a burn-in of its own.
    status, _, error = script("Cifar10_DyART", SMALL + " --GroupNorm true")
    assert status == 2 and "Cifar10_clean_training.sh --group-norm --output-dir out" in error


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        (
            "TinyImgNet_clean_training",
            "--group-norm",
            {"dataset": "tiny-imagenet", "method": "clean", "epochs": 20, "group_norm": True},
        ),
        (
            "TinyImgNet_DyART",
            "--GroupNorm=True --burn-in-epochs 20",
            {"dataset": "tiny-imagenet", "method": "dyart", "lr": 0.05, "group_norm": True, "burn_in_epochs": 20},
        ),
        (
            "Cifar10_DyART_additional_data",
            "--aux-data-filename some.npz --burn-in-epochs 10 --model wrn-10-1-swish",
            {"dataset": "cifar10", "epochs": 800, "batch_size": 512, "lambda_robust": 800.0, "unsup_fraction": 0.7},
        ),
        ("TinyImgNet_baselines", "mart --epochs 7", {"dataset": "tiny-imagenet", "method": "mart", "epochs": 7}),
    ],
)
def test_flags_are_passed_on_and_a_dry_run_makes_nothing(name, flags, expected, script):
    np.savez(script.folder / "some.npz", image=np.zeros((1, 32, 32, 3), np.uint8), label=np.zeros(1, np.int64))
    status, output, error = script(name, flags + " --dry-run")
    assert status == 0, error
    shown = yaml.safe_load(output)
    assert {key: shown[key] for key in expected} == expected
    if "additional" in name:  # a relative path is relative to where the user is
        assert shown["aux_data_filename"] == str(script.folder / "some.npz")
    assert [path.name for path in script.folder.iterdir()] == ["some.npz"]


def test_the_figures_of_two_checkpoints_do_not_mix(tmp_path):
    """Whatever is given beside: a stand-in for Python says how analyze.py is called."""
    (tmp_path / "scripts").mkdir()
    for name in ("analyze.sh", "common.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "burn_in.pt").touch()

    def calls(*flags: str) -> list[list[str]]:
        command = ["bash", "scripts/analyze.sh", *flags]
        output = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        return [shlex.split(line)[1:] for line in output.splitlines()]

    for flags, figures in ((["run"], "run/figures"), (["run", "--output-dir", "there", "--seed", "1"], "there")):
        called = calls(*flags)
        folders = [[words[i + 1] for i, word in enumerate(words) if word == "--output-dir"][-1] for words in called]
        assert folders == [f"{figures}/burn_in", figures]
        assert [words[-1] if "--checkpoint" in words else None for words in called] == [f"{figures}/burn_in", None]
    # The optimizer's step is that of latest.pt: there is one picture, and of a bare file and the toy as well.
    step = ["run", "--direction", "step"]
    assert calls(*step) == [[*step, "--output-dir", "run/figures"]]
    for flags in (["--toy"], ["run/burn_in.pt", "--model", "wrn-10-1"], ["--output-dir", "there", "run"]):
        assert calls(*flags) == [flags]


@pytest.mark.parametrize(
    ("processes", "expected"), [(None, ["train.py"]), ("1", ["train.py"]), ("3", ["--nproc-per-node", "3", "train.py"])]
)
def test_processes_are_started_by_torchrun(processes, expected, tmp_path):
    """By every script that trains: a stand-in for Python says how it is called."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$OMP_NUM_THREADS $@"\n')
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("PROCESSES", "OMP_NUM_THREADS")}
    environment |= {} if processes is None else {"PROCESSES": processes}
    for script, flags in (("Cifar10_DyART", "--burn-in-epochs 1"), ("resume", "run"), ("TinyImgNet_baselines", "at")):
        command = ["bash", f"scripts/{script}.sh", *flags.split()]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        words = [word.replace(f"{tmp_path}/", "") for word in done.stdout.split()]
        assert [word for word in words if word in {"--nproc-per-node", "3", "train.py"}] == expected, words
        assert (words[:3] == ["1", "-m", "torch.distributed.run"]) == (processes == "3")
    for bad in ("0", "two", "-1"):
        environment |= {"PROCESSES": bad}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and f"PROCESSES={bad}" in done.stderr and not done.stdout


def test_searches_are_compared_from_one_burn_in_and_run_once(tmp_path, monkeypatch, capsys):
    """Runs from another burn-in are not taken for those of this one; what the results hold is not run again."""
    weights = create_model("wrn-10-1-swish").state_dict()
    for name, changed in (("a.pt", weights), ("b.pt", {**weights, "logits.bias": weights["logits.bias"] + 1})):
        torch.save(changed, tmp_path / name)
    (tmp_path / "runs").mkdir()

    spec = importlib.util.spec_from_file_location("report", ROOT / "scripts" / "compare_searches_report.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def report(burn_in: str, *seeds: str) -> str:
        names = [str(tmp_path / name) for name in (burn_in, "runs", "out.json")]
        monkeypatch.setattr(sys, "argv", ["compare_searches_report.py", *names, *seeds])
        capsys.readouterr()
        assert script.main() == 0
        return capsys.readouterr().out

    with pytest.raises(ValueError, match="no finished runs"):
        report("a.pt")
    assert report("a.pt", "0 7").split() == [f"{name}-{seed}" for seed in (0, 7) for name in TRAINING]
    for seed, (clean, robust) in enumerate([(0.5, 0.25), (0.6, 0.25)]):
        for search, gain in (("shared", 0.0625), ("fast", 0.0)):
            settings = resolve({"dataset": "cifar10", "search": search, "seed": seed, "train_subset": 64, "epochs": 1})
            settings |= {"pretrained": str(tmp_path / "a.pt")}
            with Experiment.create(tmp_path / "runs", f"{search}-{seed}", settings, echo=print) as experiment:
                experiment.append_metrics({"epoch": 1, "seconds": 2.0})
                results = Results(experiment.folder / "autoattack")
                for eps in ("4/255", "8/255"):
                    record = dict.fromkeys(IDENTITY, 0) | {"eps": int(eps[0]) / 255, "eps_text": eps, "n": 256}
                    record |= {"test_size": 10000, "clean_accuracy": clean, "robust_accuracy": robust + gain}
                    results.finish(record | {"date": "", "version": "custom", "model": "wrn-28-10-swish"})
    (row,) = (line for line in report("a.pt").splitlines() if line.startswith("shared-fast") and "8/255" in line)
    assert row.split()[-4:] == ["+6.2", "0.0", "+6.2", "+6.2"]
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    assert report("a.pt", "0").split() == ["fab-0"]  # the others are in the results
    assert report("b.pt", "0").split() == ["shared-0", "fast-0", "fab-0"]

    with Experiment.create(tmp_path / "runs", "fab-0", settings, echo=print):
        pass
    with pytest.raises(ValueError, match="fab-0 started from .*a.pt, not from .*b.pt"):
        report("b.pt", "0")


def test_baselines_without_a_method_are_all_three(script):
    status, output, error = script("Cifar10_baselines", SMALL + " --dry-run")
    assert status == 0, error
    methods = [line for line in output.splitlines() if line.startswith("method: ")]
    assert methods == ["method: at", "method: trades", "method: mart"]


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("Cifar10_DyART_additional_data", "", "--aux-data-filename FILE.npz"),
        ("TinyImgNet_DyART", "--output-dir=here --group-norm yes", "TinyImgNet_clean_training.sh --group-norm"),
        ("Cifar10_baselines", "pgd", "'pgd'"),
        ("resume", "", "resume.sh FOLDER"),
        ("resume", "missing", "missing: no such experiment folder"),
        ("eval", "", "eval.sh FOLDER"),
        ("quickstart", "--epochs 5", "quickstart.sh takes no flags, not --epochs"),
        ("compare_searches", "a.pt there 0 1", "compare_searches.sh [BURN-IN] [FOLDER] [SEEDS]"),
        ("analyze", "some --checkpoint epoch_0010", "analyze.sh sets --checkpoint itself, not epoch_0010"),
        ("Cifar10_DyART", "--method at", "Cifar10_DyART.sh sets --method itself (dyart), not at"),
        (
            "Cifar10_clean_training",
            "--method=trades",
            "Cifar10_clean_training.sh sets --method itself (clean), not trad",
        ),
        ("TinyImgNet_baselines", "at --method mart", "TinyImgNet_baselines.sh sets --method itself, not mart"),
        ("resume", "some --resume other", "resume.sh sets --resume itself (some), not other"),
    ],
)
def test_what_is_missing_or_wrong_is_said_in_one_line(name, flags, words, script):
    status, output, error = script(name, flags)
    assert status == 2 and words in error and error.count("\n") == 1 and output == ""
    assert list(script.folder.iterdir()) == []


def test_without_packages_the_way_to_them_is_shown(script, tmp_path):
    if (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("the scripts have an environment of their own here")
    (tmp_path / "bin" / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    status, _, error = script("Cifar10_DyART")
    assert status == 2 and "has no torch" in error and "requirements.txt" in error and error.count("\n") == 1


@pytest.mark.parametrize("path", sorted(ROOT.glob("scripts/*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid_bash(path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0
    if path.name != "common.sh":
        assert path.read_text().startswith("#!/usr/bin/env bash\n# ") and "set -euo pipefail" in path.read_text()
