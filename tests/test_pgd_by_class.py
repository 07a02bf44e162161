"""scripts/pgd_by_class.py: what it counts against the closed form of a linear model, and its run on a folder."""

import json

import torch
from runs import run_training, tiny
from torch import nn

from scripts import pgd_by_class

EPS = 8 / 255


def test_of_a_linear_model_those_withstand_whose_margins_are_wider_than_the_ball():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(5, 12, generator=generator))
        model[1].bias.copy_(-0.5 * model[1].weight.sum(1))  # all classes alike in the middle of the box
    x = 0.5 + 0.1 * torch.randn(200, 3, 2, 2, generator=generator).clamp(-2, 2)
    logits = model(x)
    y = logits.argmax(1)
    y[:20] = (y[:20] + 1) % 5  # wrong
    standing = pgd_by_class.withstands(model, x, y, EPS, "Linf")
    weight = model[1].weight
    reach = EPS * (weight[:, None] - weight[None]).abs().sum(2)  # by how much the ball can turn each pair of logits
    wide = logits.gather(1, y[:, None]) - logits > reach[y]
    wide[torch.arange(200), y] = True
    right = torch.arange(200) >= 20
    assert torch.equal(standing["clean"], right)
    order = logits.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    expected = right
    for k, name in enumerate(pgd_by_class.TOWARDS):
        expected = expected & wide.gather(1, order[:, k : k + 1])[:, 0]
        assert torch.equal(standing[f"PGD-20 towards {name}"], expected)
    assert 0 < expected.sum() < right.sum()
    for name in pgd_by_class.ATTACKS:  # none finds what no ball holds
        assert (standing[name] >= (right & wide.all(1))).all() and standing[name].sum() < right.sum()


def test_a_run_is_measured_on_its_held_out_images(tmp_path, capsys):
    assert run_training(*tiny(tmp_path, "--method", "clean", "--epochs", "1")) == 0
    output = tmp_path / "figures.json"
    checkpoint = str(tmp_path / "run" / "latest.pt")
    assert pgd_by_class.main([checkpoint, "--n", "12", "--eps", "1", "--output", str(output)]) == 0
    (model,) = json.loads(output.read_text())["models"]
    accuracy = model["accuracy"]
    assert model["checkpoint"] == "run/latest.pt" and model["eps"] == "1/255"
    assert len(accuracy) == 2 + len(pgd_by_class.ATTACKS) + len(pgd_by_class.TOWARDS)
    assert all(0 <= share <= accuracy["clean"] for share in accuracy.values())
    assert "minimum_norm_attack, 20 passes" in capsys.readouterr().out
