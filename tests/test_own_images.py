"""The scripts on own images: train, resume, eval, analyze, bench and export, on PNGs made here and on real pictures."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from images import fill, photos
from runs import contents, differences, refusal, run_training, tiny

import analyze
import bench
import eval as eval_script
import export
from data import find_images, own
from evaluation import attack
from evaluation.candidate import load_candidate, load_test
from evaluation.results import Results
from experiment import settings, train_flags
from experiment.build import load_splits
from experiment.checkpoint import load_checkpoint
from tests.evaluations import ShortAutoAttack
from tests.test_data_own import images_of
from tests.test_data_tiny_imagenet import MINI
from tests.test_image_folder import arrays

SMALL = ["--train-subset", "none", "--validation-size", "none", "--batch-size", "8", "--burn-in-batch-size", "8"]


def own_run(root: Path, dataset: Path, *extra: str) -> list[str]:
    return tiny(root, "--dataset", str(dataset), *SMALL, *extra)


@pytest.fixture
def short_attacks(monkeypatch):
    monkeypatch.setattr(attack, "AutoAttack", ShortAutoAttack)


def records(folder: Path) -> list[dict]:
    return json.loads((folder / "autoattack.json").read_text())


def test_all_scripts_work_on_a_folder_of_pngs(tmp_path, short_attacks, capsys):
    dataset, run = photos(tmp_path, each=10), tmp_path / "run"
    assert run_training(*own_run(tmp_path, dataset, "--burn-in-epochs", "2", "--epochs", "2")) == 0
    stored = load_checkpoint(run / "best.pt")["settings"]
    assert stored["dataset"] == str(dataset) and stored["dataset_content"].startswith("4x8x8-")
    assert stored["held_out"] == 0.1 and stored["model"] == "wrn-10-1-swish"
    pixels = images_of(dataset, "train") / 255
    assert stored["mean"] == pytest.approx(pixels.mean((0, 1, 2)).tolist(), abs=5e-5)

    assert eval_script.main([str(run), "--eps", "1", "--n", "8"]) == 0
    (record,) = records(run)
    # Colours far apart: whoever mixes up labels or images does not learn them.
    assert record["clean_accuracy"] >= 0.75 and record["test_size"] == 12 and record["images"] == "balanced"
    few = ["--examples", "6", "--methods", "clean", "dyart", "--history-examples", "2", "--nearest", "2"]
    assert analyze.main([str(run), *few]) == 0
    summary = json.loads((run / "figures" / "dynamics.json").read_text())
    assert summary["dataset"] == str(dataset) and summary["images"] == "test" and len(summary["autoattack"]) == 1
    assert export.main([str(run), str(tmp_path / "out.pt")]) == 0
    text = (tmp_path / "out.md").read_text()
    assert "DMWideResNet(num_classes=4" in text and f"--dataset {dataset}" in text

    # Each command of the claim does what it says.
    capsys.readouterr()
    _, training, _, evaluation = text.split("```")[1].strip().splitlines()
    resolved = settings.resolve(train_flags.parse(training.split()[2:]))
    assert resolved == {**stored, **{name: resolved[name] for name in settings.PLACE}}
    words = evaluation.replace("out.pt", str(tmp_path / "out.pt")).split()[2:]
    assert eval_script.main(words) == 0
    (again,) = json.loads((tmp_path / "out.pt.autoattack.json").read_text())
    assert again["clean_accuracy"] == record["clean_accuracy"] and again["test_sha256"] == record["test_sha256"]


def test_bench_measures_own_images_of_a_checkpoint_and_of_no_model_yet(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure_times", lambda *_: {})
    monkeypatch.setattr(bench, "measure_memory", lambda *_: {})
    monkeypatch.setattr(bench, "print_tables", lambda _: None)
    dataset = photos(tmp_path, test=None, each=10)
    assert run_training(*own_run(tmp_path, dataset, "--epochs", "1")) == 0
    options = ["--batch-size", "4", "--examples", "0", "--output", str(tmp_path / "b.json")]
    assert bench.main([str(tmp_path / "run"), *options]) == 0
    named = ["--dataset", str(dataset), "--model", "wrn-10-1-swish", "--image-size", "16"]
    assert bench.main([*named, *options]) == 0
    (subject,) = json.loads((tmp_path / "b.json").read_text())["subjects"]
    assert subject["weights"]["dataset_content"].startswith("4x16x16-")


def test_a_run_goes_on_exactly_also_where_its_folder_has_changed_moved_or_gone(tmp_path, caplog, monkeypatch):
    dataset = photos(tmp_path)
    # By this search the second epoch is the best: a best.pt of the first says that no more were asked for.
    recipe = ("--scheduler", "constant", "--search", "fast")
    straight = own_run(tmp_path / "a", dataset, *recipe)
    assert run_training(*straight, "--epochs", "2") == 0
    cut = own_run(tmp_path / "b", dataset, *recipe, "--epochs", "1")
    assert run_training(*cut) == 0
    run = tmp_path / "b" / "run"
    fill(dataset / "train", seed=7)
    monkeypatch.setattr(own, "_FOUND", set())  # in another process
    assert run_training("--resume", str(run), "--epochs", "2") == 0
    assert "has changed, or is gone" in caplog.text
    assert differences(contents(tmp_path / "a" / "run"), contents(run)) == []

    shutil.rmtree(run)
    shutil.rmtree(dataset)
    again = photos(tmp_path / "elsewhere")
    assert run_training(*own_run(tmp_path / "b", again, *recipe, "--epochs", "1")) == 0
    shutil.copytree(again, tmp_path / "moved" / "fotos")
    shutil.rmtree(tmp_path / "elsewhere")
    moved = ["--dataset", str(tmp_path / "moved" / "fotos")]
    assert run_training("--resume", str(run), "--epochs", "2", *moved) == 0
    found = contents(run)
    assert found["args.yaml"]["dataset"] == moved[1]
    del found["args.yaml"]
    expected = contents(tmp_path / "a" / "run")
    del expected["args.yaml"]
    assert [line for line in differences(expected, found) if "settings/dataset" not in line] == []


def test_a_folder_is_looked_into_once_in_a_process(tmp_path, monkeypatch):
    """It takes seconds where there are a million files."""
    looks, look = [], own.ImageFolder.__init__
    monkeypatch.setattr(own.ImageFolder, "__init__", lambda self, path: (looks.append(path), look(self, path))[1])
    command = own_run(tmp_path, photos(tmp_path), "--scheduler", "constant", "--epochs", "1")
    for argv in (command, ["--resume", str(tmp_path / "run"), "--epochs", "2"]):
        monkeypatch.setattr(own, "_FOUND", set())
        looks.clear()
        assert run_training(*argv) == 0
        assert len(looks) == 1


def test_other_images_than_the_runs_are_refused_on_resume(tmp_path, capsys):
    assert run_training(*own_run(tmp_path, photos(tmp_path), "--epochs", "1")) == 0
    other = photos(tmp_path, "others", each=5)
    find_images(str(other))  # not beside the one line
    said = refusal(capsys, "--resume", str(tmp_path / "run"), "--dataset", str(other))
    assert f"--dataset {other}: its images" in said and "are not those of the run" in said
    said = refusal(capsys, "--resume", str(tmp_path / "run"), "--dataset", "digits")
    assert "--dataset digits" in said and "cannot change it" in said
    said = refusal(capsys, "--resume", str(tmp_path / "run"), "--image-size", "32")
    assert "--image-size 32" in said and "cannot change it" in said


def test_without_test_images_it_is_said_what_to_do_and_each_way_works(tmp_path, short_attacks, capsys):
    dataset, run = photos(tmp_path, test=None, each=10), tmp_path / "run"
    assert run_training(*own_run(tmp_path, dataset, "--epochs", "1")) == 0
    for script in (eval_script, analyze):
        said = refusal(capsys, str(run), main=script.main)
        assert f"{dataset} has no test images: put some into {dataset}/test/CLASS/" in said
        assert "--dataset" in said and "--images validation" in said
    assert eval_script.main([str(run), "--eps", "1", "--images", "validation"]) == 0
    few = ["--images", "validation", "--examples", "3", "--methods", "clean", "--history-examples", "1"]
    assert analyze.main([str(run), *few]) == 0
    assert len(json.loads((run / "figures" / "dynamics.json").read_text())["autoattack"]) == 1

    # Another folder with the same classes, and this one when it has test images.
    other = photos(tmp_path, "others", each=2)
    assert eval_script.main([str(run), "--eps", "1", "--dataset", str(other)]) == 0
    fill(dataset / "test", each=2, seed=3)
    assert eval_script.main([str(run), "--eps", "1", "--dataset", str(dataset)]) == 0
    found = [(r.get("part", "test"), r["n"], r["dataset"]) for r in records(run)]
    assert found == [("validation", 4, str(dataset)), ("test", 12, str(other)), ("test", 8, str(dataset))]
    assert export.main([str(run), str(tmp_path / "out.pt")]) == 0
    assert "all 4, of those held out for validation" in (tmp_path / "out.md").read_text()


def test_held_out_images_are_not_trained_on_and_are_those_judged_by(tmp_path, short_attacks):
    dataset = photos(tmp_path, each=10)
    resolved = settings.resolve(train_flags.parse(own_run(tmp_path, dataset, "--held-out", "0.3")))
    data = load_splits(resolved)
    assert torch.bincount(data.validation.labels).tolist() == [3] * 4 and len(data.train.labels) == 28
    both = torch.cat([data.train.images, data.validation.images]).flatten(1)
    assert len(both.unique(dim=0)) == 40
    assert run_training(*own_run(tmp_path, dataset, "--held-out", "0.3", "--epochs", "1")) == 0
    candidate = load_candidate(tmp_path / "run" / "best.pt")
    assert torch.equal(load_test(candidate, None, "validation").images, data.validation.images)

    # As many of both parts: neither record takes the place of the other.
    for part in ("validation", "test"):
        assert eval_script.main([str(tmp_path / "run"), "--eps", "1", "--images", part, "--version", "custom"]) == 0
    assert [(record["part"], record["n"]) for record in records(tmp_path / "run")] == [("validation", 12), ("test", 12)]
    assert len(Results(tmp_path / "run" / "autoattack").current) == 2


def test_val_beside_test_is_validated_on_unless_a_share_is_asked_for(tmp_path):
    dataset = photos(tmp_path)
    fill(dataset / "val", each=2, seed=9)
    resolved = settings.resolve(train_flags.parse(own_run(tmp_path, dataset)))
    data = load_splits(resolved)
    assert resolved["held_out"] is None and len(data.train.labels) == 24
    assert (data.validation.images.numpy() == images_of(dataset, "val")).all()
    data = load_splits(settings.resolve(train_flags.parse(own_run(tmp_path, dataset, "--held-out", "0.5"))))
    assert len(data.train.labels) == len(data.validation.labels) == 12


def test_a_dry_run_says_what_the_images_are(tmp_path, capsys):
    assert run_training(*own_run(tmp_path, photos(tmp_path), "--image-size", "16", "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["image_size"] == 16
    for line in ("24 train, 12 test images of 4 classes, 16x16", "pictures from 8x8 to 8x8", "2 red: 6 train, 3 test"):
        assert line in printed
    assert "mean 0." in printed and "std 0." in printed and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "cifar11"], "'cifar11' is not one of cifar10, .* nor a folder or .npz file"),
        (["--dataset", "./nowhere"], "--dataset .*/nowhere: no such folder, or .npz file"),
        (["--dataset", "digits", "--image-size", "64"], "--image-size 64: is for own images; digits has its own"),
        (["--dataset", "digits", "--held-out", "0.2"], "--held-out 0.2: is for own images; digits has its own"),
        (["--image-size", "4"], "'4' is not a whole number at least 8"),
        (["--held-out", "1"], "'1' is not a number above 0 and at most 0.9"),
    ],
)
def test_flags_that_do_not_fit_are_refused_in_one_line(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    words = words if "--dataset" in words else ["--dataset", str(photos(tmp_path)), *words]
    said = refusal(capsys, *tiny(tmp_path, *words))
    assert re.search(message, said), said
    assert not (tmp_path / "run").exists()


def test_own_images_have_the_recipe_of_cifar10(tmp_path):
    dataset = str(photos(tmp_path))
    ours, theirs = (settings.resolve({"dataset": name}) for name in (dataset, "cifar10"))
    differ = {name for name in ours if ours[name] != theirs[name]}
    assert differ == {"dataset", "dataset_content", "held_out", "mean", "std"}
    short = settings.resolve({"dataset": dataset, "recipe": "short"})
    assert short["lambda_robust"] == 150 and settings.default_name(short) == "photos-dyart-wrn-28-10-swish-short"


def test_weights_go_with_the_same_classes_only(tmp_path, capsys):
    assert run_training(*own_run(tmp_path, photos(tmp_path), "--method", "clean", "--epochs", "1")) == 0
    pretrained = ["--pretrained", str(tmp_path / "run" / "best.pt"), "--epochs", "1", "--name", "next"]
    stored = load_checkpoint(tmp_path / "run" / "best.pt")["settings"]
    same = photos(tmp_path, "more", each=8)
    find_images(str(same))  # not beside the one line
    statistics = [f"--{name}={','.join(map(str, stored[name]))}" for name in ("mean", "std")]
    assert "--mean" in refusal(capsys, *own_run(tmp_path, same, *pretrained))  # other images, other statistics
    assert run_training(*own_run(tmp_path, same, *pretrained, *statistics)) == 0
    other = fill(tmp_path / "other", ("a", "b", "c", "d"))
    find_images(str(other))
    said = refusal(capsys, *own_run(tmp_path, other, *pretrained, *statistics))
    assert f"--dataset {other}: " in said and "was trained on other classes" in said
    said = refusal(capsys, str(tmp_path / "run"), "--dataset", str(other), main=eval_script.main)
    assert "was trained on other classes" in said


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_are_attacked_without_the_targeted_apgd(tmp_path, short_attacks, capsys, classes):
    names = ("blue", "red", "white")[:classes]
    fill(tmp_path / "photos" / "train", names)
    fill(tmp_path / "photos" / "test", names, each=3, seed=1)
    assert run_training(*own_run(tmp_path, tmp_path / "photos", "--epochs", "1")) == 0
    said = refusal(capsys, str(tmp_path / "run"), "--eps", "4", main=eval_script.main)
    assert f"{classes} classes: " in said and "--version few-classes" in said
    assert eval_script.main([str(tmp_path / "run"), "--eps", "4", "--version", "few-classes"]) == 0
    assert [*records(tmp_path / "run")[0]["robust_accuracy_after"]] == ["apgd-ce", "fab-t", "square"]


def test_an_archive_and_pictures_that_are_not_square_are_trained_and_attacked(tmp_path, short_attacks, capsys):
    np.savez_compressed(tmp_path / "a.npz", **arrays(gray=True))
    wide = photos(tmp_path, width=24)
    for name, dataset, size in (("npz", tmp_path / "a.npz", "8"), ("wide", wide, None)):
        words = ["--epochs", "1", "--name", name, *(["--image-size", size] if size else [])]
        assert run_training(*own_run(tmp_path, dataset, *words)) == 0
        version = ["--version", "custom"] if name == "wide" else []
        assert eval_script.main([str(tmp_path / name), "--eps", "4", "--n", "4", *version]) == 0
    said = refusal(capsys, str(tmp_path / "wide"), "--eps", "4", "--n", "4", main=eval_script.main)
    assert "24x8 images: AutoAttack's Square needs square ones; --version custom" in said
    find_images(str(tmp_path / "a.npz"))  # not beside the one line
    said = refusal(capsys, *own_run(tmp_path, tmp_path / "a.npz"))
    assert "--model wrn-10-1-swish does not take images of 5x5" in said and "--image-size N" in said


def test_a_set_larger_than_memory_trains_the_same(tmp_path, monkeypatch):
    dataset = photos(tmp_path)
    assert run_training(*own_run(tmp_path / "a", dataset)) == 0
    monkeypatch.setattr(own, "IN_MEMORY", 0)
    assert run_training(*own_run(tmp_path / "b", dataset)) == 0
    assert differences(contents(tmp_path / "a" / "run"), contents(tmp_path / "b" / "run")) == []


@pytest.mark.skipif(not MINI.exists(), reason="no ../shared/data/tiny-imagenet-mini.zip")
def test_real_tiny_imagenet_pictures_as_a_plain_folder(tmp_path, short_attacks):
    with zipfile.ZipFile(MINI) as archive:
        names = [name for name in archive.namelist() if "/train/" in name]
        wnids = sorted({name.split("/")[2] for name in names})[:6]
        for name in names:
            parts = name.split("/")
            if parts[2] in wnids and name.endswith(".JPEG"):
                part = "test" if int(name.rpartition("_")[2][:-5]) >= 20 else "train"
                path = tmp_path / "photos" / part / parts[2] / parts[-1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))
    flags = ["--image-size", "32", "--epochs", "1", "--batch-size", "32"]
    assert run_training(*own_run(tmp_path, tmp_path / "photos", *flags)) == 0
    content = load_checkpoint(tmp_path / "run" / "best.pt")["settings"]["dataset_content"]
    assert content.startswith("6x32x32-")
    assert eval_script.main([str(tmp_path / "run"), "--eps", "2", "--n", "6", "--version", "custom"]) == 0
    assert records(tmp_path / "run")[0]["test_size"] == 30
