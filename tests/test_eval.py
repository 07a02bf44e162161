"""eval.py's command line: what it evaluates, that kills change nothing, the released spelling, and bad flags.

With DYART_LARGE_TESTS=1: 200 kills instead of 20.
"""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from children import exit_status, fork
from evaluations import (
    SETTINGS,
    Rough,
    ShortAutoAttack,
    contents,
    figures,
    learn_digits,
    new_model,
    raise_interrupt,
    two_checkpoints,
)

import eval as eval_script
from data import Split, digest, load_data, to_input
from evaluation import attack, candidate
from evaluation.environment import device_name
from evaluation.results import Results
from experiment.folder import Experiment

LARGE = os.environ.get("DYART_LARGE_TESTS") == "1"
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def short_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack, "AutoAttack", ShortAutoAttack)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return two_checkpoints(tmp_path)


# --- Evaluations ------------------------------------------------------------------------------------------------------


def test_an_experiment_folder_from_the_command_line(folder, capsys):
    argv = [str(folder), "--eps", "4", "8/255", "--n", "10", "--device", "cpu", "--checkpoint", "burn_in", "best.pt"]
    assert eval_script.main(argv) == 0
    records = json.loads((folder / "autoattack.json").read_text())
    assert [(r["checkpoint"], r["eps"], r["eps_text"]) for r in records] == [
        ("burn_in.pt", 4 / 255, "4/255"),
        ("burn_in.pt", 8 / 255, "8/255"),
        ("best.pt", 4 / 255, "4/255"),
        ("best.pt", 8 / 255, "8/255"),
    ]
    test = load_data("digits")[1]
    for seed, record in enumerate([records[0], records[2]]):
        correct = new_model(seed)(to_input(test.images[:10])).argmax(dim=1) == test.labels[:10]
        assert record["clean_accuracy"] == pytest.approx(correct.float().mean().item())
        name = folder / record["checkpoint"]
        assert record["sha256"] == subprocess.check_output(["sha256sum", name], text=True).split()[0]
        expected = {**SETTINGS, "normalize": True, "version": "standard", "n": 10, "test_size": 400}
        expected["device"] = device_name(torch.device("cpu"))
        assert {name: record[name] for name in expected} == expected
        assert record["versions"]["torch"] == torch.__version__
    log = (folder / "eval.log").read_text()
    assert "best.pt (average weights), Linf 8/255, first 10 of 400 test images: clean " in log

    before = (folder / "autoattack.json").read_bytes()
    assert eval_script.main(argv) == 0
    assert (folder / "autoattack.json").read_bytes() == before
    assert capsys.readouterr().out.count("as evaluated before (--again to do it again)") == 4

    assert eval_script.main([str(folder / "best.pt"), "--eps", "8", "--n", "10", "--device", "cpu", "--again"]) == 0
    again = json.loads((folder / "autoattack.json").read_text())
    assert [figures(record) for record in again] == [figures(record) for record in records]
    assert again[3]["seconds"] != records[3]["seconds"]


def test_raw_weights(folder):
    assert (
        eval_script.main(
            [str(folder), "--eps", "1", "--n", "40", "--device", "cpu", "--weights", "raw", "-v", "custom"]
        )
        == 0
    )
    (record,) = json.loads((folder / "autoattack.json").read_text())
    test = load_data("digits")[1]
    correct = new_model(11)(to_input(test.images[:40])).argmax(dim=1) == test.labels[:40]
    assert record["weights"] == "raw"
    assert record["clean_accuracy"] == pytest.approx(correct.float().mean().item())
    assert list(record["robust_accuracy_after"]) == ["apgd-ce", "apgd-t", "fab-t"]


def test_an_interrupt_is_logged_and_not_a_traceback(folder, monkeypatch):
    monkeypatch.setattr(ShortAutoAttack, "run_standard_evaluation", raise_interrupt)
    assert eval_script.main([str(folder), "--n", "20", "--device", "cpu"]) == 130
    assert "interrupted; the same command goes on after the last finished batch" in (folder / "eval.log").read_text()
    assert not (folder / "autoattack.json").exists()


@pytest.fixture
def toy_folder(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Makes experiment folders, whose best.pt holds the toy."""
    toy = learn_digits(Rough)
    monkeypatch.setattr(candidate, "build_model", lambda settings: copy.deepcopy(toy))

    def make(name: str) -> Path:
        with Experiment.create(tmp_path, name, SETTINGS, echo=lambda message: None) as experiment:
            weights = {"average": toy.state_dict(), "model": toy.state_dict()}
            experiment.save_named("best", {"settings": SETTINGS, "epoch": 1, **weights})
        return experiment.folder

    return make


def test_kills_at_random_moments_change_nothing(toy_folder):
    """SIGKILL of the command again and again, some while a file is being written; the end is an undisturbed run's."""
    argv = ["--eps", "20", "--n", "60", "--batch-size", "8", "--device", "cpu"]

    def start(folder: Path) -> int:
        return fork(lambda: eval_script.main([str(folder), *argv]))

    def records(folder: Path) -> list[dict[str, Any]]:
        path = folder / "autoattack.json"
        return [figures(record) for record in json.loads(path.read_text())] if path.exists() else []

    started = time.monotonic()
    assert exit_status(start(undisturbed := toy_folder("undisturbed"))) == 0
    duration = time.monotonic() - started
    whole = records(undisturbed)
    assert len(whole[0]["robust_accuracy_after"]) == 4
    random = torch.Generator().manual_seed(0)
    kills, rounds = 0, 0
    while kills < (200 if LARGE else 20):
        rounds += 1
        folder = toy_folder(f"round {rounds}")
        while not records(folder):
            child = start(folder)
            time.sleep(duration * torch.rand((), generator=random).item())
            os.kill(child, signal.SIGKILL)
            status = exit_status(child)
            assert status in (0, -signal.SIGKILL)
            kills += status != 0
            for path in folder.glob("*.json"):
                json.loads(path.read_text())
        assert exit_status(start(folder)) == 0
        assert records(folder) == whole
        results = Results(folder / "autoattack")
        assert results.unfinished(results.records[0]) is None


# --- Flags ------------------------------------------------------------------------------------------------------------


def parsed(*argv: str, capsys: pytest.CaptureFixture) -> dict[str, Any]:
    assert eval_script.main([*argv, "--dry-run"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_released_command_line(capsys):
    line = "--fname_input some/folder --eps_eval 8 --norm_attack Linf --batch_size_for_eval 1500 -v custom"
    settings_ = parsed(*line.split(), capsys=capsys)
    assert settings_.items() >= {"target": "some/folder", "norm": "Linf", "batch_size": 1500, "n": None}.items()
    assert settings_["eps"] == ["8/255"]
    assert settings_["attacks"] == ["apgd-ce", "apgd-t", "fab-t"]
    settings_ = parsed("f", "--eps_eval", "0.5", "--norm_attack", "L2", "--data", "cifar10s", capsys=capsys)
    assert settings_.items() >= {"eps": ["0.5"], "norm": "L2", "version": "standard", "dataset": "cifar10"}.items()


@pytest.mark.parametrize(
    ("text", "norm", "eps", "written"),
    [
        ("8", "Linf", 8 / 255, "8/255"),
        ("8/255", "Linf", 8 / 255, "8/255"),
        ("2.5", "Linf", 2.5 / 255, "2.5/255"),
        ("0.031", "Linf", 0.031, "7.905/255"),
        ("1/51", "Linf", 5 / 255, "5/255"),
        ("0.5", "L2", 0.5, "0.5"),
        ("128/255", "L2", 128 / 255, "0.501961"),
    ],
)
def test_eps(text, norm, eps, written):
    assert eval_script.radii([text], norm) == [(pytest.approx(eps, rel=1e-15), written)]


def test_both_spellings_of_a_length_are_the_same_to_the_last_bit():
    for tenths in range(10, 2551):
        text = f"{tenths / 10:g}"
        assert eval_script.radii([text, f"{text}/255"], "Linf") == [(float(text) / 255, f"{text}/255")]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--eps", "0"], "--eps: '0' is not a number above 0"),
        (["--eps", "8", "-3"], "--eps: '-3' is not a number above 0"),
        (["--eps", "8/0"], "--eps: '8/0' is not a number above 0"),
        (["--eps", "8/2/255"], "--eps: '8/2/255' is not a number above 0"),
        (["--eps", "nan", "--norm", "L2"], "--eps: 'nan' is not a number above 0"),
        (["--eps", "0.5"], "--eps 0.5: in Linf, is that 0.5/255 or 127.5/255? Write which"),
        (["--eps", "256"], "--eps 256: in Linf at most 255"),
        (["--eps", "8", "--norm", "L2"], "--eps 8: in L2 that is 8 times a pixel's whole range"),
        (["--norm", "L1"], "--norm_attack: invalid choice: 'L1'"),
        (["-v", "plus"], "-v: invalid choice: 'plus'"),
        (["--n", "0"], "--n: '0' is not a whole number at least 1"),
        (["--n", "401"], "--n 401: the test set has 400 images"),
        (["--batch-size", "-1"], "--batch_size_for_eval: '-1' is not a whole number at least 1"),
        (["--seed", "x"], "--seed: 'x' is not a whole number at least 0"),
        (["--device", "cuda:99"], "--device cuda:99: "),
        (["--checkpoint", "best", "latest.pt"], "--checkpoint latest.pt: "),
        (["--checkpoint", "../run/best.pt"], "has best.pt, burn_in.pt"),
        (["--model", "wrn-10-1"], "--model wrn-10-1: "),
        (["--dataset", "svhn"], "--data: 'svhn' is not one of cifar10, "),
        (["--fname_input", "other"], "expected one FOLDER or FILE"),
    ],
)
def test_bad_flags_end_in_one_line_before_anything_is_written(folder, capsys, argv, message):
    before = contents(folder)
    with pytest.raises((ValueError, SystemExit)) as error:
        eval_script.main([str(folder), *argv])
    line = str(error.value) if error.type is not SystemExit else capsys.readouterr().err.rstrip("\n")
    assert message in line
    assert "\n" not in line
    assert error.type is not SystemExit or error.value.code == 2
    assert contents(folder) == before


def test_exit_status_and_the_one_line_of_a_process(tmp_path):
    ran = subprocess.run(
        [sys.executable, ROOT / "eval.py", tmp_path / "none", "--device", "cpu"], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"eval.py: error: {tmp_path / 'none'}: no such experiment folder\n"


def test_the_paper_script_passes_flags_on_from_any_directory(tmp_path):
    ran = subprocess.run(
        ["bash", ROOT / "scripts" / "eval.sh", "some/run", "--n", "5", "--dry-run"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    settings_ = yaml.safe_load(ran.stdout)
    assert settings_.items() >= {"target": "some/run", "n": 5, "version": "standard"}.items()
    assert settings_["eps"] == ["2/255", "4/255", "8/255", "12/255", "16/255"]


def test_an_evaluation_follows_the_norm_of_its_run(tmp_path, capsys):
    settings_ = SETTINGS | {"norm": "L2", "method": "dyart"}
    with Experiment.create(tmp_path, "run", settings_, echo=lambda message: None) as experiment:
        experiment.save_best({"settings": settings_, "epoch": 1, "average": new_model(0).state_dict()})
    folder = str(tmp_path / "run")
    for argv, norm, eps in [
        ([], "L2", ["0.5"]),
        (["--weights", "average"], "L2", ["0.5"]),
        (["--eps", "paper"], "L2", ["0.25", "0.5", "0.75", "1"]),
        (["--norm", "Linf"], "Linf", ["8/255"]),
    ]:
        for target in (folder, f"{folder}/best.pt"):
            shown = parsed(target, *argv, capsys=capsys)
            assert (shown["norm"], shown["eps"]) == (norm, eps)
    flags = ["--n", "4", "--version", "custom", "--device", "cpu"]
    assert eval_script.main([folder, *flags]) == 0
    assert eval_script.main([folder, *flags, "--norm", "Linf", "--eps", "20"]) == 0
    records = json.loads((tmp_path / "run" / "autoattack.json").read_text())
    assert [(record["norm"], record["eps_text"]) for record in records] == [("L2", "0.5"), ("Linf", "20/255")]
    assert "best.pt: trained in L2, attacked in Linf (--norm)" in (tmp_path / "run" / "eval.log").read_text()


def test_a_run_in_a_norm_that_is_not_known_here_is_attacked_in_linf_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(eval_script, "evaluate_all", lambda tasks, *_: [])
    settings_ = SETTINGS | {"norm": "L1"}
    with Experiment.create(tmp_path, "run", settings_, echo=lambda message: None) as experiment:
        experiment.save_best({"settings": settings_, "epoch": 1, "average": new_model(0).state_dict()})
    assert eval_script.main([str(tmp_path / "run"), "--n", "4", "--device", "cpu"]) == 0
    assert "best.pt: trained in L1, attacked in Linf\n" in (tmp_path / "run" / "eval.log").read_text()


def test_nothing_is_said_of_the_norm_that_others_trained_in(tmp_path, monkeypatch):
    monkeypatch.setattr(eval_script, "evaluate_all", lambda tasks, *_: [])
    torch.save(new_model(0).state_dict(), tmp_path / "other.pt")
    argv = [str(tmp_path / "other.pt"), "--model", "wrn-10-1-swish", "--dataset", "digits", "--norm", "L2", "--n", "4"]
    assert eval_script.main([*argv, "--device", "cpu"]) == 0
    assert "trained in" not in (tmp_path / "other.pt.eval.log").read_text()


def test_other_test_images_than_before_are_evaluated_afresh_with_a_line(folder, monkeypatch, capsys):
    test = load_data("digits")[1]
    argv = [str(folder), "--n", "4", "--eps", "8", "--version", "custom", "--device", "cpu"]
    assert eval_script.main(argv) == 0
    assert "of other test images" not in capsys.readouterr().out
    prepared_anew = Split(test.images.flip(0), test.labels.flip(0))
    monkeypatch.setattr("evaluation.candidate.load_data", lambda *_: (None, prepared_anew))
    assert eval_script.main(argv) == 0
    output = capsys.readouterr().out
    assert "best.pt Linf 8/255: what was found before is of other test images; starting again" in output
    results = Results(folder / "autoattack")
    assert len(results.records) == 2 and results.current == results.records[1:]
    assert eval_script.main(argv) == 0
    assert "as evaluated before" in capsys.readouterr().out


def test_a_record_of_test_images_that_are_there_again_counts_again(folder, monkeypatch, capsys):
    first = load_data("digits")[1]
    argv = [str(folder), "--n", "4", "--eps", "4", "8", "--version", "custom", "--device", "cpu"]
    for images in (first, Split(first.images.flip(0), first.labels.flip(0)), first, first):
        monkeypatch.setattr("evaluation.candidate.load_data", lambda *_, images=images: (None, images))
        assert eval_script.main(argv) == 0
        records = Results(folder / "autoattack").current
        digests = [record["test_sha256"] for record in records]
        assert digests == 2 * [digest(Split(images.images[:4], images.labels[:4]))]
        assert [record["eps_text"] for record in records] == ["4/255", "8/255"]
    assert capsys.readouterr().out.count("as evaluated before") == 4
    assert len(Results(folder / "autoattack").records) == 4


def test_some_images_of_a_sorted_test_set_are_of_all_classes(folder, monkeypatch):
    test = load_data("digits")[1]
    order = test.labels.argsort()
    in_order = Split(test.images[order], test.labels[order])
    monkeypatch.setattr("evaluation.candidate.load_data", lambda *_: (None, in_order))
    evaluated = []

    def evaluate_all(tasks, *_):
        evaluated.extend(tasks)
        return []

    monkeypatch.setattr(eval_script, "evaluate_all", evaluate_all)
    assert eval_script.main([str(folder), "--n", "20", "--eps", "8", "--device", "cpu"]) == 0
    (task,) = evaluated
    assert task.identity["images"] == "balanced" and len(task.test.labels) == 400
    assert task.test.labels[:20].bincount(minlength=10).tolist() == [2] * 10
    assert task.identity["test_sha256"] == digest(Split(task.test.images[:20], task.test.labels[:20]))


@pytest.mark.parametrize(
    ("flags", "devices", "jobs"),
    [
        (["--device", "cpu"], ["cpu"], 1),
        (["--device", "cpu", "--jobs", "3"], ["cpu"], 3),
        (["--device", "cpu", "cpu:0"], ["cpu", "cpu:0"], 2),
        (["--device", "cpu", "cpu:0", "--jobs", "4"], ["cpu", "cpu:0"], 4),
    ],
)
def test_each_device_has_a_process_unless_jobs_says_more(folder, monkeypatch, flags, devices, jobs):
    asked = []

    def evaluate_all(tasks, jobs, results, devices, log):
        asked.append((devices, jobs))
        return []

    monkeypatch.setattr(eval_script, "evaluate_all", evaluate_all)
    assert eval_script.main([str(folder), "--n", "4", *flags]) == 0
    many = flags.index("--jobs") if "--jobs" in flags else len(flags)
    assert eval_script.main(["--n", "4", *flags[many:], *flags[:many], str(folder)]) == 0  # a folder after --device
    assert [(list(map(str, found)), number) for found, number in asked] == [(devices, jobs)] * 2


def test_fewer_processes_than_devices_are_refused(folder):
    with pytest.raises(ValueError, match="--jobs 1: fewer than the 2 devices"):
        eval_script.main([str(folder), "--device", "cpu", "cpu:0", "--jobs", "1"])
