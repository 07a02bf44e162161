"""Records: what is kept, what is replaced, what a crash may leave, and files that hold no records."""

import json
from pathlib import Path
from typing import Any

import pytest
from evaluations import (
    Rough,
    ShortAutoAttack,
    contents,
    digits,
    evaluate,
    identity,
    learn_digits,
    raise_interrupt,
    two_checkpoints,
)
from torch import nn

import eval as eval_script
from data import DATASETS, Split
from evaluation import attack, results
from evaluation.results import Results


@pytest.fixture(autouse=True)
def short_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack, "AutoAttack", ShortAutoAttack)


@pytest.fixture(name="digits")
def the_digits() -> Split:
    return digits()


@pytest.fixture
def toy() -> nn.Module:
    return learn_digits(Rough)


def test_a_changed_checkpoint_gets_a_record_beside_the_old_one_and_its_progress_goes(
    toy, digits, tmp_path, monkeypatch
):
    old = evaluate(toy, digits, tmp_path, n=5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShortAutoAttack, "run_standard_evaluation", raise_interrupt)
        evaluate(toy, digits, tmp_path, n=10)
    new = evaluate(toy, digits, tmp_path, n=5, sha256="1" * 64)
    assert json.loads((tmp_path / "autoattack.json").read_text()) == [old, new]
    assert not (tmp_path / "autoattack.unfinished.json").exists()


def test_progress_that_a_crash_left_beside_its_finished_record_is_void(toy, digits, tmp_path, monkeypatch):
    write = results.write_json

    def crash_after_the_record(path: Path, value: Any) -> None:
        write(path, value)
        if path.name == "autoattack.json":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(results, "write_json", crash_after_the_record)
        evaluate(toy, digits, tmp_path, n=10)
    assert json.loads((tmp_path / "autoattack.unfinished.json").read_text()) != []
    assert Results(tmp_path / "autoattack").unfinished(identity(n=10)) is None


def test_what_is_unfinished_of_another_evaluation_stays(toy, digits, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShortAutoAttack, "run_standard_evaluation", raise_interrupt)
        evaluate(toy, digits, tmp_path, n=10)
    evaluate(toy, digits, tmp_path, n=5)
    assert Results(tmp_path / "autoattack").unfinished(identity(n=10)) is not None


@pytest.mark.parametrize("text", ["", "{", '{"a": 1}', "[1]", '[{"checkpoint": "best.pt"}]'])
def test_damaged_results_are_refused_and_left_alone(tmp_path, text):
    folder = two_checkpoints(tmp_path)
    (folder / "autoattack.json").write_text(text)
    before = contents(folder)
    with pytest.raises(ValueError, match=r"autoattack\.json: [^\n]+$"):
        eval_script.main([str(folder), "--n", "1", "--device", "cpu"])
    assert contents(folder) == before


def test_other_test_images_are_another_evaluation(tmp_path, toy, digits):
    """Also where an evaluation was interrupted: nothing of it goes on with the others."""
    store = Results(tmp_path / "autoattack")
    evaluate(toy, digits, tmp_path, test_sha256="1" * 64)
    record = Results(tmp_path / "autoattack").records[0]
    store = Results(tmp_path / "autoattack")
    assert store.finished(identity(test_sha256="1" * 64)) == record
    assert store.finished(identity(test_sha256="2" * 64)) is None
    store.save({**identity(test_sha256="1" * 64), "date": "now"})
    assert store.unfinished(identity(test_sha256="1" * 64)) is not None
    assert store.unfinished(identity(test_sha256="2" * 64)) is None
    assert store.changed(identity(test_sha256="2" * 64)) == ["other test images"] and not store.changed(identity(n=7))
    # What is found on the new images takes the place of what was unfinished, and of the record for those who read it.
    store.save({**identity(test_sha256="2" * 64), "date": "now"})
    assert store.unfinished(identity(test_sha256="1" * 64)) is None
    newer = {**record, "test_sha256": "2" * 64}
    store.finish(newer)
    assert store.records == [record, newer] and store.current == [newer]


@pytest.mark.parametrize(
    ("now", "same"),
    [
        ({}, True),
        ({"test_sha256": "1" * 64, "weights_key": "average", "images": "first"}, True),
        ({"mean": None, "std": None}, True),
        ({"normalize": True, "mean": [0.5] * 3, "std": [0.25] * 3}, False),
        ({"weights_key": "wa_model"}, True),
        ({"weights_key": "ema"}, False),  # which earlier versions did not look for
        ({"images": "balanced"}, False),
        ({"seed": 4}, False),
        ({"sha256": "1" * 64}, False),
    ],
)
def test_records_of_before_are_of_the_same_evaluation_in_what_they_say(now, same):
    assert results.same_identity(identity(), identity() | now) is same
    assert results.same_identity(identity() | now, identity()) is same


@pytest.mark.parametrize(
    ("model", "normalized"), [("wrn-10-1-swish", False), ("wrn-10-1-swish", True), ("wrn-10-1", True)]
)
def test_what_records_of_before_normalized_by_is_known(model, normalized):
    """The Swish models normalized whatever the record says, by the statistics of the dataset."""
    info = DATASETS["digits"]
    before = identity(model=model, normalize=normalized)
    now = before | {"normalize": True, "mean": list(info.mean), "std": list(info.std)}
    assert results.same_identity(before, now) and results.same_identity(now, before)
    others = {"std": [0.2] * 3}, {"mean": [0.5] * 3}, {"normalize": False, "mean": None, "std": None}
    for other in others:
        assert not results.same_identity(before, now | other)
        assert not results.same_identity(now | other, before)


@pytest.mark.parametrize(
    ("kind", "key", "other"),
    [
        ("average", "average", "swa_model"),
        ("raw", "model", "net"),
        ("only", "", "net"),
        ("only", "state_dict", "model"),
    ],
)
def test_a_record_of_before_is_of_the_weights_that_were_looked_for_then(kind, key, other):
    before = identity(weights=kind)
    for one, same in ((key, True), (other, False)):
        assert results.same_identity(before, before | {"weights_key": one}) is same
        assert results.same_identity(before | {"weights_key": one}, before) is same


def test_statistics_and_names_tell_evaluations_apart():
    whole = identity(mean=[0.5] * 3, std=[0.25] * 3, weights_key="ema", images="first", test_sha256="1" * 64)
    assert results.same_identity(whole, dict(whole))
    for other in ({"std": [0.2] * 3}, {"weights_key": "model"}, {"normalize": True}, {"test_sha256": "2" * 64}):
        assert not results.same_identity(whole, whole | other)
