"""What training does on a GPU, and on a CPU: layouts, precisions, compilation, copies. For scripts/check_gpu.sh.

DYART_TEST_DEVICE names the device; without it, a GPU where there is one. (True captures of graphs: test_graphs.py.)
"""

import copy
import os
from datetime import timedelta

import pytest
import torch
from test_data_ahead import SlowAuxiliary
from test_data_loader import random_split
from torch import nn

from data import Loader
from dyart.losses import LOSSES
from dyart.modes import mixed_precision
from models import create_model

DEVICE = torch.device(os.environ.get("DYART_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))
NEEDS_GPU = pytest.mark.skipif(DEVICE.type != "cuda", reason="only with a GPU")
LARGE = os.environ.get("DYART_LARGE_TESTS") == "1"


@pytest.fixture
def subject(monkeypatch) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network that is right, and sure, about all but one of its images, on the device."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # for matrix products it is off by itself
    torch.manual_seed(0)
    model = create_model("wrn-10-1-swish", mean=[0.5] * 3, std=[0.25] * 3)
    x = torch.rand(16, 3, 16, 16)
    with torch.no_grad():
        model.train()(x)
        model.logits.weight *= 20
    y = model.eval()(x).argmax(1)
    y[0] = (y[0] + 1) % 10
    return model.to(DEVICE), x.to(DEVICE), y.to(DEVICE)


def gradient(model: nn.Module, x: torch.Tensor, y: torch.Tensor, method: str = "dyart") -> torch.Tensor:
    """The gradient of a training step, in one vector."""
    model = copy.deepcopy(model)
    loss, _ = LOSSES[method](model, x, y)
    loss.backward()
    parts = [parameter.grad.flatten() for parameter in model.parameters()]
    assert all(part.dtype == torch.float32 and part.isfinite().all() for part in parts)
    return torch.cat(parts).double().cpu()


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("method", ["clean", "dyart"])
def test_channels_last_gives_the_gradient_of_the_usual_layout(subject, method):
    model, x, y = subject
    usual = gradient(model, x, y, method)
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert relative(gradient(model, x.contiguous(memory_format=torch.channels_last), y, method), usual) < 1e-3


@pytest.mark.parametrize("method", ["clean", "dyart"])
def test_bf16_gives_nearly_the_gradient_of_float32(subject, method):
    model, x, y = subject
    usual = gradient(model, x, y, method)
    with mixed_precision("bf16", DEVICE.type):
        rough = gradient(model, x, y, method)
    assert 0 < relative(rough, usual) < 0.5
    assert torch.cosine_similarity(rough, usual, dim=0) > 0.9


@pytest.mark.skipif(DEVICE.type != "cuda" and not LARGE, reason="on a CPU among the large tests: it takes a minute")
def test_a_compiled_model_gives_the_gradient_of_an_eager_one(subject):
    model, x, y = subject
    usual = gradient(model, x, y)
    model.compile()
    assert relative(gradient(model, x, y), usual) < 1e-3


def test_batches_are_those_of_the_cpu():
    """On a GPU they come by pinned memory, and a stream of their own."""

    def batches(device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
        auxiliary = SlowAuxiliary(random_split(90, seed=1), 0.001, seed=0)
        options = {"auxiliary": auxiliary, "auxiliary_fraction": 0.7, "steps_per_epoch": 12, "device": device}
        busy, found = torch.rand(1000, 1000, device=device), []
        for x, y in Loader(random_split(50), 20, seed=0, **options).epoch(0):
            found.append((x.clone(), y.clone()))
            busy = busy @ busy / 500  # a step, beside which the next batch is copied
        assert busy.isfinite().all()
        return found

    for (x, y), (expected_x, expected_y) in zip(batches(DEVICE), batches(torch.device("cpu")), strict=True):
        assert x.device.type == DEVICE.type and torch.equal(y.cpu(), expected_y)
        torch.testing.assert_close(x.cpu(), expected_x, rtol=0, atol=1e-7)


@NEEDS_GPU
def test_statistics_of_one_synchronized_process_are_those_of_batch_norm(subject, tmp_path):
    model, x, y = subject
    usual = gradient(model, x, y, "clean")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1, timeout=timedelta(seconds=20))
    try:
        synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
        assert relative(gradient(synchronized, x, y, "clean"), usual) < 1e-3
    finally:
        torch.distributed.destroy_process_group()
