"""What --tensorboard shows is what metrics.csv says, once, whatever was cut and resumed; and it changes no training."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import contents, differences, files, refusal, run_training, tiny

from experiment import tensorboard
from experiment.folder import Experiment

needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")


def events(folder: Path) -> Any:
    """All that TensorBoard reads of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "images": 0, "histograms": 0})
    return read.Reload()


def curve(read: Any, tag: str) -> dict[int, float]:
    """Value by epoch, of which none may be there twice."""
    points = read.Scalars(tag)
    assert len({point.step for point in points}) == len(points), tag
    return {point.step: point.value for point in points}


def test_without_the_package_it_is_refused_before_a_folder_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    error = refusal(capsys, *tiny(tmp_path / "out", "--tensorboard"))
    assert "--tensorboard: needs the package tensorboard; pip install tensorboard" in error
    assert not (tmp_path / "out").exists()
    assert run_training(*tiny(tmp_path, "--epochs", "1", "--method", "clean")) == 0
    assert not (tmp_path / "run" / "tensorboard").exists()


@needs_tensorboard
def test_it_shows_what_metrics_say_and_changes_no_training(tmp_path):
    argv = ["--burn-in-epochs", "1"]
    assert run_training(*tiny(tmp_path / "a", *argv)) == 0
    assert run_training(*tiny(tmp_path / "b", *argv, "--tensorboard")) == 0
    different = differences(contents(tmp_path / "a" / "run"), contents(tmp_path / "b" / "run"))
    assert different and all(line.partition(":")[0].endswith("/tensorboard") for line in different), different

    rows = Experiment.open(tmp_path / "b" / "run").read_metrics()
    read = events(tmp_path / "b" / "run")
    for tag, column in (("training/loss", "loss"), ("run/lr", "lr"), ("validation/robust", "val_robust")):
        assert curve(read, tag) == pytest.approx({row["epoch"]: row[column] for row in rows}), tag
    margins = {row["epoch"]: row["margin_q50"] for row in rows if row["margin_q50"] is not None}
    assert margins and curve(read, "margins/q50") == pytest.approx(margins)
    shown = {event.step: event.histogram_value for event in read.Histograms("margins/found, in 1 of 255")}
    assert shown.keys() == margins.keys()
    for row in rows:
        if row["epoch"] in shown:
            histogram = shown[row["epoch"]]
            assert histogram.sum / histogram.num == pytest.approx(row["margin_mean"], rel=1e-4)
    images = read.Images("x, boundary point, difference")
    assert [image.step for image in images] == [row["epoch"] for row in rows]
    assert {(image.width, image.height) for image in images} == {(8 * 32, 3 * 32)}


@needs_tensorboard
def test_the_page_shows_images_boundary_points_and_their_difference(tmp_path):
    from data import Split

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    images = torch.randint(100, 156, (3, 2, 2, 3), dtype=torch.uint8)
    x = images.permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        model[1].bias -= model(x).mean(0)
    labels = model(x).argmax(1)
    labels[2] = 1 - labels[2]  # misclassified
    with tensorboard.Board({"tensorboard": False}, tmp_path, Split(images, labels), 0) as board:
        run = type("Run", (), {"settings": {"norm": "Linf", "temperature": 5.0}})()
        run.average = type("Average", (), {"model": model})()
        page = board._page(run)
    assert page.shape == (3, 6, 6)
    top, middle, bottom = page.split(2, 1)
    assert torch.equal(top, torch.cat(list(x), 2))
    w, b = (parameter[0] - parameter[1] for parameter in model[1].parameters())
    for index in range(2):
        point = middle[:, :, 2 * index : 2 * index + 2]
        assert (point.flatten() @ w + b) * (1 - 2 * labels[index]) < 0, "it is on the other side"
        delta = bottom[:, :, 2 * index : 2 * index + 2] - 0.5
        # The closest point in l-infinity moves all pixels alike, against the gradient.
        assert torch.allclose(delta.flatten(), -0.5 * w.sign() * (1 - 2 * labels[index]), atol=1e-3)
    assert torch.equal(middle[:, :, 4:], x[2]) and (bottom[:, :, 4:] == 0.5).all()


@needs_tensorboard
@pytest.mark.parametrize("cut_at", [1, 2])
def test_a_resumed_run_goes_on_in_the_same_curves_without_doubles(tmp_path, monkeypatch, cut_at):
    """Cut after an epoch was written to the curves, and before its checkpoint was: it is trained again."""
    usual, calls = Experiment.save_latest, []

    def save_latest(self: Experiment, state: Any) -> None:
        calls.append(1)
        if len(calls) == cut_at:
            raise KeyboardInterrupt
        usual(self, state)

    argv = tiny(tmp_path, "--epochs", "3", "--tensorboard", "--scheduler", "constant", "--search-steps", "2")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Experiment, "save_latest", save_latest)
        run_training(*argv)
    assert max(curve(events(tmp_path / "run"), "training/loss")) == cut_at
    assert run_training("--resume", str(tmp_path / "run")) == 0
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2
    rows = Experiment.open(tmp_path / "run").read_metrics()
    read = events(tmp_path / "run")
    for tag, column in (("training/loss", "loss"), ("run/lr", "lr")):
        assert curve(read, tag) == pytest.approx({row["epoch"]: row[column] for row in rows})
    assert [image.step for image in read.Images("x, boundary point, difference")] == [1, 2, 3]


@needs_tensorboard
def test_it_can_be_asked_for_and_left_when_a_run_goes_on(tmp_path):
    argv = ["--method", "clean", "--epochs", "1", "--scheduler", "constant"]
    assert run_training(*tiny(tmp_path, *argv)) == 0
    folder = tmp_path / "run"
    assert run_training("--resume", str(folder), "--epochs", "2", "--tensorboard") == 0
    assert curve(events(folder), "training/loss").keys() == {2}
    before = files(folder / "tensorboard")
    assert run_training("--resume", str(folder), "--epochs", "3", "--tensorboard", "false") == 0
    assert files(folder / "tensorboard") == before
