"""analysis/budget.py: its prices against steps whose images are counted, and that plans keep to their budgets."""

import pytest
import torch
from torch import Tensor, nn

from analysis.budget import METHODS, passes_an_image, plan, spent
from dyart.losses import LOSSES
from experiment.build import loss_options
from experiment.settings import resolve


class Counted(nn.Module):
    """A network that counts its passes: an image forward 1, backward to the input 1 and to parameters too 2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 10))
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += len(x)
        logits = 100 * self.net(x)
        backward = 2 if any(parameter.requires_grad for parameter in self.parameters()) else 1
        if logits.requires_grad:
            logits.register_hook(lambda grad: setattr(self, "passes", self.passes + backward * len(grad)))
        return logits


@pytest.mark.parametrize("name", METHODS)
def test_a_step_takes_the_passes_that_it_is_priced_at(name: str) -> None:
    model, settings = Counted(), resolve({"dataset": "digits", **METHODS[name]})
    x = 0.5 + 0.2 * torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    y[:16] = (y[:16] + 1) % 10  # wrong, by far, as are few of the others nearly
    model.passes = 0
    loss, metrics = LOSSES[settings["method"]](model, x, y, **loss_options(settings, settings["method"]))
    loss.backward()
    correct = float(metrics.get("found", 0))
    assert settings["method"] != "dyart" or correct == pytest.approx(0.6)
    assert model.passes / len(x) == pytest.approx(passes_an_image(settings, correct), rel=0.02)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("budget", [8, 9, 18, 36, 50, 400])
def test_a_plan_spends_its_budget_and_not_more(name: str, budget: float) -> None:
    planned = plan(name, budget)
    if planned is None:
        assert passes_an_image(METHODS[name]) > 3 * (budget - 1)
        return
    stage = "clean" if planned["method"] == "clean" else planned["method"]
    rows = [{"stage": "burn-in"}] * planned["burn_in_epochs"] + [{"stage": stage, "found": 0.55}] * planned["epochs"]
    one_more = passes_an_image(planned) / 3
    assert spent(planned, rows) <= budget < spent(planned, rows) + one_more + 1e-6
    assert resolve({"dataset": "cifar10", **planned})["epochs"] == planned["epochs"]


def test_what_was_not_counted_has_no_price() -> None:
    with pytest.raises(ValueError, match=r"dyart with search 'other' have not been counted"):
        passes_an_image({"method": "dyart", "search": "other"})
