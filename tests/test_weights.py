"""Whose weights and whose model: what --pretrained takes, and what it refuses because the file says what it is."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import files, refusal, run_training, tiny
from torch import nn

from experiment.build import build_model
from experiment.checkpoint import save_checkpoint
from experiment.settings import resolve
from experiment.train_flags import parse
from experiment.weights import load_pretrained
from models import create_model


def settings(*argv: str) -> dict[str, Any]:
    return resolve(parse(["--dataset", "digits", "--model", "wrn-10-1-swish", *argv]))


def model_of(seed: int, *argv: str) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(settings(*argv))


def same(model: nn.Module, other: nn.Module) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    ("of_file", "wanted", "differ"),
    [
        ("", "--model wrn-10-1", "--model wrn-10-1 --normalize false .*was trained with --model wrn-10-1-swish"),
        (
            "--model wrn-10-1 --normalize",
            "--normalize false",
            "--normalize false --mean none .*--normalize true --mean 0.3",
        ),
        ("", "--dataset cifar10", "--dataset cifar10 --mean 0.49.*was trained with --dataset digits --mean 0.30"),
        ("", "--std 0.2,0.2,0.2", "--std 0.2,0.2,0.2: .*was trained with --std 0.32"),
        ("", "--group-norm", "--group-norm true: .*was trained with --group-norm false"),
    ],
)
@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_file_of_ours_is_not_taken_for_another_model_or_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], of_file: str, wanted: str, differ: str, form: str
) -> None:
    assert run_training(*tiny(tmp_path, "--method", "clean", "--epochs", "1", *of_file.split())) == 0
    source = tmp_path / "run" / ("latest.pt" if form == "file" else "")
    before = files(tmp_path)
    argv = tiny(tmp_path, "--name", "next", "--pretrained", str(source), *of_file.split(), *wanted.split())
    error = refusal(capsys, *argv)
    assert re.search(differ, error), error
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "weights", "seed"),
    [
        ({"state_dict": 0, "state_dict_ema": 1}, None, 1),
        ({"state_dict": 0, "ema": 1, "epoch": 3}, None, 1),
        ({"state_dict": 0, "ema": 1}, "raw", 0),
        ({"state_dict": 0, "ema": 1}, "state_dict", 0),
        ({"model": 0}, None, 0),
        ({"first": 0, "second": 1}, "second", 1),
    ],
)
def test_pretrained_knows_the_names_and_the_choice_that_eval_knows(
    tmp_path: Path, content: dict[str, Any], weights: str | None, seed: int
) -> None:
    state = {key: model_of(s).state_dict() if type(s) is int and key != "epoch" else s for key, s in content.items()}
    torch.save(state, tmp_path / "other.pt")
    choice = [] if weights is None else ["--weights", weights]
    model = model_of(7)
    load_pretrained(model, settings("--pretrained", str(tmp_path / "other.pt"), *choice))
    assert same(model, model_of(seed))


def test_pretrained_refuses_what_cannot_be_told(tmp_path: Path) -> None:
    torch.save({"first": model_of(0).state_dict(), "second": model_of(1).state_dict()}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt holds first \(raw\), second \(raw\): more than one could be meant"):
        load_pretrained(model_of(7), settings("--pretrained", str(tmp_path / "other.pt")))


def test_pretrained_refuses_others_statistics_and_takes_them_by_flag(tmp_path: Path) -> None:
    mean, std = [0.5, 0.4, 0.3], [0.2023, 0.1994, 0.2010]
    theirs = create_model("wrn-10-1-swish", mean=mean, std=std)
    torch.save({"mean": torch.tensor(mean), "std": torch.tensor(std), **theirs.state_dict()}, tmp_path / "other.pt")
    wanted = ["--pretrained", str(tmp_path / "other.pt")]
    with pytest.raises(ValueError, match=r"the weights expect input of mean 0.5000, 0.4000, 0.3000, .*--mean"):
        load_pretrained(model_of(7), settings(*wanted))
    flags = ["--mean", "0.5,0.4,0.3", "--std", "0.2023,0.1994,0.201"]
    model = model_of(7, *flags)
    load_pretrained(model, settings(*wanted, *flags))
    assert same(model, theirs)


def test_a_burn_in_of_before_the_statistics_were_settings(tmp_path: Path) -> None:
    old = {"dataset": "digits", "model": "wrn-10-1-swish", "group_norm": False, "normalize": False}
    save_checkpoint(tmp_path / "burn_in.pt", {"settings": old, "average": model_of(1).state_dict()})
    model = model_of(7)
    load_pretrained(model, settings("--pretrained", str(tmp_path / "burn_in.pt")))
    assert same(model, model_of(1))
