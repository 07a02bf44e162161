"""bench.py: that it runs, that its figures are what they are called, and that what it says of memory is measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench
from data import DATASETS
from models import create_model

ROOT = Path(__file__).parents[1]
DIGITS = ["--dataset", "digits", "--model", "wrn-10-1-swish", "--batch-size", "8", "--threads", "1"]


def options(*more):
    return vars(bench.build_parser().parse_args([*DIGITS, *more]))


def test_smoke_run(tmp_path):
    output = tmp_path / "new" / "bench.json"
    command = [sys.executable, ROOT / "bench.py", "--smoke", "--threads", "1", "--device", "cpu", "--output", output]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    report = json.loads(output.read_text())
    (subject,) = report["subjects"]
    assert subject["correct"] > 0.5
    assert report["bf16_tflops_per_second"] > 0
    times = subject["times"]
    assert set(bench.STEPS) <= set(times)
    for name in bench.STEPS:
        rate = times[name]["tflops"] / times[name]["seconds"]["median"]
        assert times[name]["of_bf16_rate"] == pytest.approx(rate / report["bf16_tflops_per_second"])
    for name, of in bench.BASES.items():
        assert times[name]["of"] == of
        ratio = times[name]["seconds"]["median"] / times[of]["seconds"]["median"]
        assert times[name]["ratio"]["median"] == pytest.approx(ratio)  # there is one round
        assert name in run.stdout
    assert times["search, fab"]["ratio"]["median"] > 2
    assert set(subject["memory"]) == {"clean step", "DyART step"}
    for peak in subject["memory"].values():
        assert min(peak["mib"], peak["resident_mib"]) > 1
        assert peak["of_clean"] == peak["mib"] / subject["memory"]["clean step"]["mib"]
    reference, fast, released = subject["quality"]
    assert reference["ratio_mean"] == 1
    assert fast["search"] == f"fast, {bench.SEARCHES['fast'][1]} steps"
    assert 0.9 < fast["ratio_mean"] < released["ratio_mean"] * 1.1


def test_flops_are_those_of_the_passes():
    """A clean step costs 3 forward passes, but for the first layer, whose input needs no gradient; AT adds attacks."""
    subject = bench.load_subject(None, options("--examples", "8"))
    count = {name: bench.count_flops(bench.training_step(subject, name, options())) for name in bench.STEPS}
    forward = bench.count_flops(lambda: subject.model(subject.x[:8]))
    weight = subject.model.init_conv.weight
    first = 2 * 8 * subject.x[0, 0].numel() * weight.numel() / 1e12
    assert count["clean step"] == pytest.approx(3 * forward - first)
    assert count["PGD-10 AT step"] == pytest.approx(count["clean step"] + 10 * 2 * forward)
    assert bench.count_flops(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == pytest.approx(2 * 3 * 4 * 5 / 1e12)


def test_weights_of_a_file_are_measured_on_a_balanced_batch(tmp_path):
    digits = DATASETS["digits"]
    model = create_model("wrn-10-1-swish", mean=digits.mean, std=digits.std)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    subject = bench.load_subject(str(tmp_path / "weights.pt"), options("--examples", "20"))
    assert subject.y.bincount().tolist() == [2] * 10
    with torch.no_grad():
        torch.testing.assert_close(subject.model(subject.x), model.eval()(subject.x))
    assert subject.identity["checkpoint"] == "weights.pt"


def test_a_step_is_repeatable_and_leaves_its_subject_alone():
    subject = bench.load_subject(None, options("--examples", "8"))
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    for name in bench.STEPS:
        bench.training_step(subject, name, options())()
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    assert all(parameter.grad is None for parameter in subject.model.parameters())


def test_resident_memory_sees_what_is_touched():
    before = bench.resident("VmRSS")
    held = torch.ones(2**25)
    assert 2**17 * 0.9 < bench.resident("VmRSS") - before < 2**17 * 1.2
    del held


def test_memory_is_measured_in_a_process_with_its_own_setting(monkeypatch):
    """The environment is the caller's again, and inside the large buffers have pages of their own."""
    monkeypatch.setattr(bench, "resident_of_step", os.getenv)
    assert bench.in_process(("MALLOC_MMAP_THRESHOLD_",), pages_of_its_own=True) == "131072"
    assert bench.in_process(("MALLOC_MMAP_THRESHOLD_",)) is None
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "5")
    bench.in_process(("PATH",), pages_of_its_own=True)
    assert os.environ["MALLOC_MMAP_THRESHOLD_"] == "5"


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_no_correct_example_is_no_quality(amp, tmp_path):
    torch.save(create_model("wrn-10-1-swish").state_dict(), tmp_path / "weights.pt")
    subject = bench.load_subject(str(tmp_path / "weights.pt"), options("--amp", amp, "--examples", "8"))
    assert not subject.correct().any()
    assert bench.measure_quality(subject, options("--examples", "8")) == []


def test_spread():
    assert bench.spread([3.0]) == {"median": 3, "quartile_1": 3, "quartile_3": 3}
    assert bench.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3, "quartile_1": 2, "quartile_3": 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pt", "--model", "wrn-10-1-swish"], "nowhere.pt"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "cpu", "--cuda-graphs"], "--cuda-graphs: only on a GPU"),
        (["--output", "/dev/null/bench.json"], "--output /dev/null"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        bench.main(arguments)


def test_bad_flags_end_in_one_line(capsys):
    with pytest.raises(SystemExit) as exit_:
        bench.main(["--batch-size", "0"])
    assert exit_.value.code == 2
    assert "--batch-size" in capsys.readouterr().err
