"""bench.py: that it runs, that its figures are what they are called, and that what it says of memory is measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bench
from analysis import company, cost
from analysis.company import PARTS, SHARED_OUT
from dyart.losses import TRAINING_STEPS
from dyart.margin import SEARCHES, find_boundary
from experiment.processes import ALONE

ROOT = Path(__file__).parents[1]
LARGE = os.environ.get("DYART_LARGE_TESTS") == "1"


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
    (workload,) = report["subjects"]
    assert workload["correct"] > 0.5 and workload["norm"] == "Linf"
    assert f"{workload['correct_timed']:.0%} of the batch that is timed" in run.stdout
    assert report["bf16_tflops_per_second"] > 0
    times = workload["times"]
    assert set(cost.STEPS) <= set(times)
    for name in cost.STEPS:
        rate = times[name]["tflops"] / times[name]["seconds"]["median"]
        assert times[name]["of_bf16_rate"] == pytest.approx(rate / report["bf16_tflops_per_second"])
    for name, of in cost.BASES.items():
        assert times[name]["of"] == of
        ratio = times[name]["seconds"]["median"] / times[of]["seconds"]["median"]
        assert times[name]["ratio"]["median"] == pytest.approx(ratio)  # there is one round
        assert name in run.stdout
    assert times["search, fab"]["ratio"]["median"] > 2
    passes = {name: times[name]["passes"] for name in cost.STEPS}
    assert passes["clean step"] == pytest.approx(3, rel=0.02) and passes["N-FGSM step"] == pytest.approx(5, rel=0.02)
    assert passes["PGD-10 AT step"] == pytest.approx(23, rel=0.02)
    assert 3 < passes["DyART step"] < passes["DyART step, --search fast"] < passes["DyART step, --search fab"]
    assert passes["DyART step, --search fab"] > 3 * passes["DyART step, --search fast"]
    assert passes["DyART step"] == pytest.approx(3 + 9 * workload["correct_timed"], rel=0.1)
    assert set(workload["memory"]) == {"clean step", "DyART step"}
    for peak in workload["memory"].values():
        assert min(peak["mib"], peak["resident_mib"]) > 1
        assert peak["of_clean"] == peak["mib"] / workload["memory"]["clean step"]["mib"]
    reference, rough, fast, shared, adaptive, released = workload["quality"]
    assert all(row["gradient_cosine"] > 0.5 for row in workload["quality"])
    assert (
        reference["gradient_cosine"] == pytest.approx(1, abs=1e-5)
        and shared["search"] == f"shared, {TRAINING_STEPS['shared']} steps"
        and adaptive["search"] == "shared, adaptive"
    )
    assert reference["ratio_mean"] == 1
    assert rough["search"] == f"fast, {TRAINING_STEPS['fast']} steps"
    assert fast["search"] == f"fast, {SEARCHES['fast'][1]} steps"
    assert 0.9 < fast["ratio_mean"] < released["ratio_mean"] * 1.1
    assert 0.9 < rough["ratio_mean"] < released["ratio_mean"] * 1.1


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_step_takes_the_passes_of_its_bare_ones(adaptive):
    given = options() | {"rounds": 1}
    workload = cost.load_workload(None, given)
    assert workload.objective == {"r0": 16 / 255, "alpha": 3.0}
    images = given["batch_size"]
    margins = find_boundary(workload.model, workload.x[:images], workload.y[:images]).margin
    r0 = margins.median().item()  # so that some are near, and some beyond
    workload = workload._replace(objective=workload.objective | {"r0": r0})
    name = f"DyART step{', --adaptive-steps true' * adaptive}"
    taken = cost.passes_taken(workload, name, given)
    rows = [n for n, _ in taken]
    assert [trained_on for _, trained_on in taken] == [True, False, False, False, True]
    assert rows == [images] * 5 if not adaptive else rows[0] == images > rows[3] and rows[4] < images
    times = cost.measure_times(workload, given, 1.0)
    count = sum((3 if trained_on else 2) * n for n, trained_on in taken) / images
    assert times[name]["passes"] == pytest.approx(count, rel=0.02)
    assert not workload.model._forward_pre_hooks


def test_a_step_takes_the_time_of_its_parts():
    given = options() | {"examples": 8}
    steps = company._steps(cost.load_workload(None, given), given, ALONE)
    times = {name: [step(), step()] for name, step in steps.items()}
    assert set(times) == set(SHARED_OUT)
    assert all(set(parts) == set(PARTS) and min(parts.values()) > 0 for taken in times.values() for parts in taken)
    assert times["DyART step"][1]["passes"] > times["clean step"][1]["passes"]
    assert times["clean step"][1]["sum"] < times["clean step"][1]["passes"]  # there are no others to sum over


@pytest.mark.skipif(not LARGE, reason="20 seconds of starting processes")
def test_steps_that_processes_share_out(tmp_path, capsys):
    output = tmp_path / "bench.json"
    flags = ["--smoke", "--processes", "2", "--threads", "1", "--device", "cpu", "--output", str(output)]
    assert bench.main(flags) == 0
    (workload,) = json.loads(output.read_text())["subjects"]
    assert set(workload["processes"]) == set(SHARED_OUT)
    printed = capsys.readouterr().out
    for name, row in workload["processes"].items():
        assert name in printed
        median = {key: row[key]["median"] for key in ("alone", "together", "throughput", *PARTS)}
        assert median["throughput"] == pytest.approx(median["alone"] / median["together"])  # there is one round
        assert median["together"] == pytest.approx(sum(median[part] for part in PARTS)) and min(median.values()) > 0
    dyart, clean = (workload["processes"][name]["passes"]["median"] for name in ("DyART step", "clean step"))
    assert dyart > clean


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
