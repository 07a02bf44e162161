"""evaluation/attack.py: AutoAttack's figures are those of one straight run, however often it was interrupted.

With DYART_LARGE_TESTS=1: 1,000 mutated result files instead of 50.
"""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import (
    CPU,
    Rough,
    ShortAutoAttack,
    Stairs,
    digits,
    evaluate,
    figures,
    identity,
    learn_digits,
    raise_interrupt,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyautoattack import AutoAttack
from pyautoattack.state import EvaluationState
from torch import Tensor, nn

from data import Split, to_input
from evaluation import attack, results
from evaluation.attack import VERSIONS
from evaluation.environment import versions
from evaluation.results import Results

LARGE = os.environ.get("DYART_LARGE_TESTS") == "1"


@pytest.fixture(autouse=True)
def short_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack, "AutoAttack", ShortAutoAttack)


@pytest.fixture(name="digits")
def the_digits() -> Split:
    return digits()


@pytest.fixture
def toy() -> nn.Module:
    return learn_digits(Rough)


# --- The figures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "norm", "text", "effective"),
    [
        (Rough, "Linf", "20", ["apgd-ce", "apgd-t", "fab-t"]),
        (Rough, "L2", "3.5", ["apgd-ce", "apgd-t", "fab-t"]),
        (Stairs, "Linf", "16", ["square"]),
    ],
)
def test_the_figures_are_those_of_one_straight_run_of_autoattack(
    digits, tmp_path, caplog, monkeypatch, first, norm, text, effective
):
    monkeypatch.setattr(ShortAutoAttack, "queries", 200)
    model = learn_digits(first)
    record = evaluate(model, digits, tmp_path, norm=norm, text=text, n=60, batch_size=16)

    x, y = to_input(digits.images[:60]), digits.labels[:60]
    straight = ShortAutoAttack(model, norm=norm, eps=record["eps"], seed=3, version="standard")
    with caplog.at_level(logging.DEBUG, logger="auto-attack"):
        _, predicted = straight.run_standard_evaluation(x, y, batch_size=16)
    lines = re.findall(r"(?:initial|robust) accuracy(?: after (\S+))?: ([0-9.]+)%", caplog.text)
    expected = {name.lower() or "clean": percent for name, percent in lines[:5]}

    assert list(expected) == ["clean", *VERSIONS["standard"]]
    mine = {"clean": record["clean_accuracy"], **record["robust_accuracy_after"]}
    assert {name: f"{100 * value:.2f}" for name, value in mine.items()} == expected
    assert record["robust_accuracy"] == pytest.approx((predicted == y).float().mean().item())
    # Otherwise the comparison would say little: there is something to find, and something left.
    steps = list(mine.values())
    for name in effective:
        assert mine[name] < steps[list(mine).index(name) - 1]
    assert record["robust_accuracy"] > 0


def test_the_settings_are_those_of_the_standard_version(toy):
    ours = attack.autoattack(toy, norm="Linf", eps=0.1, seed=0, num_classes=10, device="cpu")
    standard = AutoAttack(toy, norm="Linf", eps=0.1, seed=0, version="standard")
    for part in ("apgd", "apgd_targeted", "fab", "square"):
        mine, theirs = vars(getattr(ours, part)), vars(getattr(standard, part))
        shortened = ("n_iter", "n_queries")
        assert {k: v for k, v in mine.items() if k not in shortened} == {
            k: v for k, v in theirs.items() if k not in shortened
        }
    assert ours.attacks_to_run == standard.attacks_to_run == VERSIONS["standard"]
    assert set(standard.attacks_to_run) - set(VERSIONS["custom"]) == {"square"}


@pytest.mark.parametrize("classes", [4, 6])
def test_fewer_than_ten_classes_have_fewer_targets(classes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, classes)).requires_grad_(False)
    x = torch.rand(20, 3, 4, 4)
    y = model(x).argmax(dim=1)
    attacker = attack.autoattack(model, norm="Linf", eps=1e-6, seed=0, num_classes=classes, device="cpu")
    for name in ("apgd-t", "fab-t"):
        attacker.attacks_to_run = [name]
        _, predicted = attacker.run_standard_evaluation(x, y)
        assert (predicted == y).all()
    with pytest.raises(ValueError, match="3 classes: AutoAttack's targeted APGD needs at least 4"):
        attack.autoattack(model, norm="Linf", eps=0.1, seed=0, num_classes=3, device="cpu")


def test_a_model_that_nothing_withstands_is_evaluated_to_zero(toy, digits, tmp_path):
    record = evaluate(toy, digits, tmp_path, text="255", n=10)
    assert record["robust_accuracy"] == 0
    assert list(record["robust_accuracy_after"]) == VERSIONS["standard"]


def test_what_autoattack_warns_of_is_kept_once(digits, tmp_path):
    class Dead(nn.Module):
        """Constant in its input: the targeted attacks find zero gradients, which AutoAttack warns of."""

        def forward(self, x: Tensor) -> Tensor:
            return 0 * x.flatten(1)[:, :10] + torch.arange(10.0)

    test = Split(digits.images[:20], torch.full((20,), 9))
    messages: list[str] = []
    kept = Results(tmp_path / "autoattack")
    record = attack.evaluate(Dead(), test, identity(n=20), kept, CPU, messages.append)
    assert [w for w in record["warnings"] if "zero gradient" in w] == [record["warnings"][0]]
    assert sum("zero gradient" in message for message in messages) == 1


# --- Interruptions ----------------------------------------------------------------------------------------------------


def test_pyautoattacks_own_state_cannot_be_restored(toy, digits, tmp_path):
    """Why evaluate keeps its own. When this fails, pyautoattack has been mended."""
    state = EvaluationState({"apgd-ce"}, path=tmp_path / "state.json")
    state.robust_flags = torch.ones(4, dtype=torch.bool)
    assert EvaluationState.from_disk(tmp_path / "state.json").attacks_to_run == "{'apgd-ce'}"
    attacker = AutoAttack(toy, version="custom", attacks=["apgd-ce"], seed=0)
    with pytest.raises(ValueError, match="different set of attacks"):
        attacker.run_standard_evaluation(
            to_input(digits.images[:4]), digits.labels[:4], state_path=tmp_path / "state.json"
        )


def test_an_evaluation_cut_at_any_write_goes_on_to_the_same_record(toy, digits, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    whole = evaluate(toy, digits, tmp_path / "whole", n=20)
    write, writes = results.write_json, 0

    def counted(path: Path, value: Any) -> None:
        nonlocal writes
        writes += 1
        write(path, value)
        if writes == cut:
            raise KeyboardInterrupt

    monkeypatch.setattr(results, "write_json", counted)
    for cut in range(1, 1000):
        writes = 0
        folder = tmp_path / str(cut)
        folder.mkdir()
        try:
            evaluate(toy, digits, folder, n=20)
        except KeyboardInterrupt:
            assert figures(evaluate(toy, digits, folder, n=20)) == figures(whole)
            assert not (folder / "autoattack.unfinished.json").exists()
            assert [figures(record) for record in json.loads((folder / "autoattack.json").read_text())] == [
                figures(whole)
            ]
        else:
            break
    # The clean images; three batches at first; the end of three attacks; the record.
    assert cut > 1 + 3 + 3 + 1


def test_going_on_repeats_no_batch_and_says_so(toy, digits, tmp_path, monkeypatch):
    run, calls, limit = ShortAutoAttack.run_standard_evaluation, [], [1000]

    def counted(self: AutoAttack, x: Tensor, y: Tensor, *, batch_size: int) -> Any:
        if len(calls) == limit[0]:
            raise KeyboardInterrupt
        calls.append((self.attacks_to_run[0], batch_size))
        return run(self, x, y, batch_size=batch_size)

    monkeypatch.setattr(ShortAutoAttack, "run_standard_evaluation", counted)
    (tmp_path / "straight").mkdir()
    evaluate(toy, digits, tmp_path / "straight")
    straight, calls[:] = list(calls), []

    limit[0] = 5
    with pytest.raises(KeyboardInterrupt):
        evaluate(toy, digits, tmp_path)
    limit[0] = 1000
    messages: list[str] = []
    kept = Results(tmp_path / "autoattack")
    attack.evaluate(toy, digits, identity(), kept, CPU, messages.append)
    assert calls == straight
    assert "interrupted before, going on after batch 1 of apgd-t" in messages[0]


def test_what_another_device_or_package_began_is_begun_again(toy, digits, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(attack, "versions", lambda: {"torch": "1.0"})
        patch.setattr(ShortAutoAttack, "run_standard_evaluation", raise_interrupt)
        evaluate(toy, digits, tmp_path, n=10)
    messages: list[str] = []
    kept = Results(tmp_path / "autoattack")
    record = attack.evaluate(toy, digits, identity(n=10), kept, CPU, messages.append)
    assert "of another device or other packages; starting again" in messages[0]
    assert record["versions"] == versions()


@given(data=st.data())
@settings(
    max_examples=1000 if LARGE else 50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_mutated_progress_is_refused_or_gone_on_with_and_never_a_traceback(toy, digits, tmp_path, monkeypatch, data):
    monkeypatch.setattr(ShortAutoAttack, "run_standard_evaluation", lambda self, x, y, *, batch_size: (x, y))
    path = tmp_path / "autoattack.unfinished.json"
    progress = {"robust": "1" * 20, "batches": 1, "broken": [3], "robust_accuracy_after": {"apgd-ce": 1.0}}
    environment = {"device": "cpu", "versions": versions()}
    record = identity(n=20) | {"test_size": 400, "clean_accuracy": 1.0, "seconds": {"apgd-ce": 1.0}, "warnings": []}
    record |= {"date": "", **environment, **progress}
    simple = st.none() | st.booleans() | st.integers(-5, 50) | st.floats() | st.text(max_size=3) | st.just("1" * 20)
    value = simple | st.lists(simple, max_size=3) | st.dictionaries(st.sampled_from(["apgd-t", "fab-t", "x"]), simple)
    name = data.draw(st.sampled_from([name for name in record if name not in environment]))
    mutated = json.dumps([record | {name: data.draw(value)}])
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(mutated)))
        mutated = mutated[:cut] + data.draw(st.sampled_from(["", "[", "}", "\x00", "7"])) + mutated[cut + 1 :]
    path.write_text(mutated)
    (tmp_path / "autoattack.json").unlink(missing_ok=True)
    try:
        evaluate(toy, digits, tmp_path, n=20)
    except ValueError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        assert path.read_text() == mutated
