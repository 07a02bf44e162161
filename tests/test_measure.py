"""Margins of hand-made models, the choice of images, work in parallel."""

import math

import pytest
import torch
from torch import nn

from analysis import measure as measure_module
from analysis.measure import Search, choose_correct, measure
from data import Split


class Threshold(nn.Module):
    """Class 1 where the mean pixel is above 0.5, with logits ±4 (mean − 0.5); class 2 never."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, x):
        value = self.scale * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-value, value, torch.full_like(value, -100.0)], 1)


def grey(levels):
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 4, 4, 3)


def test_examples_that_a_search_misses_are_searched_for_longer(monkeypatch):
    """The search is made to miss example 1; the longer one that follows finds it, and touches no other."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double(), torch.rand(4, 3, 2, 2).double()
    y = model(x).argmax(1)
    y[3] = 1 - y[3]
    searched, sizes = measure_module.closest_boundary, []

    def closest_boundary(model, x, labels, **options):
        sizes.append((len(x), options["passes"]))
        boundary = searched(model, x, labels, **options)
        if len(sizes) == 1:
            boundary.found[1], boundary.value[1] = False, 1.0
        return boundary

    monkeypatch.setattr(measure_module, "closest_boundary", closest_boundary)
    search = Search("Linf", math.inf, 5, 4)
    boundary = measure_module.find(model, x, y, search)
    assert sizes == [(4, 6), (1, 6 * measure_module.LONGER)]
    assert boundary.found.tolist() == [True, True, True, False]
    expected = measure_module.find_boundary(model, x, y, temperature=math.inf, steps=50)
    torch.testing.assert_close(boundary.margin, expected.margin, rtol=0.05, atol=0)


def test_soft_margins_are_those_of_the_soft_boundary():
    """It is no class's: the search along the gradient of the soft logit margin finds it, as it did before."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).double(), torch.rand(8, 3, 2, 2).double()
    y = model(x).argmax(1)
    found = measure_module.find(model, x, y, Search("Linf", 5.0, 6, 8))
    expected = measure_module.find_boundary(model, x, y, temperature=5.0, steps=6)
    for field, other in zip(found, expected, strict=True):
        torch.testing.assert_close(field, other)


def test_parallel_results_are_in_order_and_errors_come_through():
    cpu = torch.device("cpu")
    assert list(measure_module.in_parallel(lambda item: item**2, range(20), cpu)) == [item**2 for item in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(measure_module.in_parallel(lambda item: 1 / item, [1, 0, 2], cpu))


def test_margin_is_zero_where_wrong_and_the_distance_where_right():
    split = Split(grey([0, 51, 204, 255]), torch.tensor([0, 1, 1, 1]))
    margin = measure(Threshold(), split, Search("Linf", math.inf, 10, 3), {}, "")["margin"]
    assert margin[1] == 0
    assert margin[[0, 2, 3]] == pytest.approx([0.5, 0.3, 0.5], abs=3e-3)


def test_margin_is_infinite_where_no_boundary_point_was_found():
    class Constant(Threshold):
        def forward(self, x):
            return super().forward(x) * 0 + torch.tensor([1.0, 0.0, 0.0])

    margin = measure(Constant(), Split(grey([9, 9]), torch.tensor([0, 1])), Search("Linf", math.inf, 3, 2), {}, "")
    assert margin["margin"].tolist() == [math.inf, 0]


def test_only_correct_examples_are_chosen_in_order_over_batches():
    split = Split(grey([0, 1, 255, 2, 3]), torch.tensor([0, 1, 1, 0, 0]))
    chosen = choose_correct(Threshold(), split, 3, math.inf, 2)
    assert chosen.images[:, 0, 0, 0].tolist() == [0, 255, 2]
    assert chosen.labels.tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="only 4 of the training images"):
        choose_correct(Threshold(), split, 5, math.inf, 2)


def test_margins_of_wrong_and_of_hopeless_examples():
    """0 where misclassified, inf where right and no boundary in reach; in order, whatever the number of batches."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].weight[0, 0], model[1].weight[1, 0], model[1].bias[:] = 1, -1, torch.tensor([0.0, 0.2])
    images = torch.zeros(5, 2, 2, 3, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([255, 0, 51, 255, 0])  # Φ of class 0 is 2 x_1 - 0.2, that of class 1 minus this
    examples, search = Split(images, torch.tensor([0, 0, 0, 1, 1])), Search("Linf", math.inf, 5, 2)
    margins = measure(model.eval(), examples, search, {}, "")
    assert margins["margin"].tolist() == pytest.approx([0.9, 0, 0.1, 0, 0.1], rel=0.05)
    with torch.no_grad():
        model[1].bias[0] = 9
    margins = measure(model, examples, search, {}, "")
    assert margins["margin"].tolist() == [math.inf] * 3 + [0, 0]
