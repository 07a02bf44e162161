"""Exported weights as RobustBench loads them, and the claim beside them."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from evaluations import two_checkpoints
from runs import refusal
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import analyze
import eval as eval_script
import export
from analysis.subject import load_subject
from evaluation.candidate import load_candidate, sha256
from experiment import settings, train_flags
from experiment.build import build_model
from experiment.folder import Experiment
from models import create_model
from storage.files import FileError

ROOT = Path(__file__).parents[1]
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
MODEL = "wrn-16-1-swish"


def run_settings(*argv: str) -> dict[str, Any]:
    given = train_flags.parse(["--dataset", "cifar10", "--model", MODEL, "--method", "at", "--device", "cpu", *argv])
    return settings.resolve(given)


def new_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = create_model(MODEL)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and "running" in name:
            buffer.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    values = run_settings()
    with Experiment.create(tmp_path, "run", values, echo=lambda message: None) as experiment:
        weights = {"average": new_model(0).state_dict(), "model": new_model(1).state_dict()}
        experiment.save_best({"settings": values, "epoch": 3, **weights})
    return experiment.folder


def add_record(folder: Path, **changes: Any) -> dict[str, Any]:
    """A record such as eval.py writes, of the folder's best.pt."""
    path = folder / "autoattack.json"
    record = {"dataset": "cifar10", "model": MODEL, "group_norm": False, "normalize": False, "checkpoint": "best.pt"}
    record |= {"sha256": sha256(folder / "best.pt"), "weights": "average", "norm": "Linf", "eps": 8 / 255}
    record |= {"eps_text": "8/255", "version": "standard", "n": 10000, "seed": 0, "batch_size": 250}
    record |= {"test_size": 10000, "clean_accuracy": 0.9369, "robust_accuracy": 0.6389, "date": "", **changes}
    path.write_text(json.dumps([*(json.loads(path.read_text()) if path.exists() else []), record]))
    return record


def robustbench_names() -> list[str]:
    """The state dict of RobustBench 1.1.1's DMWideResNet(depth=16, width=1), in order."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = ["init_conv.weight"]
    for group in range(3):
        for block in range(2):
            where = f"layer.{group}.block.{block}"
            for part in range(2):
                names += [f"{where}.batchnorm_{part}.{name}" for name in norm] + [f"{where}.conv_{part}.weight"]
            # With width 1 the first group keeps its 16 channels, and needs no shortcut.
            names += [f"{where}.shortcut.weight"] * (block == 0 and group > 0)
    return [*names, *(f"batchnorm.{name}" for name in norm), "logits.weight", "logits.bias"]


def test_exported_weights_are_a_plain_state_dict_in_robustbenchs_names(folder, tmp_path):
    assert export.main([str(folder), str(tmp_path / "out.pt")]) == 0
    exported = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(exported) == robustbench_names()
    assert all(type(value) is torch.Tensor and value.is_contiguous() for value in exported.values())
    for name, value in new_model(0).state_dict().items():
        torch.testing.assert_close(exported[name], value, rtol=0, atol=0)


def test_robustbench_itself_loads_them(folder, tmp_path):
    architectures = pytest.importorskip("robustbench.model_zoo.architectures.dm_wide_resnet")
    utils = pytest.importorskip("robustbench.utils")
    export.main([str(folder), str(tmp_path / "out.pt")])
    model = architectures.DMWideResNet(depth=16, width=1, activation_fn=nn.SiLU)
    state = utils.rm_substr_from_state_dict(torch.load(tmp_path / "out.pt"), "module.")
    model.load_state_dict(state, strict=True)
    x = torch.rand(8, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), new_model(0)(x))


def test_raw_weights(folder, tmp_path):
    export.main([str(folder), str(tmp_path / "out.pt"), "--weights", "raw"])
    exported = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(exported["logits.weight"], new_model(1).state_dict()["logits.weight"], rtol=0, atol=0)
    assert "the raw weights of `best.pt`" in (tmp_path / "out.md").read_text()


def test_a_full_record_makes_a_claim(folder, tmp_path):
    record = add_record(folder)
    add_record(folder, eps=4 / 255, eps_text="4/255", robust_accuracy=0.8)
    add_record(folder, sha256="0" * 64, robust_accuracy=0.1234)
    add_record(folder, weights="raw", robust_accuracy=0.4321)
    export.main([str(folder), str(tmp_path / "out.pt")])
    text = (tmp_path / "out.md").read_text()
    assert "| AutoAttack standard, Linf | 8/255 | all 10000 | 93.69% ± 0.24 | 63.89% ± 0.48 |" in text
    assert "| AutoAttack standard, Linf | 4/255 | all 10000 | 93.69% ± 0.24 | 80.00% ± 0.40 |" in text
    assert "12.34" not in text  # of other weights
    assert "43.21" not in text
    assert "No claim" not in text
    assert "Additional data: none" in text
    assert "DMWideResNet(num_classes=10, depth=16, width=1, activation_fn=nn.SiLU" in text
    assert record["sha256"] in text
    (entry,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)  # 4/255 is on no leaderboard.
    assert json.loads(entry) == {
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "architecture": "WideResNet-16-1",
        "eps": "8/255",
        "clean_acc": "93.69",
        "reported": "63.89",
        "autoattack_acc": "63.89",
    }


@pytest.mark.parametrize("changes", [None, {"n": 9999}, {"version": "custom"}, {"sha256": "0" * 64}])
def test_without_a_full_record_there_is_no_claim(folder, tmp_path, changes):
    if changes is not None:
        add_record(folder, **changes)
    export.main([str(folder), str(tmp_path / "out.pt")])
    text = (tmp_path / "out.md").read_text()
    assert "**No claim can be made" in text
    assert "```json" not in text


@pytest.mark.parametrize(
    ("norm", "eps", "eps_text"),
    [
        ("L2", 128 / 255, "0.501961"),
        ("Linf", 2.5 / 255, "2.5/255"),
        ("Linf", 0.5 / 255, "0.5/255"),  # of --eps 0.5, in earlier versions
        ("L2", 8.0, "8"),  # of no --eps, in earlier versions
    ],
)
def test_the_evaluation_command_of_a_claim_means_what_was_run(folder, tmp_path, capsys, norm, eps, eps_text):
    record = add_record(folder, norm=norm, eps=eps, eps_text=eps_text, n=500, seed=7, version="custom")
    export.main([str(folder), str(tmp_path / "out.pt")])
    (command,) = re.findall(r"^python eval.py (.*)$", (tmp_path / "out.md").read_text(), re.MULTILINE)
    capsys.readouterr()
    eval_script.main([*shlex.split(command), "--dry-run"])
    (word,) = re.findall(r"--eps (\S+)", command)
    assert eval_script.radii([word], norm) == [(eps, eps_text)]
    words = capsys.readouterr().out
    for name in ("norm", "version", "n", "seed", "batch_size", "model", "dataset"):
        assert f"\n{name}: {record[name]}\n" in words


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--method", "dyart"],
        ["--method", "dyart", "--pretrained", "burn in/best.pt", "--clip-grad", "none", "--r0", "0.05"],
        ["--method", "clean", "--normalize", "--tau", "0.9"],
        ["--aux-data-filename", "a b.npz", "--method", "dyart", "--nesterov", "false", "--seed", "3"],
        ["--method", "trades", "--beta", "3", "--group-norm", "--norm", "L2"],
        ["--method", "n-fgsm", "--attack-eps", "4"],
        ["--method", "dyart", "--search", "fast", "--high-quality", "false"],
        ["--method", "dyart", "--search", "fab", "--high-quality", "false"],
        ["--method", "dyart", "--search", "fab", "--overshoot", "0.05"],
        ["--method", "dyart", "--search", "shared", "--search-steps", "3"],
        ["--recipe", "short"],
        ["--recipe", "short", "--epochs", "200", "--lambda-robust", "1000"],
        ["--recipe", "short", "--search", "fast"],
        ["--norm", "L2", "--r0", "7/1", "--attack-eps", "0.3", "--init-radius", "0"],
        ["--r0", "100/255", "--attack-eps", "5", "--attack-step", "0.01", "--mean", "0,0,0", "--std", "1,1,0.5"],
    ],
)
def test_the_training_command_of_a_claim_resolves_to_the_runs_settings(argv):
    values = run_settings(*argv)
    python, script, *words = shlex.split(export.train_command(values))
    assert (python, script) == ("python", "train.py")
    again = settings.resolve(train_flags.parse(words))
    assert {k: v for k, v in again.items() if k not in settings.PLACE} == {
        k: v for k, v in values.items() if k not in settings.PLACE
    }


def test_no_training_command_is_shown_where_none_says_a_length(folder, tmp_path):
    """As of a run with --attack-eps 8, which meant 8.0 before."""
    identity = {"model": MODEL, "dataset": "cifar10", "group_norm": False, "normalize": True, "checkpoint": "best.pt"}
    identity |= {"weights": "average", "sha256": "", "mean": None, "std": None}
    for eps, is_said in ((8 / 255, True), (8.0, False)):
        values = run_settings() | {"attack_eps": eps}
        assert ("python train.py" in export.claim(values, [], identity, Path("out.pt"))) == is_said


def test_in_a_locale_without_utf8_the_claim_is_written_and_told_of(tmp_path):
    """Its text has an ε, and the names of folder and file an é."""
    folder = two_checkpoints(tmp_path / "é")
    command = [sys.executable, ROOT / "export.py", folder, tmp_path / "é" / "é.pt"]
    done = subprocess.run(command, env=os.environ | PLAIN, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert rb"\udcc3\udca9/\udcc3\udca9.md" in done.stdout
    text = (tmp_path / "é" / "é.md").read_text(encoding="utf-8")
    assert "No claim can be made" in text and "- Weights: `é.pt`" in text


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_in_a_locale_without_utf8_the_flags_are_listed(script):
    done = subprocess.run([sys.executable, ROOT / script, "--help"], env=os.environ | PLAIN, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("failing", ["out.pt", "out.md"])
def test_a_full_disk_leaves_neither_half_nor_temporary_files(tmp_path, monkeypatch, capsys, failing):
    folder = two_checkpoints(tmp_path)
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == failing:
            raise OSError(28, "No space left on device")
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    error = refusal(capsys, str(folder), str(tmp_path / "out.pt"), main=export.main)
    assert f"cannot write {tmp_path / failing}: No space left on device" in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("failing", ["utf8", "write_torch"])
def test_a_failure_with_force_leaves_the_old_pair(tmp_path, monkeypatch, failing):
    folder = two_checkpoints(tmp_path)
    for name in ("out.pt", "out.md"):
        (tmp_path / name).write_text("old")

    def fail(*_: Any) -> None:
        raise FileError("cannot write: No space left on device")

    monkeypatch.setattr(export, failing, fail)
    with pytest.raises(FileError):
        export.main([str(folder), str(tmp_path / "out.pt"), "--force"])
    files = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert files == {"out.pt": "old", "out.md": "old"}


def test_additional_data_is_named(folder):
    values = run_settings("--aux-data-filename", "/data/edm 1m.npz")
    identity = {"model": MODEL, "dataset": "cifar10", "group_norm": False, "normalize": False, "checkpoint": "best.pt"}
    text = export.claim(values, [], {**identity, "weights": "average", "sha256": ""}, Path("out.pt"))
    assert "Additional data: generated images of `edm 1m.npz`, 70% of each batch" in text


def test_models_that_robustbench_has_no_class_for_say_so():
    identity = {"model": "preact-resnet18", "dataset": "cifar10", "group_norm": True, "normalize": False}
    assert "preact-resnet18 with GroupNorm" in export.architecture(identity)
    assert "no class" in export.architecture(identity)
    assert "DMPreActResNet(" in export.architecture(identity | {"model": "preact-resnet34-swish", "group_norm": False})


MEAN, STD = [0.5, 0.25, 0.125], [1.0, 0.5, 0.25]


@pytest.mark.parametrize(
    ("model", "group_norm"), [(MODEL, False), ("preact-resnet18-swish", False), (MODEL, True), ("resnet18", False)]
)
def test_a_claim_says_what_the_weights_normalize_by(model, group_norm):
    identity = {"model": model, "dataset": "cifar100", "group_norm": group_norm, "normalize": True}
    text = export.architecture(identity | {"mean": MEAN, "std": STD})
    # CIFAR-100's, of weights from before the statistics were kept.
    before = export.architecture(identity)
    if "swish" in model and not group_norm:
        assert "num_classes=100" in text and "mean=(0.5, 0.25, 0.125), std=(1.0, 0.5, 0.25))" in text
        assert "mean=(0.5071, 0.4865, 0.4409)" in before
    else:
        assert "by mean (0.5, 0.25, 0.125) and std (1.0, 0.5, 0.25)" in text and "no class" in text
        assert "by mean (0.5071, 0.4865, 0.4409)" in before
    text = export.architecture(identity | {"normalize": False, "mean": None, "std": None})
    assert "not normalizing its input" in text and "no class" in text and "DM" not in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "run/out.pt"], "outside the experiment folder"),
        (["run", "claim.md"], "another suffix"),
        (["run", "none/out.pt"], "there is no folder"),
        (["run", "there.pt"], "there.pt exists; --force overwrites it"),
        (["run", "other.pt"], "other.md exists; --force overwrites it"),
        (["nothing", "out.pt"], "no such experiment folder"),
        (["run", "out.pt", "--checkpoint", "none.pt"], "none.pt"),
    ],
)
def test_nothing_is_overwritten_or_written_in_part(folder, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    for name in ("there.pt", "other.md"):
        Path(name).write_text("precious")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        export.main(argv)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_force_overwrites(folder, tmp_path):
    (tmp_path / "out.pt").write_text("old")
    assert export.main([str(folder), str(tmp_path / "out.pt"), "--force"]) == 0
    assert list(torch.load(tmp_path / "out.pt", weights_only=True)) == robustbench_names()


# --- Safetensors, and their card --------------------------------------------------------------------------------------


def head_and_text(path: Path) -> tuple[dict[str, Any], str]:
    """What the Hub reads of a card, by the rules of its front matter, and the rest."""
    _, head, text = path.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_safetensors_hold_the_weights_and_what_they_are(folder, tmp_path):
    out = tmp_path / "out.safetensors"
    assert export.main([str(folder), str(out)]) == 0
    weights = load_file(out)
    assert sorted(weights) == sorted(robustbench_names())
    for name, value in new_model(0).state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=0)
    with safe_open(out, "pt") as file:
        said = file.metadata()
    assert said["format"] == "pt" and said["model"] == MODEL and said["dataset"] == "cifar10"
    assert said["sha256"] == sha256(folder / "best.pt") and said["mean"] == "0.4914,0.4822,0.4465"


def test_safetensors_know_their_model_and_run(tmp_path):
    """As best.pt does, but for the places of the machine that wrote it."""
    values = run_settings("--group-norm", "--pretrained", str(tmp_path / "secret" / "burn_in.pt"), "--seed", "3")
    values |= {"data_dir": str(tmp_path / "secret"), "cache_dir": str(tmp_path / "secret")}
    torch.manual_seed(0)
    model = build_model(values | {"channels_last": False}).eval()
    with Experiment.create(tmp_path, "run", values, echo=lambda message: None) as experiment:
        state = {"settings": values, "average": model.state_dict(), "epoch": 5}
        experiment.save_best(state | {"validation": {"val_clean": 0.75, "val_robust": 0.5}})
    out = tmp_path / "out.safetensors"
    export.main([str(experiment.folder), str(out)])
    assert b"secret" not in out.read_bytes()

    candidate = load_candidate(out)
    before = load_candidate(experiment.folder / "best.pt")
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(candidate.model(x), before.model(x), rtol=0, atol=0)
    of_file = ("checkpoint", "sha256")
    assert {**candidate.identity, **dict.fromkeys(of_file)} == {**before.identity, **dict.fromkeys(of_file)}
    assert candidate.checkpoint["epoch"] == 5 and candidate.checkpoint["validation"]["val_robust"] == 0.5
    kept = {name: value for name, value in values.items() if name not in settings.OF_MACHINE}
    kept |= {"pretrained": "burn_in.pt"}
    assert eval_script.settings_of(out, None) == kept
    places = {name: run_settings()[name] for name in settings.OF_MACHINE}
    assert candidate.settings == kept | places
    with pytest.raises(ValueError, match="--model wrn-10-1-swish: .* was trained with --model wrn-16-1-swish"):
        load_candidate(out, None, {"model": "wrn-10-1-swish"})
    subject = load_subject(analyze.build_parser().parse_args([str(out)]), torch.device("cpu"))
    assert subject.settings["seed"] == 3 and subject.settings["data_dir"] == run_settings()["data_dir"]

    content = out.read_bytes()
    out.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FileError, match=r"out.safetensors: damaged \(its checksum"):
        load_candidate(out)


def test_a_card_says_model_data_recipe_figures_and_hashes(folder, tmp_path):
    add_record(folder)
    add_record(folder, eps=4 / 255, eps_text="4/255", robust_accuracy=0.8)
    add_record(folder, sha256="0" * 64, robust_accuracy=0.1234)
    out = tmp_path / "out.safetensors"
    export.main([str(folder), str(out)])
    head, text = head_and_text(tmp_path / "out.md")
    assert head["pipeline_tag"] == "image-classification" and "cifar10" in head["tags"]
    (entry,) = head["model-index"]
    (result,) = entry["results"]
    assert result["dataset"]["name"] == "cifar10"
    assert [metric["value"] for metric in result["metrics"]] == [0.9369, 0.6389, 0.8]
    for expected in (
        sha256(out),
        sha256(folder / "best.pt"),
        "10 classes, 32 x 32 pixels",
        "Additional data: none",
        "| AutoAttack standard, Linf | 8/255 | all 10000 | 93.69% ± 0.24 | 63.89% ± 0.48 |",
        "| AutoAttack standard, Linf | 4/255 | all 10000 | 93.69% ± 0.24 | 80.00% ± 0.40 |",
        "DMWideResNet(num_classes=10, depth=16, width=1",
        "python train.py --method at --model wrn-16-1-swish",
        "python eval.py out.safetensors --eps 8/255 --norm Linf --version standard --n 10000 --batch-size 250",
    ):
        assert expected in text, expected
    assert "12.34" not in text
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    recipe, values = yaml.safe_load(recipe), run_settings()
    assert {name: recipe[name] for name in ("method", "lr", "attack_eps", "epochs", "seed")} == {
        name: values[name] for name in ("method", "lr", "attack_eps", "epochs", "seed")
    }


def test_a_card_says_what_was_validated_and_no_place_of_its_makers_machine(tmp_path):
    values = run_settings("--pretrained", str(tmp_path / "secret" / "burn_in.pt"), "--name", "x")
    values |= {"data_dir": str(tmp_path / "secret"), "train_subset": 500}
    with Experiment.create(tmp_path, "run", values, echo=lambda message: None) as experiment:
        state = {"settings": values, "average": new_model(0).state_dict(), "epoch": 1}
        experiment.save_best(state | {"validation": {"val_clean": 0.75, "val_robust": 0.5}})
    export.main([str(experiment.folder), str(tmp_path / "out.safetensors")])
    head, text = head_and_text(tmp_path / "out.md")
    assert "model-index" not in head
    assert "On held-out training images: 75.00% clean, 50.00% robust (PGD-40, Linf, ε" in text
    assert "Not evaluated by AutoAttack" in text
    assert "500 class-balanced ones" in text
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert "secret" not in recipe and yaml.safe_load(recipe)["pretrained"] == "burn_in.pt"


@pytest.mark.parametrize("argv", [[], ["--group-norm"], ["--normalize", "--mean", "0,0,0", "--std", "1,1,0.5"]])
def test_the_code_of_a_card_makes_the_model(tmp_path, monkeypatch, argv):
    values = run_settings(*argv)
    torch.manual_seed(0)
    model = build_model(values | {"channels_last": False}).eval()
    with Experiment.create(tmp_path, "run", values, echo=lambda message: None) as experiment:
        experiment.save_best({"settings": values, "average": model.state_dict(), "epoch": 1})
    export.main([str(experiment.folder), str(tmp_path / "out.safetensors")])
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(names["model"](x), model(x))


def test_a_full_disk_leaves_no_half_of_safetensors(tmp_path, monkeypatch, capsys):
    folder = two_checkpoints(tmp_path)
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == "out.md":
            raise OSError(28, "No space left on device")
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    error = refusal(capsys, str(folder), str(tmp_path / "out.safetensors"), main=export.main)
    assert "No space left on device" in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
