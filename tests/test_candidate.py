"""Checkpoint files as models: ours, whose settings may lie, those of others, and files that are none."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import SETTINGS, contents, new_model, two_checkpoints

import eval as eval_script
from evaluation.candidate import load_candidate
from experiment.checkpoint import save_checkpoint

GIVEN = {"model": "wrn-10-1-swish", "dataset": "digits", "group_norm": None, "normalize": None}


@pytest.mark.parametrize(
    ("wrap", "weights", "seed"),
    [
        (lambda a, b: a, "average", 0),
        (lambda a, b: {f"module.{name}": value for name, value in a.items()}, "average", 0),
        (lambda a, b: {f"module.0.{name}": value for name, value in a.items()}, "average", 0),
        (lambda a, b: {"state_dict": a}, "average", 0),
        (lambda a, b: {"wa_model": a, "unaveraged_model": b, "epoch": 3}, "average", 0),
        (lambda a, b: {"wa_model": a, "unaveraged_model": b, "epoch": 3}, "raw", 1),
        (lambda a, b: {"model_state_dict": a, "unaveraged_model_state_dict": b}, "average", 0),
        (lambda a, b: {"model_state_dict": a, "unaveraged_model_state_dict": b}, "raw", 1),
    ],
)
def test_checkpoints_of_others_give_the_logits_of_their_weights(tmp_path, wrap, weights, seed):
    torch.save(wrap(new_model(0).state_dict(), new_model(1).state_dict()), tmp_path / "other.pt")
    candidate = load_candidate(tmp_path / "other.pt", weights, GIVEN, print)
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(candidate.model(x), new_model(seed)(x), rtol=0, atol=0)
    assert not candidate.model.training
    assert not any(parameter.requires_grad for parameter in candidate.model.parameters())


@pytest.mark.parametrize(
    "change", [{"model": 7}, {"dataset": "svhn"}, {"dataset": None}, {"model": "wrn-16-1-swish"}, None]
)
def test_checkpoints_whose_settings_lie(tmp_path, change):
    folder = two_checkpoints(tmp_path)
    weights = {"average": new_model(0).state_dict(), "model": new_model(0).state_dict()}
    lies = [] if change is None else {k: v for k, v in (SETTINGS | change).items() if v is not None}
    save_checkpoint(folder / "best.pt", {"settings": lies, **weights})
    with pytest.raises(ValueError, match=r"best\.pt: [^\n]+$"):
        eval_script.main([str(folder), "--n", "1", "--device", "cpu"])
    assert not (folder / "autoattack.json").exists()


class _Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/hostile-checkpoint-ran",)


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (b"", ["--model", "wrn-10-1"], "not a checkpoint"),
        (b"hello", ["--model", "wrn-10-1"], "not a checkpoint"),
        (_Hostile(), ["--model", "wrn-10-1"], "refused: it names posix.system"),
        ([1, 2], ["--model", "wrn-10-1"], "not a checkpoint"),
        ({}, ["--model", "wrn-10-1"], "the state dict is empty"),
        ({"a": torch.zeros(2)}, [], "say what it is with --model"),
        ({"a": torch.zeros(2)}, ["--model", "wrn-11-1"], "wrn-11-1"),
        ({"a": torch.zeros(2)}, ["--model", "wrn-10-1"], "do not fit this WideResNet"),
        ({"a": torch.zeros(2)}, ["--model", "wrn-10-1", "--weights", "raw"], "--weights raw: "),
        ({"unaveraged_model": {}}, ["--model", "wrn-10-1"], "--weights average: "),
        ({"a": torch.zeros(2)}, ["--model", "wrn-10-1", "--checkpoint", "best.pt"], "is a checkpoint itself"),
    ],
)
def test_what_is_no_checkpoint_ends_in_one_line_and_is_left_alone(tmp_path, content, flags, message):
    path = tmp_path / "other.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        eval_script.main([str(path), "--device", "cpu", *flags])
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before
    assert not Path("/tmp/hostile-checkpoint-ran").exists()
