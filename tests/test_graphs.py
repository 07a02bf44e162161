"""CUDA graphs: what is held, replayed and handed out; on the CPU with a stand-in that runs the function again."""

import copy

import pytest
import torch
from torch import nn

from dyart import graphs as graphs_module
from dyart.graphs import CudaGraphs
from dyart.losses import dyart_loss
from dyart.margin import find_boundary
from dyart.modes import mixed_precision

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs exist only with a GPU")


def conv_net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten(), nn.Linear(128, 5)]
    model = nn.Sequential(*layers).eval()
    model[4].weight.data *= 20  # sure of its classes, so that also the soft margin is positive
    return model


def batch(model, seed, n=8):
    x = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).device)
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 5
    return x, y


@pytest.fixture
def captures(monkeypatch):
    """As on an accelerator shapes are fixed, and a replay writes to the tensors that the capture filled."""
    made = []

    def capture(function, inputs):
        outputs = [output.clone() for output in function(*inputs)]

        def replay():
            for output, new in zip(outputs, function(*inputs), strict=True):
                output.copy_(new)

        made.append(inputs)
        return replay, outputs

    monkeypatch.setattr(graphs_module, "capture", capture)
    monkeypatch.setattr("dyart.search.has_fixed_shapes", lambda x: True)
    monkeypatch.setattr("dyart.projection.has_fixed_shapes", lambda x: True)
    return made


WAYS = {
    "fast": ({}, "none"),
    "L2": ({"norm": "L2"}, "none"),
    "fab": ({"search": "fab", "init_radius": 0.0}, "none"),
    "bf16": ({}, "searches"),
}


def check_searches(model, way):
    options, amp = WAYS[way]
    graphs, kept = CudaGraphs(), []
    for seed in range(3):
        x, y = batch(model, seed)
        with mixed_precision(amp, x.device.type):
            expected = find_boundary(model, x, y, **options)
            kept.append((expected, find_boundary(model, x, y, graphs=graphs, **options)))
        assert expected.found.tolist() == [False] + [True] * 7
        with torch.no_grad():  # as an optimizer does
            for parameter in model.parameters():
                parameter *= 1.1
    # Compared at the end, since a replay writes where the one before it wrote.
    for expected, replayed in kept:
        for field, other in zip(expected, replayed, strict=True):
            torch.testing.assert_close(field, other)


@pytest.mark.parametrize("way", WAYS)
def test_replayed_searches_find_what_searches_find(captures, way):
    check_searches(conv_net(), way)
    assert len(captures) == 1


@NEEDS_GPU
@pytest.mark.parametrize("way", WAYS)
def test_captured_searches_find_what_searches_find(way, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    check_searches(conv_net().cuda(), way)


def test_what_differs_is_captured_anew(captures):
    model, graphs = conv_net(), CudaGraphs()
    x, y = batch(model, 0)
    other = copy.deepcopy(model)
    ways = [
        lambda: find_boundary(model, x, y, graphs=graphs),
        lambda: find_boundary(model, x[:4], y[:4], graphs=graphs),
        lambda: find_boundary(model, x, y, graphs=graphs, norm="L2"),
        lambda: find_boundary(model, x, y, graphs=graphs, steps=3),
        lambda: find_boundary(model, x, y, graphs=graphs, temperature=1.0),
        lambda: find_boundary(model, x, y, graphs=graphs, search="fab", init_radius=0.01),
        lambda: find_boundary(model, x, y, graphs=graphs, start=(x + 0.01).clamp(0, 1)),
        lambda: find_boundary(other, x, y, graphs=graphs),
    ]
    for _ in range(2):
        for way in ways:
            way()
    assert len(captures) == len(ways)
    with torch.autocast("cpu", torch.bfloat16):
        ways[0]()
    assert len(captures) == len(ways) + 1


def test_a_start_at_x_itself_stays_that_in_a_graph(captures):
    """Else the search would take one more pass through the network."""
    model, graphs, calls = conv_net(), CudaGraphs(), []
    x, y = batch(model, 0)
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    find_boundary(model, x, y)
    passes = len(calls)
    find_boundary(model, x, y, graphs=graphs)
    assert len(calls) == 3 * passes  # once more to capture, once more to replay


def check_losses(model):
    graphs = CudaGraphs()
    for seed in range(3):
        x, y = batch(model, seed)
        gradients = []
        for how in ({}, {"graphs": graphs}):
            trained = copy.deepcopy(model) if not how else model
            loss, metrics = dyart_loss(trained, x, y, **how)
            assert metrics["found"] > 0.5
            gradients.append(torch.autograd.grad(loss, list(trained.parameters())))
        for expected, gradient in zip(*gradients, strict=True):
            torch.testing.assert_close(gradient, expected)
        model.eval()


def test_the_loss_has_the_same_gradient_with_a_replayed_search(captures):
    check_losses(conv_net())
    assert len(captures) == 1


@NEEDS_GPU
def test_the_loss_has_the_same_gradient_with_a_captured_search(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    check_losses(conv_net().cuda())
