"""Command lines: the released ones and ours against the recipes written out, bad input, and what they reach."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from folders import refused
from runs import refusal, run_training, tiny

import eval as eval_script
import train
from experiment import build, settings, train_flags
from experiment.checkpoint import load_checkpoint
from experiment.folder import Experiment
from storage.files import FileError

ROOT = Path(__file__).parents[1]

# Xu et al., 2023: every setting of DyART on CIFAR-10, and where the other recipes differ from it.
CIFAR10 = {
    "dataset": "cifar10",
    "image_size": None,
    "held_out": None,
    "dataset_content": None,
    "data_dir": str(ROOT / "data"),
    "model": "wrn-28-10-swish",
    "group_norm": False,
    "normalize": True,
    "mean": [0.4914, 0.4822, 0.4465],
    "std": [0.2471, 0.2435, 0.2616],
    "method": "dyart",
    "recipe": "paper",
    "pretrained": None,
    "pretrained_weights": None,
    "burn_in_epochs": 10,
    "burn_in_lr": 0.1,
    "burn_in_batch_size": 256,
    "epochs": 200,
    "batch_size": 256,
    "lr": 0.1,
    "scheduler": "cosinew",
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 5e-4,
    "clip_grad": 0.1,
    "tau": 0.995,
    "augment": True,
    "train_subset": None,
    "seed": 0,
    "r0": 16 / 255,
    "alpha": 3.0,
    "lambda_robust": 1000.0,
    "temperature": 5.0,
    "norm": "Linf",
    "search": "shared",
    "search_steps": 3,
    "adaptive_steps": False,
    "init_radius": None,
    "high_quality": False,
    "overshoot": 0.05,
    "beta": 6.0,
    "attack_eps": 8 / 255,
    "attack_step": 2 / 255,
    "attack_iter": 10,
    "validation_attack_iter": 40,
    "validation_size": None,
    "validation_batch_size": 512,
    "aux_data_filename": None,
    "cache_dir": None,
    "aux_data_content": None,
    "model_content": None,
    "unsup_fraction": 0.7,
    "save_every": 0,
    "track_dynamics": 0,
    "checkpoint_minutes": None,
    "device": "cuda" if torch.cuda.is_available() else "cpu",
    "amp": "none",
    "channels_last": True,
    "tf32": True,
    "compile": False,
    "cuda_graphs": False,
    "detect_anomaly": False,
    "tensorboard": False,
    "sync_batch_norm": False,
    "rules": 2,
}
TINY = {"dataset": "tiny-imagenet", "model": "preact-resnet18", "burn_in_epochs": 20, "epochs": 100}
TINY |= {"normalize": False, "mean": None, "std": None}
TINY |= {"r0": 32 / 255, "alpha": 5.0, "lambda_robust": 500.0, "clip_grad": 1.0}
GENERATED = {"aux_data_filename": "/x/1m.npz", "epochs": 800, "batch_size": 512, "lambda_robust": 800.0}
GROUP_NORM = {"group_norm": True, "scheduler": "step", "epochs": 100, "alpha": 8.0, "lambda_robust": 400.0}
GROUP_NORM |= {"clip_grad": None}
TINY_GROUP_NORM = {"group_norm": True, "lr": 0.05, "r0": 20 / 255, "alpha": 3.0, "clip_grad": None}
BURN_IN = {"method": "clean", "burn_in_epochs": 0, "scheduler": "constant", "epochs": 10, "lr": 0.1, "clip_grad": None}
BURNT_IN = {"pretrained": "/x/b.pt", "burn_in_epochs": 0}
SHORT = {"recipe": "short", "burn_in_epochs": 4, "burn_in_batch_size": 128, "epochs": 26, "batch_size": 128}
SHORT |= {"scheduler": "cyclic", "lr": 0.2, "lambda_robust": 150.0, "clip_grad": 3.0}
FAST = {"search": "fast", "search_steps": 6, "high_quality": True}
FAB = {"search": "fab", "search_steps": 20, "init_radius": 8 / 255, "overshoot": 0.0, "high_quality": True}

L2 = {"norm": "L2", "attack_eps": 128 / 255, "attack_step": 32 / 255, "r0": 1.0, "alpha": 0.2, "lambda_robust": 25.0}

OURS = {
    "": {},
    "--aux-data-filename /x/1m.npz": GENERATED,
    "--group-norm": GROUP_NORM,
    "--dataset cifar100": {"dataset": "cifar100", "mean": [0.5071, 0.4865, 0.4409], "std": [0.2673, 0.2564, 0.2762]},
    "--model wrn-28-10": {"model": "wrn-28-10", "normalize": False, "mean": None, "std": None},
    "--model wrn-28-10 --normalize": {"model": "wrn-28-10"},
    "--model wrn-28-10 --std 0.2023,0.1994,0.201": {"model": "wrn-28-10", "std": [0.2023, 0.1994, 0.2010]},
    "--mean 0,0,0 --std 1,1,1": {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]},
    "--dataset tiny-imagenet": TINY,
    "--dataset tiny-imagenet --group-norm": TINY | TINY_GROUP_NORM,
    "--method clean": BURN_IN,
    "--method clean --group-norm": BURN_IN | {"group_norm": True, "alpha": 8.0, "lambda_robust": 400.0},
    "--method clean --dataset tiny-imagenet": TINY | BURN_IN | {"epochs": 20},
    "--method clean --dataset tiny-imagenet --group-norm": TINY | TINY_GROUP_NORM | BURN_IN | {"epochs": 20},
    "--method at": {"method": "at", "burn_in_epochs": 0, "clip_grad": None},
    "--method trades --dataset tiny-imagenet": TINY | {"method": "trades", "burn_in_epochs": 0, "clip_grad": None},
    "--method mart --group-norm": GROUP_NORM | {"method": "mart", "burn_in_epochs": 0, "clip_grad": None},
    "--method n-fgsm --attack-eps 4": {"method": "n-fgsm", "burn_in_epochs": 0, "clip_grad": None}
    | {"attack_eps": 4 / 255, "attack_step": 1 / 255},
    "--method fgsm-rs --norm L2": L2 | {"method": "fgsm-rs", "burn_in_epochs": 0, "clip_grad": None},
    "--norm L2": L2,
    "--norm L2 --dataset tiny-imagenet": TINY | L2 | {"r0": 2.0},
    "--norm L2 --r0 0.5": L2 | {"r0": 0.5},
    "--attack-eps 4 --r0 16 --attack-step 0.01 --init-radius 8": {"attack_eps": 4 / 255, "attack_step": 0.01}
    | FAST
    | {"init_radius": 8 / 255},
    "--search shared": {},
    "--search fast": FAST,
    "--search fast --search-steps 3": FAST | {"search_steps": 3},
    "--recipe short": SHORT,
    "--recipe short --method at": SHORT | {"method": "at", "burn_in_epochs": 0, "clip_grad": None},
    "--recipe short --lambda-robust 70 --epochs 9": SHORT | {"lambda_robust": 70.0, "epochs": 9},
    "--recipe short --method clean": SHORT | BURN_IN | {"epochs": 4, "batch_size": 128},
    # What only the searches that stand alone know is of the faster of them.
    "--recipe short --high-quality true": SHORT | FAST,
    "--recipe short --cuda-graphs": SHORT | FAST | {"cuda_graphs": True},
    "--high-quality false": {"high_quality": False},
    "--search fast --search-steps none --overshoot 0": FAST | {"overshoot": 0.0},
    "--search fab --high-quality false": {"search": "fab", "search_steps": 20, "overshoot": 0.0, "high_quality": False},
    "--search-steps 2": {"search_steps": 2},
    "--adaptive-steps": {"adaptive_steps": True},
    "--pretrained /x/b.pt": BURNT_IN,
    "--r0 20/255 --alpha 4 --lambda-robust 300 --clip-grad none": {"r0": 20 / 255, "alpha": 4.0}
    | {"lambda_robust": 300.0, "clip_grad": None},
}
COMMON = "--data-dir data/ --tau 0.995 --weight-decay 5e-4 --nesterov true --seed 0 --batch-size-validation 512"
DYART = "--DyART true --temperature 5 --iter_FAB 20 --eps_FAB 8/255 --use_high_quality true --scheduler cosinew"
ATTACK = "--attack linf-pgd --attack-eps 8/255 --attack-step 2/255 --attack-iter 10"
SWISH = "--data cifar10s --model wrn-28-10-swish --normalize False --augment True"
PREACT = "--data tiny-imagenet --model preact-resnet18 --augment True"
# The released code's commands, in the spellings of its README; their values are those of its recipes.
RELEASED = {
    f"{SWISH} {COMMON} --clean_training true --scheduler step --epochs 22 --lr 0.1 --batch-size 256"
    " --save_intermediate_models 10": BURN_IN | {"scheduler": "step", "epochs": 22, "save_every": 10},
    f"{SWISH} {COMMON} {DYART} --h_prime_r0 16/255 --h_prime_alpha 3 --lam_robust 1000 --lr 0.1 --epochs 200"
    " --batch-size 256 --clip_grad 0.1 --pretrained /x/b.pt --fname_extra _mine": BURNT_IN | FAB,
    f"{SWISH} {COMMON} {DYART} --h_prime_r0 16/255 --h_prime_alpha 3 --lam_robust 800 --lr 0.1 --epochs 800"
    " --batch-size 512 --clip_grad 0.1 --pretrained /x/b.pt --aux-data-filename /x/1m.npz --unsup-fraction 0.7"
    " --beta -1": GENERATED | BURNT_IN | FAB,
    f"{SWISH} {COMMON} --DyART true --GroupNorm true --scheduler step --epochs 100 --h_prime_alpha 8 --lam_robust 400"
    " --pretrained /x/b.pt": GROUP_NORM | BURNT_IN,
    f"{PREACT} {COMMON} --clean_training True --scheduler step --epochs 42": TINY
    | BURN_IN
    | {"scheduler": "step", "epochs": 42},
    f"{PREACT} {COMMON} {DYART} --h_prime_r0 32/255 --h_prime_alpha 5 --lam_robust 500 --lr 0.1 --epochs 100"
    " --clip_grad 1 --pretrained /x/b.pt": TINY | BURNT_IN | FAB,
    f"{PREACT} {COMMON} {DYART} --GroupNorm True --lr 0.05 --h_prime_r0 20/255 --h_prime_alpha 3 --lam_robust 500"
    " --pretrained /x/b.pt": TINY | TINY_GROUP_NORM | BURNT_IN | FAB,
    f"{SWISH} {COMMON} {ATTACK} --DyART False --beta -1": {"method": "at", "burn_in_epochs": 0, "clip_grad": None},
    f"{SWISH} {COMMON} {ATTACK} --DyART False --beta 6.0": {"method": "trades", "burn_in_epochs": 0, "clip_grad": None},
    f"{SWISH} {COMMON} {ATTACK} --DyART False --beta 6.0 --mart": {
        "method": "mart",
        "burn_in_epochs": 0,
        "clip_grad": None,
    },
    f"{PREACT} {COMMON} {ATTACK} --DyART False --beta -1": TINY
    | {"method": "at", "burn_in_epochs": 0, "clip_grad": None},
    f"{PREACT} {COMMON} {ATTACK} --DyART False --beta 5 --mart": TINY
    | {"method": "mart", "burn_in_epochs": 0, "clip_grad": None, "beta": 5.0},
    "--attack l2-pgd --attack-eps 0.5": L2 | {"attack_eps": 0.5, "attack_step": 0.125},
    "--resume False --clean_training false --DyART true": {},
}


@pytest.mark.parametrize(("command", "expected"), [*OURS.items(), *RELEASED.items()])
def test_a_command_line_resolves_to_the_recipe(command, expected, monkeypatch):
    monkeypatch.chdir(ROOT)  # for --data-dir data/
    assert settings.resolve(train_flags.parse(shlex.split(command))) == CIFAR10 | expected


def test_released_booleans_are_read_in_every_spelling():
    for text in ("True", "true", "TRUE", "yes", "1", "on"):
        assert train_flags.parse(["--nesterov", text])["nesterov"] is True
    for text in ("False", "false", "no", "0", "off"):
        assert train_flags.parse(["--nesterov", text])["nesterov"] is False
    assert train_flags.parse(["--GroupNorm"]) == {"group_norm": True}


def test_the_released_spelling_of_resume():
    assert train_flags.parse(["--resume", "True", "--resume_fname", "runs/a"]) == {"resume": "runs/a"}
    assert train_flags.parse(["--resume", "False", "--resume_fname", "runs/a"]) == {}
    assert train_flags.parse(["--resume", "runs/a"]) == {"resume": "runs/a"}


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("runs/a", {"target": "runs/a", "norm": "Linf", "eps": ["8/255"], "version": "standard"}),
        (
            "--fname_input runs/a --eps_eval 8 --norm_attack Linf --batch_size_for_eval 1500 -v custom",
            {"target": "runs/a", "norm": "Linf", "eps": ["8/255"], "version": "custom", "batch_size": 1500}
            | {"attacks": ["apgd-ce", "apgd-t", "fab-t"]},
        ),
        (
            "--fname_input runs/a --eps_eval 0.5 --norm_attack L2 --data cifar10s --GroupNorm true -v standard",
            {"target": "runs/a", "norm": "L2", "eps": ["0.5"], "dataset": "cifar10", "group_norm": True}
            | {"attacks": ["apgd-ce", "apgd-t", "fab-t", "square"]},
        ),
    ],
)
def test_a_released_eval_command_line(command, expected, capsys):
    assert eval_script.main([*shlex.split(command), "--dry-run"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert {name: shown[name] for name in expected} == expected


def test_a_dry_run_prints_the_settings_and_touches_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_training("--model", "wrn-10-1-swish", "--h_prime_r0", "12/255", "--dry-run", "--output-dir", "new") == 0
    assert yaml.safe_load(capsys.readouterr().out) == CIFAR10 | {"model": "wrn-10-1-swish", "r0": 12 / 255}
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_in_args_yaml_is_accepted_again(tmp_path):
    for command in [*OURS, *RELEASED]:
        settings.check_stored(settings.resolve(train_flags.parse(shlex.split(command))), "args.yaml")
    for name, value, message in [
        ("lr", -1.0, "--lr: '-1.0' is not a number above 0"),
        ("model", "wrn-9-9", "wrn-9-9"),
        ("scheduler", "cosin", "invalid choice: 'cosin'"),
        ("epochs", 1.5, "'epochs' must be int"),
    ]:
        with pytest.raises(FileError, match="args.yaml: .*" + message):
            settings.check_stored(CIFAR10 | {name: value}, "args.yaml")


def test_a_folders_name_tells_what_differs_from_the_recipe():
    def name(command: str) -> str:
        return settings.default_name(settings.resolve(train_flags.parse(shlex.split(command))))

    assert name("") == "cifar10-dyart-wrn-28-10-swish"
    assert name("--group-norm --lr 0.1 --device cpu") == "cifar10-dyart-wrn-28-10-swish-groupnorm"
    assert name("--search fab --device cpu") == "cifar10-dyart-wrn-28-10-swish-search=fab"
    assert name("--recipe short --seed 1") == "cifar10-dyart-wrn-28-10-swish-short-seed=1"
    assert name("--search fast --search-steps 3") == "cifar10-dyart-wrn-28-10-swish-search-steps=3-search=fast"
    assert name("--overshoot 0") == "cifar10-dyart-wrn-28-10-swish-overshoot=0"
    assert name("--method n-fgsm") == "cifar10-n-fgsm-wrn-28-10-swish"
    assert name("--method fgsm-rs --attack-eps 4") == "cifar10-fgsm-rs-wrn-28-10-swish-attack-eps=0.01569"
    assert name("--data tiny-imagenet --DyART False --beta 6") == "tiny-imagenet-trades-preact-resnet18"
    assert name("--lr 0.03 --train-subset 99 --aux-data-filename a.npz") == (
        "cifar10-dyart-wrn-28-10-swish-generated-lr=0.03-train-subset=99"
    )


# --- Bad input --------------------------------------------------------------------------------------------------------

SWITCHES = ["group-norm", "GroupNorm", "normalize", "nesterov", "augment", "high-quality", "use_high_quality"]
SWITCHES += ["adaptive-steps"]
SWITCHES += ["sync-batch-norm", "channels-last", "tf32", "compile", "cuda-graphs", "detect-anomaly", "dry-run"]
SWITCHES += ["tensorboard"]
SWITCHES += ["clean_training", "DyART", "mart"]
POSITIVE = ["burn-in-lr", "lr", "clip-grad", "clip_grad", "r0", "h_prime_r0", "temperature", "attack-eps"]
POSITIVE += ["attack-step", "checkpoint-minutes", "process-timeout-minutes"]
COUNTS = ["burn-in-batch-size", "epochs", "batch-size", "train-subset", "search-steps", "iter_FAB", "attack-iter"]
COUNTS += ["validation-attack-iter", "validation-size", "validation-batch-size", "batch-size-validation"]
FROM_ZERO = ["overshoot", "alpha", "h_prime_alpha", "lambda-robust", "lam_robust"]
FROM_ZERO += ["init-radius", "eps_FAB", "weight-decay"]
CHOICES = ["method", "scheduler", "norm", "search", "if-exists", "amp", "attack"]

BAD = {
    **{name: [("maybe", "true or false")] for name in SWITCHES},
    **{
        name: [(text, "a number above 0") for text in ("0", "-1", "nan", "inf", "1/0", "1/2/3", "x", "")]
        for name in POSITIVE
    },
    **{name: [(t, "a whole number at least 1") for t in ("0", "-3", "1.5", "1e3", "9" * 400)] for name in COUNTS},
    **{
        name: [(text, "a number at least 0") for text in ("-0.1", "nan", "8/0", "1/2/3", "9" * 400 + "/1")]
        for name in FROM_ZERO
    },
    **{name: [("other", "choose from")] for name in CHOICES},
    **{
        name: [(text, "a whole number at least 0") for text in ("-1", "0.5")]
        for name in ("burn-in-epochs", "save-every", "track-dynamics")
    },
    "save_intermediate_models": [("ten", "a whole number at least 0")],
    "seed": [("-1", "at least 0"), ("4294967296", "at most 4294967295")],
    "momentum": [("1", "at most 0.999"), ("-0.1", "at least 0")],
    "tau": [("1", "at most 0.999999"), ("-0.1", "at least 0")],
    "unsup-fraction": [("1.1", "at most 1"), ("-0.1", "at least 0")],
    "beta": [("0", "above 0"), ("-2", "at least -1"), ("-0.5", "above 0"), ("x", "a number")],
    "dataset": [("cifar", "cifar10, cifar100, tiny-imagenet, digits")],
    "data": [("mnist", "cifar10, cifar100, tiny-imagenet, digits"), ("/mnist", "no such folder, or .npz file")],
    "image-size": [("0", "at least 8"), ("7.5", "at least 8"), ("32", "digits has its own")],
    "held-out": [("0", "above 0"), ("1", "at most 0.9"), ("0.1", "digits has its own")],
    "dataset-content": [("5x8x8", "does not tell images")],
    "model": [
        ("wrn-29-10", "wrn-D-W"),
        ("wrn-28-0", "wrn-D-W"),
        ("vgg16", "preact-resnet18-swish, preact-resnet34-swish"),
    ],
    "device": [("tpu", ""), ("cuda:99", "")],
    "name": [("a/b", "--output-dir"), ("..", "--output-dir")],
    "name-extra": [("/a", "--output-dir")],
    "fname_extra": [("/a", "--output-dir")],
    "mean": [(text, "three numbers with commas") for text in ("1,2", "1,2,3,4", "a,b,c", "nan,0,0", "")],
    "std": [("0.2", "three numbers with commas")],
    "recipe": [("long", "short")],
    "rules": [("0", "at least 1"), ("3", "at most 2")],
    "pretrained": [("missing.pt", "no such file or folder")],
    "pretrained-weights": [("ema", "--pretrained FILE")],
    "weights": [("ema", "--pretrained FILE")],
    "aux-data-filename": [("missing.npz", "no such file")],
    "output-dir": [("/dev/null/x", "cannot write")],
    "resume": [("missing", "no such experiment folder")],
    "resume_fname": [("a", "--resume True")],
}
FREE = {"model-content", "data-dir", "cache-dir", "aux-data-content", "help"}  # any folder may hold data, or is made to


def test_every_flag_has_bad_values_here():
    flags = {
        flag[2:] for action in train_flags.build_parser()._actions for flag in action.option_strings if flag[:2] == "--"
    }
    assert set(BAD) == flags - FREE


@pytest.fixture
def nothing_is_trained(monkeypatch):
    """What is accepted after all ends here, and not after hours."""
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("the command was accepted"))


@pytest.mark.usefixtures("nothing_is_trained")
@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_refused_in_one_line_that_names_it(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for value, accepted in BAD[name]:
        base = [] if name in ("resume", "dataset", "data") else ["--dataset", "digits"]
        base += [] if name in ("resume", "model") else ["--model", "wrn-10-1-swish"]
        error = refusal(capsys, *base, f"--{name}={value}")
        assert value in error and accepted in error
        assert name in ("resume", "device") or f"--{name}" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nothing_is_trained")
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--method at --DyART true", ["--DyART true", "--method at"]),
        ("--method dyart --DyART false", ["--DyART False", "--method dyart"]),
        ("--clean_training true --DyART true", ["--DyART true", "--method clean"]),
        ("--method trades --mart", ["--mart", "--method trades"]),
        ("--method trades --beta -1", ["--beta -1", "trades", "above 0"]),
        ("--DyART False --mart --beta -1", ["--beta -1", "mart", "above 0"]),
        ("--method n-fgsm --attack-iter 10 --dry-run", ["--attack-iter 10", "n-fgsm", "one step"]),
        ("--method fgsm-rs --attack-step 2/255 --dry-run", ["--attack-step 2/255", "fgsm-rs", "--attack-eps"]),
        ("--search shared --high-quality true --dry-run", ["--high-quality true", "fast or fab", "shared"]),
        ("--search fast --adaptive-steps true --dry-run", ["--adaptive-steps true", "shared", "fast"]),
        ("--cuda-graphs --adaptive-steps true --dry-run", ["--adaptive-steps true", "shared", "fast"]),
        ("--recipe short --norm L2 --dry-run", ["--recipe short", "in Linf"]),
        ("--recipe short --group-norm --dry-run", ["--recipe short", "GroupNorm"]),
        ("--recipe short --dataset tiny-imagenet --dry-run", ["--recipe short", "cifar10, cifar100"]),
        ("--search shared --init-radius 8 --dry-run", ["--init-radius 8", "fast or fab", "shared"]),
        ("--norm L2 --attack linf-pgd", ["--attack linf-pgd", "--norm L2"]),
        ("--search-steps 5 --iter_FAB 20", ["--iter_FAB 20", "--search-steps 5"]),
        ("--init-radius 0 --eps_FAB 8/255", ["--eps_FAB", "--init-radius 0"]),
        ("--method clean --burn-in-epochs 3", ["--burn-in-epochs 3", "--epochs"]),
        ("--pretrained x.pt --burn-in-epochs 3", ["--burn-in-epochs 3", "--pretrained"]),
        ("--unsup-fraction 0.5", ["--unsup-fraction 0.5", "--aux-data-filename"]),
        ("--momentum 0.8", ["--momentum 0.8", "cosinew", "step"]),
        ("--resume True", ["--resume True", "--resume_fname"]),
        ("--resume a --resume_fname b", ["--resume_fname b", "--resume b"]),
        ("--validation-size 201", ["--validation-size 201", "200 images are held out"]),
        ("--train-subset 100000", ["--train-subset 100000"]),
        ("--epoch 3", ["--epoch"]),
        ("digits", ["digits"]),
    ],
)
def test_contradictions_are_refused_and_nothing_is_made(command, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    error = refusal(capsys, "--dataset", "digits", "--model", "wrn-10-1-swish", *shlex.split(command))
    assert all(word in error for word in words), error
    assert list(tmp_path.iterdir()) == []


# --- What the flags reach ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        "--group-norm --method dyart",
        "--group-norm --method mart --scheduler step",
        "--method at --scheduler cyclic --normalize --model wrn-10-1",
        "--method trades --scheduler cosine --norm L2",
        "--method clean --scheduler constant --model resnet18",
        "--method clean --scheduler cosinew --model preact-resnet18-swish",
        "--method clean --scheduler cosinew --save_intermediate_models 1",
    ],
)
def test_every_part_is_reached_from_the_command_line(flags, tmp_path):
    small = "--train-subset 16 --validation-size 4 --validation-attack-iter 1 --attack-iter 2 --epochs 1"
    assert run_training(*tiny(tmp_path, *small.split(), *flags.split())) == 0
    experiment = Experiment.open(tmp_path / "run")
    chosen = train_flags.parse(flags.split())
    assert {name: experiment.settings[name] for name in chosen} == chosen
    (row,) = experiment.read_metrics()
    assert np.isfinite(row["loss"]) and row["lr"] > 1e-3
    weights = load_checkpoint(tmp_path / "run" / ("epoch_0001.pt" if "save" in flags else "best.pt"))["average"]
    assert any("running_mean" in name for name in weights) != ("--group-norm" in flags)


def test_cifar100_has_a_model_of_100_classes():
    chosen = settings.resolve(
        train_flags.parse(["--data", "cifar100", "--model=wrn-10-1", "--normalize", "--GroupNorm"])
    )
    model = build.build_model(chosen)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 100)
    assert any(isinstance(module, torch.nn.GroupNorm) for module in model.modules())


def test_generated_data_makes_epochs_of_the_full_training_size(tmp_path):
    rng = np.random.default_rng(0)
    file = tmp_path / "generated.npz"
    np.savez(file, image=rng.integers(256, size=(20, 32, 32, 3), dtype=np.uint8), label=rng.integers(10, size=20))
    chosen = settings.resolve(train_flags.parse(["--dataset", "digits", "--aux-data-filename", str(file)]))
    data = build.load_splits(chosen | {"batch_size": 100})
    # Of 1,397 training images 200 are held out: 14 batches, which by those left would be 12.
    assert len(data.train.labels) == 1197 and data.generated["steps_per_epoch"] == 14
    flags = ["--aux-data-filename", str(file), "--unsup-fraction", "0.5", "--epochs", "1", "--method", "clean"]
    assert run_training(*tiny(tmp_path, *flags)) == 0


def test_settings_are_held_against_their_types() -> None:
    spec = {"lr": float, "epochs": int, "eps": list, "pretrained": (str, type(None)), "augment": bool}
    good = {"lr": 1, "epochs": 3, "eps": [], "pretrained": None, "augment": False}
    settings.check_settings(good, spec)
    cases = {
        "unknown setting 'epoch' .did you mean 'epochs'.; setting": {"epoch": 3, "epochs": ...},
        "setting 'lr' is missing": {"lr": ...},
        r"'lr' must be float, is 'fast' \(str\)": {"lr": "fast"},
        r"'lr' must be float, is 'True' \(bool\)": {"lr": True},
        r"'epochs' must be int, is '3.0' \(float\)": {"epochs": 3.0},
        r"'pretrained' must be str or null, is '7' \(int\)": {"pretrained": 7},
        "unknown setting 'zzz'$": {"zzz": 1},
    }
    for pattern, change in cases.items():
        changed = {key: value for key, value in {**good, **change}.items() if value is not ...}
        if "epoch" in change:
            pattern = "setting 'epochs' is missing; unknown setting 'epoch' .did you mean 'epochs'.."
        with refused("^run/args.yaml: " + pattern):
            settings.check_settings(changed, spec, "run/args.yaml")
