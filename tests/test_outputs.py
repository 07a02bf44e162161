"""Outputs that are no numbers are refused wherever predictions are counted, not taken for class 0."""

import math
import re

import pytest
import torch
from evaluations import digits, evaluate, learn_digits, new_model
from runs import refusal, run_training, tiny
from torch import nn

import analyze
import eval as eval_script
from experiment.checkpoint import save_checkpoint
from models.outputs import check_finite_outputs, finite_outputs


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_output_of_one_image_is_seen(bad):
    logits = torch.zeros(5, 10)
    check_finite_outputs(logits, "here")
    logits[3, 7] = bad
    with pytest.raises(ValueError, match="^here: the model's outputs are not finite for 1 of 5 images, .* no. 3 of"):
        check_finite_outputs(logits, "here")


def test_every_pass_is_looked_at_and_none_afterwards():
    model = nn.Linear(2, 3)
    bad = torch.tensor([[0.0, math.inf]])
    with pytest.raises(ValueError, match="^here: "), finite_outputs(model, "here"):
        model(torch.zeros(1, 2))
        model(bad)
    model(bad)


class BadBeyond(nn.Module):
    """NaN where a pixel leaves the values that `images` have: only attacks get there."""

    def __init__(self, model: nn.Module, images: torch.Tensor):
        super().__init__()
        self.model = model
        self.register_buffer("known", torch.unique(images))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        strange = ~torch.isin((255 * x).round().to(torch.uint8), self.known).flatten(1).any(1)
        strange |= ((255 * x) % 1 > 1e-3).flatten(1).any(1) & ((255 * x) % 1 < 1 - 1e-3).flatten(1).any(1)
        return torch.where(strange[:, None], math.nan, self.model(x))


def test_outputs_that_only_an_attack_makes_bad_end_the_evaluation(tmp_path):
    model = BadBeyond(learn_digits(nn.Identity), digits().images)
    with pytest.raises(ValueError, match="best.pt Linf 20/255: the model's outputs are not finite"):
        evaluate(model, digits(), tmp_path)
    assert not (tmp_path / "autoattack.json").exists()


@pytest.mark.parametrize("script", ["eval", "analyze"])
def test_a_negative_running_variance_is_no_accuracy_of_ten_percent(tmp_path, capsys, script):
    state = new_model(0).state_dict()
    state["batchnorm.running_var"][5] = -1
    torch.save(state, tmp_path / "broken.pth")
    argv = [str(tmp_path / "broken.pth"), "--model", "wrn-10-1-swish", "--dataset", "digits", "--device", "cpu"]
    argv += ["--n", "8"] if script == "eval" else ["--examples", "8"]
    error = refusal(capsys, *argv, main={"eval": eval_script, "analyze": analyze}[script].main)
    assert re.search(r"outputs are not finite for \d+ of \d+ images", error)


def test_validation_that_is_not_finite_stops_the_run(tmp_path, capsys):
    """Weights that are finite, with outputs that are not: nothing is saved as the best."""
    state = new_model(0).state_dict()
    state["batchnorm.weight"][:] = state["logits.weight"][:] = 1e25
    save_checkpoint(tmp_path / "start.pt", {"average": state})
    argv = tiny(tmp_path, "--method", "clean", "--pretrained", str(tmp_path / "start.pt"), "--lr", "1e-30")
    assert run_training(*argv) == 1
    log = (tmp_path / "run" / "train.log").read_text()
    assert re.search("stopped: validation of epoch 1: the model's outputs are not finite .*no good checkpoint yet", log)
    assert not (tmp_path / "run" / "best.pt").exists()
