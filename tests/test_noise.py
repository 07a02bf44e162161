"""Noise of some rows of a batch: that which the whole batch would have had, for every attack and search that draws."""

import pytest
import torch
from torch import nn

from dyart.attacks import BALLS, STARTS, pgd
from dyart.margin import find_boundary
from dyart.noise import RowsOf, draw


def seeded():
    return torch.Generator().manual_seed(3)


def test_rows_have_the_noise_of_the_whole_batch():
    like = torch.zeros(1, dtype=torch.float64)
    whole = draw(torch.randn, (7, 2), like, seeded())
    assert torch.equal(whole, torch.randn(7, 2, generator=seeded(), dtype=torch.float64))
    for rows in (slice(1, 7, 3), slice(None)):
        assert torch.equal(draw(torch.randn, whole[rows].shape, like, RowsOf(seeded(), rows, 7)), whole[rows])
    with pytest.raises(ValueError, match="noise for 3 examples, of which 4 are rows of the batch of 7"):
        draw(torch.randn, (3, 2), like, RowsOf(seeded(), slice(0, None, 2), 7))


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("start", sorted({*STARTS} - {"none"}))
def test_an_example_is_attacked_alike_whatever_the_rows_beside_it(norm, start):
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double(),
        torch.rand(9, 3, 2, 2).double(),
        torch.arange(9) % 3,
    )
    options = {"norm": norm, "start": start, "within": "box", "steps": 2, "eps": 0.2, "restarts": 2}
    whole = pgd(model, x, y, generator=seeded(), **options)
    for rows in (slice(0, 9, 2), slice(1, 9, 2)):
        part = pgd(model, x[rows], y[rows], generator=RowsOf(seeded(), rows, 9), **options)
        assert torch.allclose(part, whole[rows], atol=1e-12)
    assert not torch.allclose(pgd(model, x[1::2], y[1::2], generator=seeded(), **options), whole[1::2])


def test_a_search_starts_alike_whatever_the_rows_beside_it():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double(), torch.rand(9, 3, 2, 2).double()
    y = model(x).argmax(1)
    whole = find_boundary(model, x, y, search="fab", steps=2, generator=seeded())
    for rows in (slice(0, 9, 2), slice(1, 9, 2)):
        part = find_boundary(model, x[rows], y[rows], search="fab", steps=2, generator=RowsOf(seeded(), rows, 9))
        assert torch.allclose(part.x, whole.x[rows], atol=1e-12)
