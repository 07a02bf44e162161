"""What a step costs: its operations against a count by hand, its memory against what was touched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import run_training, tiny

import bench
from analysis import cost
from data import DATASETS
from dyart.losses import clean_loss
from experiment.folder import Experiment
from experiment.settings import resolve
from models import create_model

ROOT = Path(__file__).parents[1]


DIGITS = ["--dataset", "digits", "--model", "wrn-10-1-swish", "--batch-size", "8", "--threads", "1"]


def options(*more):
    return vars(bench.build_parser().parse_args([*DIGITS, *more]))


def test_flops_are_those_of_the_passes():
    """A clean step costs 3 forward passes, but for the first layer, whose input needs no gradient; AT adds attacks."""
    workload = cost.load_workload(None, options("--examples", "8"))
    count = {name: cost.count_flops(cost.training_step(workload, name, options())) for name in cost.STEPS}
    forward = cost.count_flops(lambda: workload.model(workload.x[:8]))
    weight = workload.model.init_conv.weight
    first = 2 * 8 * workload.x[0, 0].numel() * weight.numel() / 1e12
    assert count["clean step"] == pytest.approx(3 * forward - first)
    assert count["PGD-10 AT step"] == pytest.approx(count["clean step"] + 10 * 2 * forward)
    assert count["N-FGSM step"] == pytest.approx(count["clean step"] + 2 * forward)
    assert cost.count_flops(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == pytest.approx(2 * 3 * 4 * 5 / 1e12)


def test_weights_of_a_file_are_measured_on_a_balanced_batch(tmp_path):
    digits = DATASETS["digits"]
    model = create_model("wrn-10-1-swish", mean=digits.mean, std=digits.std)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    workload = cost.load_workload(str(tmp_path / "weights.pt"), options("--examples", "20"))
    assert workload.y.bincount().tolist() == [2] * 10
    with torch.no_grad():
        torch.testing.assert_close(workload.model(workload.x), model.eval()(workload.x))
    assert workload.identity["checkpoint"] == "weights.pt"


def test_images_are_taken_from_where_training_took_them(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    digits, asked = DATASETS["digits"], []

    def load(data_dir, **kwargs):
        asked.append(str(data_dir))
        return digits.load(data_dir, **kwargs)

    monkeypatch.setitem(DATASETS, "digits", digits._replace(load=load))
    argv = ["--method", "clean", "--epochs", "1", "--data-dir", str(tmp_path / "data")]
    assert run_training(*tiny(tmp_path, *argv)) == 0
    for more in ([], ["--data-dir", str(tmp_path)]):
        cost.load_workload(str(tmp_path / "run"), options("--examples", "20", *more))
    assert asked == [str(tmp_path / "data"), str(tmp_path / "data"), str(tmp_path)]


def test_the_norm_and_its_lengths_are_those_of_the_run(tmp_path, monkeypatch):
    """Or those of --norm. With the r0 of Linf, a step in L2 would leave nearly all margins alone, and cost less."""
    model = create_model("wrn-10-1-swish", mean=DATASETS["digits"].mean, std=DATASETS["digits"].std)
    settings = resolve({"dataset": "digits", "model": "wrn-10-1-swish", "norm": "L2"})
    with Experiment.create(tmp_path, "run", settings, echo=lambda message: None) as experiment:
        experiment.save_best({"settings": settings, "epoch": 1, "average": model.state_dict()})
    given = {}

    def loss(model, x, y, **arguments):
        given.update(arguments)
        return clean_loss(model, x, y)

    monkeypatch.setitem(cost.LOSSES, "dyart", loss)
    for flags, norm, r0 in (([], "L2", 1.0), (["--norm", "Linf"], "Linf", 16 / 255)):
        workload = cost.load_workload(str(tmp_path / "run"), options("--examples", "8", *flags))
        given.clear()
        cost.training_step(workload, "DyART step", options())()
        assert (workload.norm, given["norm"], given.get("r0")) == (norm, norm, r0)


def test_a_step_is_repeatable_and_leaves_its_workload_alone():
    workload = cost.load_workload(None, options("--examples", "8"))
    before = {name: value.clone() for name, value in workload.model.state_dict().items()}
    for name in cost.STEPS:
        cost.training_step(workload, name, options())()
    assert all(torch.equal(value, before[name]) for name, value in workload.model.state_dict().items())
    assert all(parameter.grad is None for parameter in workload.model.parameters())


def test_resident_memory_sees_what_is_touched():
    """In a process of its own, which has no pages left of what it held before."""
    lines = ["import torch", "from analysis.cost import resident", "before = resident('VmRSS')"]
    lines += ["held = torch.ones(2**25)", "print(resident('VmRSS') - before)"]
    printed = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, check=True).stdout
    assert 2**17 * 0.9 < int(printed) < 2**17 * 1.2


def test_memory_is_measured_in_a_process_with_its_own_setting(monkeypatch):
    """The environment is the caller's again, and inside the large buffers have pages of their own."""
    monkeypatch.setattr(cost, "resident_of_step", os.getenv)
    assert cost.in_process(("MALLOC_MMAP_THRESHOLD_",), pages_of_its_own=True) == "131072"
    assert cost.in_process(("MALLOC_MMAP_THRESHOLD_",)) is None
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "5")
    cost.in_process(("PATH",), pages_of_its_own=True)
    assert os.environ["MALLOC_MMAP_THRESHOLD_"] == "5"


def test_spread():
    assert cost.spread([3.0]) == {"median": 3, "quartile_1": 3, "quartile_3": 3}
    assert cost.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3, "quartile_1": 2, "quartile_3": 4}
