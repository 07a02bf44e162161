"""How close a search comes, where there is nothing to search."""

from pathlib import Path

import pytest
import torch

import bench
from analysis import cost
from analysis.quality import measure_quality
from models import create_model

ROOT = Path(__file__).parents[1]


DIGITS = ["--dataset", "digits", "--model", "wrn-10-1-swish", "--batch-size", "8", "--threads", "1"]


def options(*more):
    return vars(bench.build_parser().parse_args([*DIGITS, *more]))


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_no_correct_example_is_no_quality(amp, tmp_path):
    torch.save(create_model("wrn-10-1-swish").state_dict(), tmp_path / "weights.pt")
    workload = cost.load_workload(str(tmp_path / "weights.pt"), options("--amp", amp, "--examples", "8"))
    assert not workload.correct().any()
    assert measure_quality(workload, options("--examples", "8")) == []
