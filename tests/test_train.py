"""train.py: the real thing on digits from end to end, then each of its promises on tiny runs."""

import errno
import fcntl
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import contents, differences, files, refusal, run_training, tiny
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import eval as eval_script
import train
from data import Split, to_input
from dyart.dynamics import boundary_speed, update_direction
from dyart.margin import find_boundary
from experiment import build
from experiment.build import build_model
from experiment.checkpoint import load_checkpoint, save_checkpoint
from experiment.folder import Experiment
from experiment.metrics import Meter, describe
from experiment.settings import resolve
from models import create_model

ROOT = Path(__file__).parents[1]

# --- From end to end --------------------------------------------------------------------------------------------------


def script(name: str, *argv: str) -> str:
    """What a script prints, run as users run it."""
    done = subprocess.run([sys.executable, str(ROOT / name), *argv], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_dyart_on_digits_withstands_autoattack_where_its_burn_in_does_not(tmp_path: Path) -> None:
    flags = "--dataset digits --model wrn-10-1-swish --group-norm --augment false --train-subset 500 --device cpu"
    flags += " --burn-in-epochs 8 --burn-in-batch-size 50 --epochs 3 --batch-size 50 --scheduler cosinew"
    flags += " --clip-grad 0.1 --lambda-robust 100 --validation-size 50 --validation-attack-iter 5"
    printed = script("train.py", *flags.split(), "--output-dir", str(tmp_path), "--name", "run")
    folder = tmp_path / "run"
    assert (printed.count("(burn-in)"), printed.count("(dyart)")) == (8, 3)
    rows = Experiment.open(folder).read_metrics()
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert rows[7]["clean_loss"] < 0.7 * rows[0]["clean_loss"]
    assert rows[-1]["margin_mean"] > rows[8]["margin_mean"] > 0

    attack = "--checkpoint burn_in best --eps 8 --n 16 --batch-size 16 --version custom --device cpu"
    script("eval.py", str(folder), *attack.split())
    burn_in, dyart = json.loads((folder / "autoattack.json").read_text())
    assert (burn_in["checkpoint"], dyart["checkpoint"]) == ("burn_in.pt", "best.pt")
    assert burn_in["clean_accuracy"] > 0.4 and dyart["clean_accuracy"] > 0.4
    assert dyart["robust_accuracy"] >= burn_in["robust_accuracy"] + 0.15


# --- What a run writes ------------------------------------------------------------------------------------------------

BOTH = ["--burn-in-epochs", "1", "--epochs", "2", "--save-every", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run with both stages."""
    root = tmp_path_factory.mktemp("train")
    assert run_training(*tiny(root, *BOTH)) == 0
    return root / "run"


def test_the_same_seed_gives_the_same_bits_and_another_does_not(run: Path, tmp_path: Path) -> None:
    assert run_training(*tiny(tmp_path / "same", *BOTH)) == 0
    assert not differences(contents(tmp_path / "same" / "run"), contents(run))
    assert run_training(*tiny(tmp_path / "other", *BOTH, "--seed", "1", "--epochs", "1")) == 0
    other, ours = (load_checkpoint(folder / "burn_in.pt")["average"] for folder in (tmp_path / "other" / "run", run))
    changed = [name for name in ours if not torch.equal(ours[name], other[name])]
    assert {name for name in ours if name.endswith(("conv_0.weight", "logits.weight"))} <= set(changed)


def test_the_experiment_folder(run: Path) -> None:
    expected = {"args.yaml", "train.log", "metrics.csv", "latest.pt", "previous.pt", "best.pt", "burn_in.pt"}
    assert set(files(run)) == expected | {"epoch_0002.pt"}
    settings = yaml.safe_load((run / "args.yaml").read_text())
    assert settings["r0"] == 16 / 255 and settings["epochs"] == 2 and settings["train_subset"] == 40
    log = (run / "train.log").read_text()
    assert re.search(
        r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d epoch 1 \(burn-in\), lr 0.1, loss 2\.\d{4}, clean", log, re.MULTILINE
    )
    assert f"finished: {run}" in log
    for name in ("best.pt", "burn_in.pt", "epoch_0002.pt"):
        state = load_checkpoint(run / name)
        assert state["settings"] == settings
        create_model("wrn-10-1-swish", mean=[0] * 3, std=[1] * 3).load_state_dict(state["average"], strict=True)
    assert [load_checkpoint(run / f"{name}.pt")["epoch"] for name in ("burn_in", "epoch_0002")] == [1, 2]
    assert load_checkpoint(run / "burn_in.pt")["stage"] == "burn-in"


def test_metrics_have_a_row_an_epoch(run: Path) -> None:
    rows = Experiment.open(run).read_metrics()
    assert [(row["epoch"], row["stage"]) for row in rows] == [(1, "burn-in"), (2, "dyart"), (3, "dyart")]
    for row in rows:
        assert row["grad_norm"] > 0 and row["seconds"] > 0 and row["peak_memory_mib"] > 50 and row["bad_steps"] == 0
        assert 0 <= row["val_robust"] <= row["val_clean"] <= 1
        assert row["loss"] == pytest.approx(row["clean_loss"] + (row["robust_loss"] or 0), abs=1e-4)
    assert rows[0]["found"] is None and rows[0]["margin_q50"] is None
    found = [row for row in rows[1:] if row["found"] > 0]
    assert found
    for row in found:
        assert 0 <= row["kept"] <= row["found"] <= 1
        quantiles = [row[f"margin_q{percent}"] for percent in (10, 25, 50, 75, 90)]
        assert quantiles == sorted(quantiles) and quantiles[0] <= row["margin_mean"] <= quantiles[-1] + 1e-9


def test_margins_are_summed_up_in_units_of_a_grey_level() -> None:
    meter = Meter()
    for margins in ([1.0, math.nan, 5.0], [3.0, 2.0, 4.0]):
        metrics = {"loss": torch.tensor(margins[0]), "margins": torch.tensor(margins) / 255}
        meter.add(metrics, grad_norm=2.0, images=len(margins))
    assert meter.means() == {"loss": 2.0, "grad_norm": 2.0}
    row = meter.margin_quantiles()
    assert row == pytest.approx(
        {"margin_mean": 3, "margin_q10": 1, "margin_q25": 2, "margin_q50": 3, "margin_q75": 4, "margin_q90": 5}
    )


def test_a_metric_that_came_with_a_new_version_within_an_epoch_is_left_out_of_it() -> None:
    """Its mean would be over all images of the epoch, though it was not taken of the first."""
    before = Meter()
    before.add({"loss": torch.tensor(1.0)}, 1.0, 100)
    after = Meter(before.state)
    after.add({"loss": torch.tensor(2.0), "passes": torch.tensor(7.5)}, 1.0, 100)
    assert after.means() == {"loss": 1.5, "grad_norm": 1.0}


def test_the_best_checkpoint_is_chosen_by_robust_and_then_by_clean_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([(0.9, 0.9), (0.8, 0.2), (0.7, 0.5), (0.8, 0.5), (0.9, 0.4)])  # the burn-in's does not count
    monkeypatch.setattr(train, "validate", lambda *_: dict(zip(("val_clean", "val_robust"), next(scores), strict=True)))
    flags = ["--burn-in-epochs", "1", "--epochs", "4", "--train-subset", "16"]
    assert run_training(*tiny(tmp_path, *flags)) == 0
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    assert (best["epoch"], best["validation"]) == (4, {"val_clean": 0.8, "val_robust": 0.5})


@pytest.mark.parametrize(("choice", "names"), [("rename", {"run", "run-2"}), ("stop", {"run"})])
def test_an_existing_folder_is_never_written_to(
    choice: str, names: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = tiny(tmp_path, "--method", "clean", "--epochs", "1", "--train-subset", "16", "--if-exists", choice)
    assert run_training(*flags) == 0
    before = files(tmp_path / "run")
    if choice == "stop":
        assert "run exists and is not overwritten" in refusal(capsys, *flags)
    else:
        assert run_training(*flags) == 0
    assert {path.name for path in tmp_path.iterdir()} == names
    assert files(tmp_path / "run") == before


# --- What training does -----------------------------------------------------------------------------------------------


def watch(monkeypatch: pytest.MonkeyPatch, method: str) -> list[tuple[nn.Module, torch.Tensor, dict[str, Any]]]:
    """The model, its input and its weights at each step of a method."""
    original, seen = train.LOSSES[method], []

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor, **options: Any) -> Any:
        seen.append((model, x, {name: value.clone() for name, value in model.state_dict().items()}))
        return original(model, x, y, **options)

    monkeypatch.setitem(train.LOSSES, method, loss)
    return seen


def test_dyart_starts_from_the_average_of_the_burn_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch, "dyart")
    assert run_training(*tiny(tmp_path, "--burn-in-epochs", "1", "--epochs", "1")) == 0
    burn_in = load_checkpoint(tmp_path / "run" / "burn_in.pt")
    assert not differences(seen[0][2], dict(burn_in["average"]))
    assert differences(dict(burn_in["average"]), dict(burn_in["model"]))


@pytest.mark.parametrize("source", ["folder", "latest.pt", "best.pt", "bare.pt"])
def test_pretrained_weights_are_where_training_starts(
    source: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run if source == "folder" else run / source
    averaged = dict(load_checkpoint(run / ("latest.pt" if source in ("folder", "bare.pt") else source))["average"])
    if source == "bare.pt":
        path = tmp_path / source
        torch.save(averaged, path)
    seen = watch(monkeypatch, "dyart")
    assert run_training(*tiny(tmp_path, "--epochs", "1", "--pretrained", str(path))) == 0
    assert not differences(seen[0][2], averaged)


@pytest.mark.parametrize("method", ["n-fgsm", "fgsm-rs"])
def test_single_step_training_attacks_with_the_eps_of_its_flag(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, asked = train.LOSSES[method], []

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor, **options: Any) -> Any:
        asked.append({name: value for name, value in options.items() if name != "generator"})
        return original(model, x, y, **options)

    monkeypatch.setitem(train.LOSSES, method, loss)
    assert run_training(*tiny(tmp_path, "--method", method, "--epochs", "1", "--attack-eps", "4")) == 0
    assert asked == 3 * [{"norm": "Linf", "eps": 4 / 255}]
    (row,) = Experiment.open(tmp_path / "run").read_metrics()
    assert row["loss"] == row["robust_loss"] > 0 and row["stage"] == method
    assert 0 <= row["robust_accuracy"] <= 1 and "clean_loss" not in row


@pytest.mark.parametrize(("rules", "momentum"), [("1", 0.01), ("2", 0.5)])
def test_only_the_first_step_of_a_run_takes_over_the_statistics_of_its_batch(
    rules: str, momentum: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(monkeypatch, "clean")
    assert run_training(*tiny(tmp_path, "--method", "clean", "--epochs", "1", "--rules", rules)) == 0
    expected = None
    for (model, x, weights), (*_, after) in zip(seen, seen[1:], strict=False):
        model.load_state_dict(weights)
        first, inputs = next(m for m in model.modules() if isinstance(m, _BatchNorm)), []
        handle = first.register_forward_hook(lambda _, args, __, inputs=inputs: inputs.append(args[0]))
        model.eval()(x)
        handle.remove()
        mean = inputs[0].mean((0, 2, 3))
        expected = mean if expected is None else (1 - momentum) * expected + momentum * mean
        name = next(name for name, module in model.named_modules() if module is first)
        torch.testing.assert_close(after[f"{name}.running_mean"], expected, rtol=1e-3, atol=1e-5)


def test_the_running_statistics_of_a_short_run_keep_up(tmp_path: Path) -> None:
    """By the rules of before they are those of the first steps, and so is what validation sees."""
    flags = "--dataset digits --model wrn-10-1-swish --device cpu --method clean --epochs 3 --batch-size 64"
    flags += f" --validation-attack-iter 1 --output-dir {tmp_path}"
    for rules in (1, 2):
        assert run_training(*flags.split(), "--name", str(rules), "--rules", str(rules)) == 0
    before, now = (Experiment.open(tmp_path / str(rules)).read_metrics()[-1] for rules in (1, 2))
    assert before["clean_accuracy"] == now["clean_accuracy"] > 0.7
    assert before["val_clean"] < 0.35 and now["val_clean"] > 0.6


@pytest.mark.parametrize("group_norm", [False, True])
def test_weight_decay_spares_the_normalization_of_wide_resnets_alone(group_norm: bool) -> None:
    settings = resolve({"dataset": "digits", "group_norm": group_norm})
    stage = build.stages_of(settings)[0]
    for name, spared in (("wrn-10-1-swish", True), ("wrn-10-1", True), ("preact-resnet18", False), ("resnet18", False)):
        model = create_model(name, group_norm=group_norm)
        optimizer = build.build_optimizer(model, stage, settings)
        decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        # Weights of convolutions have four dimensions and the head's two; what else has one is normalization.
        head = {id(p) for layer in model.modules() if isinstance(layer, nn.Linear) for p in layer.parameters()}
        for parameter in model.parameters():
            normalization = parameter.ndim == 1 and id(parameter) not in head
            assert decays[id(parameter)] == (0 if normalization and spared else 5e-4)


@pytest.mark.parametrize("clip", ["0.05", "none"])
def test_gradients_are_clipped_and_their_norm_before_that_is_written_down(
    clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms, original = [], torch.optim.SGD.step

    def step(self: Any, *args: Any) -> Any:
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())
        return original(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    flags = ["--method", "clean", "--epochs", "1", "--train-subset", "32", "--clip-grad", clip]
    assert run_training(*tiny(tmp_path, *flags)) == 0
    (row,) = Experiment.open(tmp_path / "run").read_metrics()
    assert row["grad_norm"] > 0.1
    expected = 0.05 if clip == "0.05" else row["grad_norm"]
    assert sum(norms) / 2 == pytest.approx(expected, rel=1e-3)


def test_the_burn_in_has_no_generated_data_and_no_clipping() -> None:
    settings = resolve({"dataset": "digits", "burn_in_epochs": 3, "epochs": 4})
    burn_in, main = build.stages_of(settings)
    assert (burn_in.method, burn_in.epochs_before, burn_in.epochs, burn_in.clip_grad) == ("clean", 0, 3, None)
    assert (main.method, main.epochs_before, main.epochs, main.clip_grad) == ("dyart", 3, 4, 0.1)
    images = Split(torch.zeros(8, 32, 32, 3, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))

    class Generated:
        rows = None

    data = build.Data(images, images, {"auxiliary": Generated(), "auxiliary_fraction": 0.5})
    model = create_model("wrn-10-1")
    mixed = [train.begin_stage(settings, i, model, data, train.Progress()).loader.auxiliary_rows for i in (0, 1)]
    assert mixed == [0, 32]


class MeanAgainstHalf(nn.Module):
    """Class 1 where the mean pixel is above 1/2: an ℓ∞ perturbation ε flips what is nearer to that than ε."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.flatten(1).mean(1)
        return self.scale * torch.stack([0.5 - mean, mean - 0.5], 1)


def test_validation_counts_what_a_model_withstands() -> None:
    greys = torch.tensor([100, 115, 124, 131, 140, 160, 100, 160], dtype=torch.uint8)  # the half is 127.5
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])  # the last two are wrong
    split = Split(greys[:, None, None, None].expand(8, 32, 32, 3).contiguous(), labels)
    settings = resolve({"dataset": "digits", "validation_batch_size": 3, "validation_attack_iter": 20})
    scores = train.validate(MeanAgainstHalf(), split, settings, QuietSignals())
    assert scores == {"val_clean": 6 / 8, "val_robust": 4 / 8}  # 124 and 131 are within 8 of the half


class QuietSignals(train.Signals):
    """Signals that never come, and for which no handler is set."""

    def __init__(self) -> None:
        self.received, self._in_company = None, False


def test_compile_without_a_compiler_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    """As on a machine without one: torch.compile looks for it by CXX and PATH."""
    command = [sys.executable, ROOT / "train.py", *tiny(tmp_path / "out", "--compile", "--method", "clean")]
    nowhere = {"PATH": str(tmp_path), "CXX": str(tmp_path / "g++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, env=os.environ | nowhere, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-2000:]
    assert re.search("^train.py: error: --compile: does not work here .*C\\+\\+ compiler", done.stderr.splitlines()[-1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_trained_and_evaluated_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: str
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(getattr(errno, code), "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr("storage.lock._warned", False)
    assert run_training(*tiny(tmp_path, "--method", "clean", "--epochs", "1")) == 0
    assert [message for message in caplog.messages if "has no locks" in message] == caplog.messages[:1]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    flags = ["--n", "2", "--eps", "20", "--version", "custom", "--device", "cpu"]
    assert eval_script.main([str(tmp_path / "run"), *flags]) == 0


def test_a_schedule_that_idles_in_a_short_run_is_warned_of(tmp_path: Path) -> None:
    assert run_training(*tiny(tmp_path, "--method", "clean", "--scheduler", "cosinew")) == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert "warning: 1 of the 2 epochs of clean have less than a hundredth" in log and "--scheduler cyclic" in log


def test_margins_of_l2_runs_are_shown_in_their_unit() -> None:
    meter = Meter()
    meter.add({"loss": torch.tensor(1.0), "margins": torch.tensor([0.5])}, 1.0, 1)
    assert meter.summary("L2")["margin"] == "0.500" and meter.summary("Linf")["margin"] == "127.50/255"
    row = {"epoch": 1, "stage": "dyart", "lr": 0.1, "val_clean": 0.5, "val_robust": 0.2, "seconds": 1}
    row |= meter.margin_quantiles()
    assert "margin 0.500," in describe(row, "L2") and "margin 127.50/255," in describe(row, "Linf")


def test_an_anomaly_is_named_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    original = train.LOSSES["clean"]

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
        result, metrics = original(model, x, y)
        return result + 0 * (result - result).sqrt(), metrics  # finite, with a gradient of 0 · ∞

    monkeypatch.setitem(train.LOSSES, "clean", loss)
    flags = ["--method", "clean", "--train-subset", "16", "--epochs", "1"]
    with pytest.warns(UserWarning, match="Error detected in SqrtBackward"):
        assert run_training(*tiny(tmp_path, *flags, "--detect-anomaly")) == 1
    log = (tmp_path / "run" / "train.log").read_text()
    assert "SqrtBackward0' returned nan values" in log and "epoch 1, batch 1" in log
    assert run_training(*tiny(tmp_path, *flags, "--name", "without")) == 0  # one skipped step
    assert not torch.is_anomaly_enabled()


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ("--model wrn-11-1", "wrn-11-1"),
        ("--model resnet19", "unknown model 'resnet19': accepted are"),
        ("--dataset mnist", "'mnist' is not one of cifar10, cifar100, tiny-imagenet, digits"),
        ("--device cuda:77", "--device cuda:77: not to be had here"),
        ("--device meta", "--device meta: not to be had here"),
        ("--device cpu --cuda-graphs", "--cuda-graphs: only on a GPU, not with --device cpu"),
        ("--epochs 0", "--epochs: '0' is not a whole number at least 1"),
        ("--lr -1", "--lr: '-1' is not a number above 0"),
        ("--attack-eps 0", "--attack-eps.*'0' is not a number above 0"),
        ("--pretrained {tmp}/nowhere.pt", "--pretrained {tmp}/nowhere.pt: no such file or folder"),
        ("--pretrained {tmp}", "{tmp}: not an experiment folder"),
        ("--pretrained {tmp}/text.pt", "{tmp}/text.pt: not a checkpoint"),
        ("--pretrained {tmp}/other.pt", "--pretrained {tmp}/other.pt: the weights do not fit"),
        ("--train-subset 1398", "--train-subset 1398: there are 1197 training images"),
        ("--validation-size 201", "--validation-size 201: only 200 images are held out"),
        ("--aux-data-filename {tmp}/nowhere.npz", "{tmp}/nowhere.npz"),
        ("--output-dir {tmp}/text.pt/below", "--output-dir .*: cannot write to"),
        ("--name a/b", "'a/b' cannot be the name"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
        ("--resume {tmp}/nowhere", "{tmp}/nowhere: no such experiment folder"),
        ("--resume {tmp}", "{tmp}: not an experiment folder"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_anything_is_made(
    flags: str, pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.pt").write_text("not a checkpoint")
    save_checkpoint(tmp_path / "other.pt", {"average": dict(create_model("wrn-10-2").state_dict())})
    before = files(tmp_path)
    error = refusal(capsys, *tiny(tmp_path / "out"), *flags.format(tmp=tmp_path).split())
    assert re.search(pattern.format(tmp=re.escape(str(tmp_path))), error), error
    assert files(tmp_path) == before and not (tmp_path / "out").exists()


def test_ctrl_c_before_training_ends_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "load_data", interrupted)
    with pytest.raises(SystemExit) as stop:
        train.flags.run(lambda: run_training(*tiny(tmp_path)))
    assert stop.value.code == 130
    assert capsys.readouterr().err == ""
    assert not list(tmp_path.iterdir())


def test_dynamics_are_tracked_every_n_epochs_and_change_nothing(tmp_path):
    """Tracking draws no random numbers and leaves the model alone: the weights are those of a run without it."""
    tracked = ["--track-dynamics", "2", "--epochs", "3", "--scheduler", "constant"]
    assert run_training(*tiny(tmp_path / "a", *tracked)) == 0
    assert run_training(*tiny(tmp_path / "b", *tracked[2:])) == 0
    with_it, without = (load_checkpoint(tmp_path / name / "run" / "latest.pt") for name in "ab")
    for name, value in without["model"].items():
        assert torch.equal(with_it["model"][name], value), name
    rows = Experiment.open(tmp_path / "a" / "run").read_metrics()
    assert [row["epoch"] for row in rows if "negative_speeds" in row] == [1, 2, 3]
    shares = [row["negative_speeds"] for row in rows]
    assert shares[0] is None and shares[2] is None
    assert shares[1] is None or 0 <= shares[1] <= 1


def test_the_tracked_share_is_that_of_vulnerable_points_of_the_first_training_images(tmp_path):
    folder = tmp_path / "run"
    flags = ["--method", "clean", "--track-dynamics", "1", "--epochs", "1", "--train-subset", "64"]
    assert run_training(*tiny(tmp_path, *flags)) == 0
    stored = Experiment.open(folder).settings
    model = build_model(stored)
    model.load_state_dict(load_checkpoint(folder / "latest.pt")["model"])
    split = build.load_splits(stored).train
    x, y = to_input(split.images[:16]), split.labels[:16]
    boundary = find_boundary(model, x, y, temperature=math.inf, steps=10)
    speed = boundary_speed(model, boundary, y, update_direction("clean", model, [(x, y)]), temperature=math.inf)
    vulnerable = boundary.found & (boundary.margin < 8 / 255)
    assert vulnerable.any()
    expected = (speed[vulnerable] < 0).double().mean().item()
    (row,) = Experiment.open(folder).read_metrics()
    assert row["negative_speeds"] == pytest.approx(expected)
