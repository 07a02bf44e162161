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


def test_the_gradient_of_a_search_is_held_against_the_long_ones(monkeypatch):
    """On weights that the searches disagree on least where they look longest."""
    workload = cost.load_workload(None, options("--examples", "8"))
    rows = {row["search"]: row for row in measure_quality(workload, options("--examples", "8", "--steps", "1", "3"))}
    assert list(rows) == [
        "reference",
        *(f"fast, {n} steps" for n in (1, 3, 6, 10)),
        *(f"shared, {n} steps" for n in (1, 3)),
    ] + ["shared, adaptive", "fab, 20 steps (released)"]
    assert rows["reference"]["gradient_norm"] == pytest.approx(1, abs=1e-5)
    cosines = [rows[f"fast, {steps} steps"]["gradient_cosine"] for steps in (1, 3, 6, 10)]
    assert cosines == sorted(cosines) and cosines[2] > 0.95
    assert 0.5 < rows["shared, 1 steps"]["gradient_cosine"] < rows["shared, 3 steps"]["gradient_cosine"] < 1
    assert all(row["gradient_batches"] == 1 for row in rows.values())
    # Of points that nobody looked at some lie before the boundary.
    assert rows["shared, 1 steps"]["found"] < rows["fast, 6 steps"]["found"]


def test_gradients_are_compared_on_every_whole_batch():
    """On each as on it alone: their mean, and the least cosine."""
    few, many = options("--examples", "8", "--steps"), options("--examples", "28", "--steps")
    workload = cost.load_workload(None, many)
    rows = {row["search"]: row for row in measure_quality(workload, many)}
    alone = []
    for start in (0, 8, 16):
        part = workload._replace(x=workload.x[start : start + 8], y=workload.y[start : start + 8])
        alone.append({row["search"]: row for row in measure_quality(part, few)})
    for search in ("shared, 3 steps", "fast, 6 steps"):
        cosines = [of[search]["gradient_cosine"] for of in alone]
        assert len(set(cosines)) == 3 == rows[search]["gradient_batches"]
        assert rows[search]["gradient_cosine"] == pytest.approx(sum(cosines) / 3, rel=1e-4)
        assert rows[search]["gradient_cosine_least"] == pytest.approx(min(cosines), rel=1e-4)
        norms = [of[search]["gradient_norm"] for of in alone]
        assert rows[search]["gradient_norm"] == pytest.approx(sum(norms) / 3, rel=1e-4)
