"""Several processes train one run: the same run as one process, whatever their number, however they end.

Real processes over gloo on this machine. With DYART_LARGE_TESTS=1: every method, number and precision, and 50 kills.
"""

import os
from pathlib import Path

import pytest
import torch
from company import SmallNet, largest_difference, small, train_together

import models
from data import loader
from experiment import validation

LARGE = os.environ.get("DYART_LARGE_TESTS") == "1"

METHODS = {
    "clean": ["--method", "clean"],
    "dyart": ["--method", "dyart"],
    "dyart shared": ["--method", "dyart", "--search", "shared"],
    "dyart fab": ["--method", "dyart", "--search", "fab", "--search-steps", "3"],
    "at": ["--method", "at", "--attack-iter", "2"],
    "trades": ["--method", "trades", "--attack-iter", "2"],
    "mart": ["--method", "mart", "--attack-iter", "2"],
    "n-fgsm": ["--method", "n-fgsm"],
    "fgsm-rs L2": ["--method", "fgsm-rs", "--norm", "L2"],
    "burn-in": ["--burn-in-epochs", "1", "--epochs", "1", "--track-dynamics", "1"],
}


@pytest.fixture(autouse=True)
def small_net(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "small", SmallNet)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "to_input", lambda images, convert=loader.to_input: convert(images).double())
    monkeypatch.setattr(validation, "to_input", loader.to_input)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- The same run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_processes_trains_the_same_run(method: str, tmp_path: Path, in_float64: None) -> None:
    flags = ["--group-norm", *METHODS[method]]
    for size in (1, 2, 3, 4):
        assert train_together(size, small(tmp_path / str(size), *flags), tmp_path / str(size)) == [0] * size
        if size > 1:
            assert largest_difference(tmp_path / str(size) / "run", tmp_path / "1" / "run") < 1e-9
