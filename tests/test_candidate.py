"""Checkpoint files as models: ours, whose settings may lie, those of others, and files that are none."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import SETTINGS, contents, new_model, two_checkpoints
from safetensors.torch import save_file

import eval as eval_script
from data import DATASETS
from evaluation.candidate import load_candidate
from experiment.checkpoint import save_checkpoint
from models import create_model
from storage.files import read_json

# Where others keep an average, beside the trained weights.
AVERAGES = [
    "state_dict_ema",
    "ema",
    "ema_state_dict",
    "model_ema",
    "averaged_model",
    "average",
    "swa_model",
    "wa_model",
]
THREE = {key: {"a.b": torch.zeros(2)} for key in ("state_dict", "ema", "swa_state")}
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
        *((lambda a, b, key=key: {"state_dict": b, key: a, "epoch": 3, "best_acc": 0.5}, None, 0) for key in AVERAGES),
        (lambda a, b: {"state_dict": b, "state_dict_ema": a}, "raw", 1),
        (lambda a, b: {"state_dict": b, "state_dict_ema": a}, "state_dict", 1),
        (lambda a, b: {"model": b, "model_ema": {"decay": 0.99, "module": a}}, None, 0),
        (lambda a, b: {"model": a, "optimizer": {"state": {0: {"step": torch.ones(())}}, "param_groups": []}}, None, 0),
        (lambda a, b: {"net": a, "settings": ["theirs"], "format": 7}, None, 0),
        (lambda a, b: {"state_dict": {f"module._orig_mod.{name}": value for name, value in a.items()}}, None, 0),
    ],
)
def test_checkpoints_of_others_give_the_logits_of_their_weights(tmp_path, wrap, weights, seed):
    torch.save(wrap(new_model(0).state_dict(), new_model(1).state_dict()), tmp_path / "other.pt")
    candidate = load_candidate(tmp_path / "other.pt", weights, GIVEN)
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
        (
            {"best_acc": 1.0, "args": {"lr": 0.1}},
            ["--model", "wrn-10-1"],
            "no set of weights (names to tensors) but best_acc",
        ),
        ({"a": torch.zeros(2)}, [], "say what it is with --model"),
        ({"a": torch.zeros(2)}, ["--model", "wrn-11-1"], "wrn-11-1"),
        ({"a": torch.zeros(2)}, ["--model", "wrn-10-1"], "do not fit this WideResNet"),
        *(
            (
                {"a.b": torch.zeros(2)},
                ["--model", "wrn-10-1", "--weights", name],
                f"--weights {name}: {{path}} is a single set of weights without a name: leave --weights out",
            )
            for name in ("raw", "net")
        ),
        ({}, ["--model", "wrn-10-1", "--weights", "raw"], "holds no set of weights (names to tensors) but nothing"),
        (
            {"unaveraged_model": {}},
            ["--model", "wrn-10-1"],
            "no set of weights (names to tensors) but unaveraged_model",
        ),
        (THREE, ["--model", "wrn-10-1"], "state_dict (raw), ema (average), swa_state (average): more than one could"),
        (THREE, ["--model", "wrn-10-1", "--weights", "average"], "more than one could be meant; name one"),
        (THREE, ["--model", "wrn-10-1", "--weights", "best"], "--weights best: "),
        ({"a": torch.zeros(2)}, ["--model", "wrn-10-1", "--checkpoint", "best.pt"], "is a checkpoint itself"),
    ],
)
def test_what_is_no_checkpoint_ends_in_one_line_and_is_left_alone(tmp_path, content, flags, message):
    path = tmp_path / "other.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message.format(path=path))) as error:
        eval_script.main([str(path), "--device", "cpu", *flags])
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before
    assert not Path("/tmp/hostile-checkpoint-ran").exists()


@pytest.mark.parametrize(
    ("content", "weights", "kind", "key"),
    [
        ({"state_dict": 0, "state_dict_ema": 1}, None, "average", "state_dict_ema"),
        ({"state_dict": 0, "state_dict_ema": 1}, "raw", "raw", "state_dict"),
        ({"state_dict": 0}, None, "only", "state_dict"),
        ({"model_state_dict": 0}, "average", "only", "model_state_dict"),
        ({"model_state_dict": 0, "unaveraged_model_state_dict": 1}, None, "average", "model_state_dict"),
        ({"a": 0, "b": 1}, "b", "raw", "b"),
    ],
)
def test_what_was_taken_is_recorded_by_its_name(tmp_path, content, weights, kind, key):
    torch.save({name: new_model(seed).state_dict() for name, seed in content.items()}, tmp_path / "other.pt")
    identity = load_candidate(tmp_path / "other.pt", weights, GIVEN).identity
    assert (identity["weights"], identity["weights_key"]) == (kind, key)


MEAN, STD = [0.5, 0.4, 0.3], [0.2023, 0.1994, 0.2010]


@pytest.mark.parametrize("model", ["wrn-10-1-swish", "wrn-10-1"])
def test_a_files_own_statistics_are_its_models_and_are_recorded(tmp_path, model):
    torch.manual_seed(0)
    theirs = create_model(model, mean=MEAN, std=STD, normalize=True).eval()
    statistics = {"mean": torch.tensor(MEAN).view(1, 3, 1, 1), "std": torch.tensor(STD).view(1, 3, 1, 1)}
    torch.save({"state_dict": statistics | theirs.state_dict()}, tmp_path / "other.pt")
    candidate = load_candidate(tmp_path / "other.pt", None, {"model": model})
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(candidate.model(x), theirs(x))
    assert candidate.identity["normalize"] is True
    assert [candidate.identity[name] for name in ("mean", "std")] == [pytest.approx(MEAN), pytest.approx(STD)]
    for wrong in ({"normalize": False}, {"std": [0.2471, 0.2435, 0.2616]}):
        with pytest.raises(ValueError, match="the weights expect"):
            load_candidate(tmp_path / "other.pt", None, {"model": model, **wrong})


@pytest.mark.parametrize(
    ("given", "built"),
    [
        ({"normalize": False}, {"normalize": False}),
        ({"mean": MEAN, "std": STD}, {"mean": MEAN, "std": STD}),
        ({"std": STD}, {"mean": DATASETS["cifar10"].mean, "std": STD}),
        ({}, {"mean": DATASETS["cifar10"].mean, "std": DATASETS["cifar10"].std}),
    ],
)
def test_flags_set_the_normalization_of_a_file_that_does_not_say(tmp_path, given, built):
    torch.manual_seed(0)
    theirs = create_model("wrn-10-1-swish", **built).eval()
    torch.save(theirs.state_dict(), tmp_path / "other.pt")
    candidate = load_candidate(tmp_path / "other.pt", None, {"model": "wrn-10-1-swish", **given})
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(candidate.model(x), theirs(x), rtol=0, atol=0)
    assert candidate.identity["normalize"] is built.get("normalize", True)
    assert candidate.identity["std"] == (None if given.get("normalize") is False else list(built["std"]))


def test_safetensors_are_evaluated_as_any_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(new_model(0).state_dict(), path)
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(load_candidate(path, None, GIVEN).model(x), new_model(0)(x), rtol=0, atol=0)
    given = ["--model", "wrn-10-1-swish", "--dataset", "digits", "--n", "2", "--eps", "20", "--version", "custom"]
    assert eval_script.main([str(path), "--device", "cpu", *given]) == 0
    (record,) = read_json(tmp_path / "model.safetensors.autoattack.json")
    assert (record["checkpoint"], record["weights"], record["n"]) == ("model.safetensors", "only", 2)


def test_a_file_of_ours_is_not_taken_for_another_model(tmp_path):
    folder = two_checkpoints(tmp_path)
    info = DATASETS["digits"]
    settings = SETTINGS | {"normalize": True, "mean": list(info.mean), "std": list(info.std)}
    save_checkpoint(tmp_path / "now.pt", {"settings": settings, "average": new_model(0).state_dict()})
    for path, given, message in [
        (folder / "best.pt", {"model": "wrn-10-1"}, "--model wrn-10-1: .*was trained with --model wrn-10-1-swish"),
        (tmp_path / "now.pt", {"normalize": False}, "--normalize false: .*was trained with --normalize true"),
        (
            folder / "best.pt",
            {"std": STD, "group_norm": True},
            "--group-norm true --std 0.2023,.*trained with --group-norm false --std 0.32",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            load_candidate(path, None, given)


def test_a_swish_model_of_before_the_statistics_were_settings_normalizes(tmp_path):
    candidate = load_candidate(two_checkpoints(tmp_path) / "best.pt")
    assert candidate.identity["normalize"] is True
    assert candidate.identity["mean"] == list(DATASETS["digits"].mean)
    torch.testing.assert_close(candidate.model(torch.ones(1, 3, 32, 32)), new_model(1)(torch.ones(1, 3, 32, 32)))


@pytest.mark.parametrize("kept", [False, True])
def test_normalize_false_of_a_swish_folder_of_before_is_no_contradiction(tmp_path, caplog, kept):
    """Its args.yaml has what was given then, and a Swish model normalized all the same; so it does, with a warning."""
    settings = SETTINGS | {"normalize": kept}
    save_checkpoint(tmp_path / "old.pt", {"settings": settings, "average": new_model(1).state_dict()})
    candidate = load_candidate(tmp_path / "old.pt", None, {"normalize": False})
    assert candidate.identity["normalize"] is True
    torch.testing.assert_close(candidate.model(torch.ones(1, 3, 32, 32)), new_model(1)(torch.ones(1, 3, 32, 32)))
    (line,) = caplog.messages
    assert line == f"--normalize false: Swish models normalize, as in the released code ({tmp_path / 'old.pt'})"
    with pytest.raises(ValueError, match=r"--std 0\.2023"):
        load_candidate(tmp_path / "old.pt", None, {"std": STD})


@pytest.mark.parametrize(
    ("model", "given", "lines"), [("wrn-10-1-swish", False, 1), ("wrn-10-1-swish", None, 0), ("wrn-10-1", False, 0)]
)
def test_a_swish_model_of_others_that_is_not_to_normalize_is_warned_of(tmp_path, caplog, model, given, lines):
    torch.save(create_model(model, normalize=False).state_dict(), tmp_path / "other.pt")
    candidate = load_candidate(tmp_path / "other.pt", None, {"model": model, "normalize": given})
    assert candidate.identity["normalize"] is (given is None)
    assert len(caplog.messages) == lines
    assert all(f"--normalize false: {tmp_path / 'other.pt'} is" in line for line in caplog.messages)
