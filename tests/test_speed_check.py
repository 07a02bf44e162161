"""The speed check: searches that miss the closest point are made up for."""

import math

import pytest
import torch
from test_margin import Strip
from torch import nn

from analysis import speed_check
from analysis.measure import Search
from data import Split
from dyart.margin import Boundary, find_boundary, soft_logit_margin


@pytest.mark.parametrize("spoiled", ["before the step", "after it"])
def test_a_search_that_misses_the_closest_point_is_made_up_for(monkeypatch, spoiled):
    """A linear classifier, whose margins and speeds are known; one first search ends at a point that is farther."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    with torch.no_grad():
        logits = model(torch.full((1, 3, 2, 2), 128 / 255).double())[0]
        model[1].bias[0] += 0.02 - (logits[0] - logits[1])
    images = torch.full((8, 2, 2, 3), 128, dtype=torch.uint8)
    images[:, 0, 0, 0] += torch.arange(8, dtype=torch.uint8)
    along = {"at": {name: torch.randn_like(p) / 10 for name, p in model.named_parameters()}}
    searched = speed_check.find
    spoils = []

    @torch.no_grad()
    def find(of, x, y, search, start=None):
        boundary = searched(of, x, y, search, start)
        if start is None and of[1].weight.equal(model[1].weight) == (spoiled == "before the step"):
            weight = (of[1].weight[0] - of[1].weight[1]).detach()
            value = soft_logit_margin(of(x), y, math.inf)[3]
            aside = x[3].flatten().clone()  # Example 3 goes along a single coordinate.
            aside[weight.abs().argmax()] -= 1.001 * value / weight[weight.abs().argmax()]
            boundary.x[3] = aside.view(3, 2, 2)
            spoils.append(((boundary.x[3] - x[3]).abs().max() / boundary.margin[3]).item())
            boundary.margin[3] *= spoils[-1]
            boundary.value[3] = soft_logit_margin(of(boundary.x), y, math.inf)[3]
        return boundary

    monkeypatch.setattr(speed_check, "find", find)
    examples = Split(images, torch.zeros(8, dtype=torch.int64))
    rows, results = speed_check.check_speeds(model, examples, Search("Linf", math.inf, 10, 8), along)
    assert len(spoils) == 1 and spoils[0] > 2
    assert results["at"]["examples"] == len(rows) == 8
    assert results["at"]["equal_signs"] == 1
    for row in rows:
        assert row["measured"] == pytest.approx(row["speed"], rel=0.01)


@pytest.mark.parametrize("far", [0, 1])
def test_the_point_of_one_model_leads_the_other_to_the_closer_boundary(far):
    x, y = torch.tensor([[0.52, 0.5]]).double(), torch.zeros(1, dtype=torch.int64)
    models, search = [Strip(), Strip()], Search("Linf", math.inf, 20, 1)
    found = [find_boundary(Strip(), x, y, temperature=math.inf, steps=20, start=x + 0.17 * s) for s in (-0.7, 1)]
    assert [round(boundary.margin.item(), 2) for boundary in found] == [0.12, 0.18]
    settled, moving = speed_check._settle(models, found if far else found[::-1], x, y, search)
    assert [round(boundary.margin.item(), 2) for boundary in settled] == [0.12, 0.12]
    assert moving == 0


@pytest.mark.parametrize("gains", [3, 10**6])
def test_searches_go_on_while_an_example_comes_closer(monkeypatch, gains):
    """Example 1 comes closer by a tenth, so many times; example 0 never does, and is not searched again."""
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    found = Boundary(x, torch.tensor([True, True]), torch.ones(2), torch.zeros(2), torch.ones(2, 3))
    sizes = []

    def find(model, x, y, search, start):
        sizes.append(len(x))
        margin = torch.ones(len(x))
        margin[-1] = 0.9 ** min(len(sizes), gains)
        return Boundary(x, torch.ones(len(x), dtype=torch.bool), margin, torch.zeros(len(x)), torch.ones_like(x))

    monkeypatch.setattr(speed_check, "find", find)
    (settled,), moving = speed_check._settle([None], [found], x, y, Search("Linf", math.inf, 5, 2))
    rounds = min(gains + 1, speed_check.CHECK_ROUNDS)
    assert sizes == [2] + [1] * (rounds - 1)
    torch.testing.assert_close(settled.margin, torch.tensor([1, 0.9 ** min(gains, rounds)]))
    assert moving == (gains > rounds)
