"""The models in results/models: what lies beside them is of them, and they do on CIFAR-10 what it says."""

import re
from pathlib import Path

import pytest
import torch
from evaluations import cifar10_test

import eval as eval_script
import export
from data import to_input
from dyart.losses import TRAINING_STEPS
from dyart.margin import find_boundary
from evaluation.candidate import load_candidate, sha256
from storage.files import read_json

ROOT = Path(__file__).resolve().parents[1]
MODELS = sorted((ROOT / "results" / "models").glob("*.safetensors"))
pytestmark = pytest.mark.parametrize("path", MODELS, ids=[path.stem for path in MODELS])


def test_a_card_is_of_its_file(path):
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert path.stat().st_size <= 3_000_000
    assert f"SHA-256 {sha256(path)}" in text
    candidate = load_candidate(path)
    assert f"\n{export.train_command(candidate.settings)}\n" in text
    (record,) = read_json(path.with_suffix(".autoattack.json"))
    assert f"Taken from the {record['weights']} weights of `{record['checkpoint']}`, {record['sha256']}" in text
    assert export.figures_of([record])[-1] in text


def test_the_readme_says_what_was_measured(path):
    (record,) = read_json(path.with_suffix(".autoattack.json"))
    (row,) = re.findall(r"^\| \*\*the model\*\* .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert (record["version"], record["n"], record["images"], record["seed"]) == ("standard", 1000, "first", 0)
    assert (cells[0], cells[1]) == ("1,000", f"{100 * record['clean_accuracy']:.1f}")
    assert cells[-1] == f"{100 * record['robust_accuracy']:.1f}"


def test_attacked_again_it_is_as_accurate_as_its_record_says(path, tmp_path):
    cifar10_test()
    (expected,) = (record for record in read_json(Path(f"{path}.autoattack.json")) if record["n"] == 32)
    assert 0 < expected["robust_accuracy"] < expected["clean_accuracy"] < 1
    argv = [str(path), "--n", "32", "--batch-size", "32", "--version", expected["version"], "--device", "cpu"]
    assert eval_script.main([*argv, "--output-dir", str(tmp_path)]) == 0
    (found,) = read_json(tmp_path / f"{path.name}.autoattack.json")
    for name in ("sha256", "test_sha256", "eps", "version", "seed", "clean_accuracy", "robust_accuracy"):
        assert found[name] == expected[name], name


def test_margins_are_measured_within_three_percent_of_a_long_search(path):
    """By default, with one pass a step; by as many steps of training, further off than that."""
    test, model = cifar10_test(), load_candidate(path).model
    x, y = to_input(test.images[:48]), test.labels[:48]
    long = find_boundary(model, x, y, search="fab", steps=100, init_radius=0.0)
    assert long.found.sum() > 24
    mean = {}
    for steps in (None, TRAINING_STEPS["fast"]):
        boundary = find_boundary(model, x, y, steps=steps)
        assert torch.equal(boundary.found, long.found)
        mean[steps] = (boundary.margin / long.margin)[long.found].mean()
    assert mean[None] <= 1.03 and mean[None] < mean[TRAINING_STEPS["fast"]]


def test_the_readmes_example_measures_margins(path, capsys):
    test = cifar10_test()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(from data import.*?)```", text, re.DOTALL)
    assert path.name in code and len(code.replace("\n\n", "\n").splitlines()) <= 6
    exec(code.replace('"results/', f'"{ROOT}/results/'), {})
    with torch.no_grad():
        right = load_candidate(path).model(to_input(test.images[:8])).argmax(1) == test.labels[:8]
    printed = re.findall(r"[\d.]+", capsys.readouterr().out)
    assert [float(value) > 0 for value in printed[: len(right)]] == right.tolist()
