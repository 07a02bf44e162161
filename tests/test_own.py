"""Models of one's own: from a file or a module, looked at before they are trained, not run because a file says so."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from company import largest_difference, train_together
from evaluations import ShortAutoAttack
from runs import contents, differences, files, refusal, run_training, tiny
from safetensors.torch import load_file, save_file
from torch import nn

import analyze
import bench
import eval as eval_script
import export
from analysis.subject import autoattack_points
from evaluation import attack
from evaluation.candidate import load_candidate
from evaluation.results import Results
from experiment.build import build_model, build_optimizer, stages_of
from experiment.checkpoint import load_checkpoint
from experiment.folder import Experiment
from experiment.settings import default_name, resolve
from experiment.train_flags import parse
from models import create_model
from models.own import check_used, short_name
from models.weights import load_weights

ROOT = Path(__file__).parents[1]

HEAD = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, **options):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=4, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, num_classes)
        self.options = options

    def features(self, x):
        return self.norm(self.conv(x)).relu()

    def forward(self, x):
        return self.head(self.drop(self.features(x).mean((2, 3))))
"""
GOOD = HEAD + "\n\ndef small(num_classes):\n    return Net(num_classes)\n"


def written(folder: Path, text: str = GOOD, name: str = "nets.py") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def own(path: Path, function: str = "small") -> list[str]:
    return ["--model", f"{path}:{function}"]


def settings(*argv: str) -> dict[str, Any]:
    return resolve(parse(["--dataset", "digits", "--device", "cpu", *argv]))


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("/a/b/nets.py:small", "nets.py:small"),
        ("nets.py:small", "nets.py:small"),
        ("torchvision.models:resnet18", "torchvision.models:resnet18"),
        ("timm:create", "timm:create"),
    ],
)
def test_a_file_goes_without_its_folder(text, name):
    assert short_name(text) == name


@pytest.mark.parametrize("text", ["a/b:small", "nets.py:", ":small", "nets.py:a b", "nets.py:a.b", "a..b:f", ".py:f"])
def test_what_names_no_function_is_refused(text, capsys, tmp_path):
    assert "FILE.py" not in text
    error = refusal(capsys, "--model", text, "--output-dir", str(tmp_path))
    assert "path/to/file.py:function or package.module:function" in error and repr(text) in error


def test_a_name_that_no_command_line_has_given_runs_nothing(tmp_path):
    path = written(tmp_path, "raise RuntimeError('was run')", "never.py")
    for name in ("never.py:small", f"{path}:small", "antigravity:fly"):
        with pytest.raises(ValueError, match="code is not run because a file names it: give --model"):
            create_model(name)
        with pytest.raises(ValueError, match="^args.yaml: .* give --model"):
            check_used(name, "args.yaml")
    assert "antigravity" not in sys.modules


# --- What does not fit ------------------------------------------------------------------------------------------------


def variant(body: str, of: str = "Net(num_classes)", before: str = "") -> str:
    """A file whose function returns the net with another forward."""
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    return f"{HEAD}\n{before}\n\nclass Other(Net):\n    def forward(self, x):\n{lines}\n\n" + (
        f"def small(num_classes):\n    return {of.replace('Net(', 'Other(')}\n"
    )


MADE = "def small(num_classes):\n    net = Net(num_classes)\n    {}\n    return net\n"
LOGITS = "self.head(self.features(x).mean((2, 3)))"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def other(num_classes): pass\nlimit = 3\n", "has no function small; it has other$"),
        ("def small(classes): pass", r"with num_classes=10 it raises TypeError: small\(\) got an unexpected keyword"),
        ("def small(num_classes): return 1 / 0", r"raises ZeroDivisionError: division by zero \(line 1 of nets.py\)"),
        ("def small(num_classes): exit(3)", r"raises SystemExit: 3"),
        ("def small(num_classes): return 7", "returns a int, not a torch.nn.Module"),
        ("import nothing_of_this_name", r"cannot be imported: ModuleNotFoundError: No module named 'nothing_of"),
        ("def small(num_classes:\n", "cannot be imported: SyntaxError"),
        ("raise SystemExit(0)", r"cannot be imported: SystemExit: 0 \(line 1 of nets.py\)"),
        (variant(f"return {LOGITS}, x"), "returns a tuple of 2 in eval mode: return the logits alone"),
        (variant(f"return {{'logits': {LOGITS}}}"), "returns a dict of 1 in eval mode"),
        (
            variant(f"return ({LOGITS}, x) if self.training else {LOGITS}"),
            "returns a tuple of 2 in train mode: return the logits alone",
        ),
        (variant(f"return {LOGITS}.softmax(1)"), r"returns probabilities in eval mode \(each row sums to 1\)"),
        (variant(f"return {LOGITS}", "Net(1000)"), r"returns \(4, 1000\) in eval mode .*not \(4, 10\): is num_classes"),
        (variant(f"return {LOGITS}.squeeze()"), r"returns \(10,\) in eval mode .*\(1, 3, 32, 32\).* squeeze"),
        (variant(f"return {LOGITS} * float('nan')"), "no finite numbers"),
        (variant(f"return {LOGITS}.argmax(1, keepdim=True).expand(-1, 10)"), "torch.int64 values in eval mode"),
        (variant(f"return {LOGITS}.detach()"), "no gradient in the image"),
        (variant("with torch.no_grad():\n    h = self.features(x)\nreturn self.head(h.mean((2, 3)))"), "no gradient"),
        (variant(f"x = (x * 255).round() / 255\nreturn {LOGITS}"), "gradient of 0 in the image"),
        (variant(f"return {LOGITS} + torch.nn.functional.dropout(x.mean())"), "differs by .* two passes in eval mode"),
        (variant("self.norm.train()\nreturn " + LOGITS), "gives an image other logits in eval mode where other images"),
        (
            variant("self.norm.num_batches_tracked += 1\nreturn " + LOGITS),
            "changes norm.num_batches_tracked in eval mode",
        ),
        (
            variant("return self.head(self.features(x).view(len(x), -1)[:, :8])"),
            "reshape in the place of view, or give",
        ),
        (variant("return self.head(x)"), r"fails in eval mode on images \(4, 3, 32, 32\): RuntimeError: mat1 and mat2"),
        (variant(f"return {LOGITS}", "Net(num_classes).half()"), "parameter conv.weight torch.float16: expected"),
        (variant(f"return {LOGITS}", "Net(num_classes).to('meta')"), "conv.weight on the meta device"),
        (variant(f"return {LOGITS}", "Net(num_classes).requires_grad_(False)"), "has no parameters to train"),
        (HEAD + "def small(num_classes): return nn.Sequential(nn.LazyConv2d(8, 3))", "weights without a shape yet"),
        (
            HEAD
            + "def small(num_classes):\n    net = Net(num_classes)\n    net.made = (i for i in [1])\n    return net",
            "cannot be copied, as the weight average needs it: TypeError",
        ),
    ],
)
def test_what_does_not_fit_is_named_in_one_line_before_a_folder_is_made(tmp_path, capsys, text, said):
    path = written(tmp_path / "code", text)
    error = refusal(capsys, *tiny(tmp_path / "out", *own(path)))
    assert re.search(said, error), error
    assert f"--model {path}" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--normalize"], "--normalize: a model of your own, nets.py:small, normalizes inside it"),
        (["--mean", "0,0,0"], "--mean: a model of your own"),
        (["--model", "nowhere/nets.py:small"], "--model nowhere/nets.py: no such file"),
        (["--model", "torchvision.models:resnet_18"], "has no function resnet_18"),
        (["--model", "torchvision.models:googlenet"], "returns a GoogLeNetOutputs of 3 in train mode"),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet:FutureWarning")
def test_flags_that_do_not_go_with_it_are_refused(tmp_path, capsys, argv, said):
    error = refusal(capsys, *tiny(tmp_path / "out", *own(written(tmp_path / "code")), *argv))
    assert said in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        variant("x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / 0.225\nreturn " + LOGITS),
        HEAD
        + "def small(num_classes):\n    net = Net(num_classes)\n    nn.init.zeros_(net.head.weight)\n    return net",
        HEAD + "class small(Net): pass",  # A class is called like a function.
        HEAD + "from beside import small",
        # Without BatchNorm, in a layout where the images are flattened by view.
        HEAD + "def small(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes))",
    ],
)
def test_what_fits_is_taken_and_left_as_it_was(tmp_path, text):
    written(tmp_path, GOOD, "beside.py")
    values = settings(*own(written(tmp_path, text, "mine.py")))
    torch.manual_seed(3)
    before = create_model("mine.py:small", 10).state_dict()
    state = torch.get_rng_state()
    torch.manual_seed(3)
    model = build_model(values)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)  # The look at it has drawn nothing.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())


def test_group_norm_takes_the_place_of_plain_batch_norm_only(tmp_path, capsys):
    text = GOOD + "\n\nclass ActNorm(nn.BatchNorm2d):\n    pass\n\n"
    text += MADE.replace("small", "act").format("net.norm = ActNorm(8)")
    path = written(tmp_path, text + MADE.replace("small", "none").format("net.norm = nn.Identity()"))
    model = build_model(settings(*own(path), "--group-norm"))
    assert type(model.norm) is nn.GroupNorm and model.norm.num_groups == 8
    for function, said in (("act", "place of norm, a ActNorm, which is more"), ("none", "has no BatchNorm2d that")):
        assert said in refusal(capsys, *tiny(tmp_path / "out", *own(path, function), "--group-norm"))


def test_weight_decay_is_on_all_that_is_trained(tmp_path):
    path = written(tmp_path, GOOD + MADE.replace("small", "part").format("net.conv.requires_grad_(False)"))
    for function in ("small", "part"):
        values = settings(*own(path, function), "--weight-decay", "0.01")
        model = build_model(values)
        optimizer = build_optimizer(model, stages_of(values)[-1], values)
        decayed = {id(p) for group in optimizer.param_groups for p in group["params"] if group["weight_decay"] == 0.01}
        assert {id(p) for p in model.parameters() if p.requires_grad} <= decayed


def test_the_folder_is_named_after_file_and_function(tmp_path):
    assert default_name(settings(*own(written(tmp_path)))) == "digits-dyart-nets-small"
    assert (
        default_name(settings("--model", "torchvision.models:resnet18")) == "digits-dyart-torchvision.models-resnet18"
    )


# --- All scripts work on it -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of a trained model, and its code."""
    root = tmp_path_factory.mktemp("own")
    path = written(root / "code")
    assert run_training(*tiny(root, *own(path), "--burn-in-epochs", "1")) == 0
    return root / "run", path


def test_what_is_kept_of_it_is_the_short_name_and_the_content(trained):
    folder, path = trained
    values = yaml.safe_load((folder / "args.yaml").read_text())
    assert values["model"] == "nets.py:small" and not values["normalize"]
    assert values["model_content"] == subprocess.run(["sha256sum", path], capture_output=True, text=True).stdout[:64]
    assert str(path.parent) not in (folder / "args.yaml").read_text()


def test_a_resumed_run_goes_on_bit_for_bit_from_wherever_the_code_lies(trained, tmp_path, caplog):
    folder, path = trained
    moved = written(tmp_path / "elsewhere")
    assert run_training(*tiny(tmp_path, *own(path), "--burn-in-epochs", "1", "--epochs", "1")) == 0
    state = load_checkpoint(tmp_path / "run" / "latest.pt")
    del state
    # One epoch of the whole run, as if it had been cut there.
    cut = tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("train.Signals.check", lambda self: None)
        patched.setattr("train.end_epoch", _stop_after(2))
        with pytest.raises(KeyboardInterrupt):
            run_training(*tiny(cut, *own(path), "--burn-in-epochs", "1"))
    assert run_training("--resume", str(cut / "run"), *own(moved)) == 0
    assert differences(contents(folder), contents(cut / "run")) == []
    assert "is not the one" not in caplog.text


def _stop_after(epochs: int) -> Any:
    import train

    usual, calls = train.end_epoch, []

    def end_epoch(*args: Any, **kwargs: Any) -> None:
        usual(*args, **kwargs)
        calls.append(1)
        if len(calls) == epochs:
            raise KeyboardInterrupt

    return end_epoch


def test_other_code_under_the_same_name_is_warned_of(trained, tmp_path, caplog, capsys):
    folder, _ = trained
    other = written(tmp_path, GOOD + "# changed\n")
    export.main([str(folder), str(tmp_path / "out.pt"), *own(other)])
    assert f"--model nets.py:small: the file is not the one that {folder / 'best.pt'} was trained with" in caplog.text
    bigger = written(tmp_path, GOOD.replace("8", "9"), "bigger.py")
    error = refusal(capsys, "--resume", str(folder), *own(bigger))
    assert "runs with nets.py:small" in error


def test_all_scripts_work_on_it(trained, tmp_path, monkeypatch, capsys):
    folder, path = trained
    monkeypatch.setattr(attack, "AutoAttack", ShortAutoAttack)
    model, out = own(path), str(tmp_path)
    small = ["--n", "8", "--batch-size", "4", "--device", "cpu"]
    assert eval_script.main([str(folder), *model, *small, "--eps", "1", "--output-dir", out]) == 0
    few = ["--examples", "2", "--batch-size", "16", "--device", "cpu", "--methods", "clean", "dyart"]
    assert analyze.main([str(folder), *model, *few, "--output-dir", out, "--search-steps", "2"]) == 0
    assert bench.main([*model, "--smoke", "--device", "cpu", "--output", str(tmp_path / "b.json")]) == 0
    for suffix in ("pt", "safetensors"):
        assert export.main([str(folder), str(tmp_path / f"as-{suffix}.{suffix}"), *model]) == 0
        assert "nets.py:small" in (tmp_path / f"as-{suffix}.md").read_text()


def test_records_are_of_the_code_that_made_the_model(trained, tmp_path, monkeypatch, capsys):
    """A record does not pass for one of edited code, whose weights are the same; and counts again when it is back."""
    monkeypatch.setattr(attack, "AutoAttack", ShortAutoAttack)
    folder, path = trained
    copy = shutil.copytree(folder, tmp_path / "run")
    edited = written(tmp_path / "edited", GOOD.replace(".mean((2, 3))", ".amax((2, 3))"))
    small = ["--n", "4", "--batch-size", "4", "--device", "cpu", "--eps", "1", "--version", "custom"]

    def evaluated(code: Path) -> tuple[str, list[str]]:
        capsys.readouterr()
        assert eval_script.main([str(copy), *own(code), *small]) == 0
        return capsys.readouterr().out, [r["model_content"] for r in Results(copy / "autoattack").current]

    before, after = (hashlib.sha256(code.read_bytes()).hexdigest() for code in (path, edited))
    assert evaluated(path)[1] == [before]
    for code, cited in ((path, 1), (edited, 0)):
        identity = load_candidate(copy / "best.pt", None, {"model": f"{code}:small"}).identity
        assert len(autoattack_points(Results(copy / "autoattack"), identity, "Linf")) == cited
        export.main([str(copy), str(tmp_path / "out.pt"), *own(code), "--force"])
        assert (tmp_path / "out.md").read_text().count("| AutoAttack custom") == cited
    said, current = evaluated(edited)
    assert "what was found before is of other code of the model; starting again" in said and current == [after]
    said, current = evaluated(path)
    assert "as evaluated before" in said and current == [before]
    assert len(Results(copy / "autoattack").records) == 2


def test_an_evaluation_by_several_processes_finds_the_same(trained, tmp_path):
    """Their models come by pickle, whose classes stand in the file."""
    folder, path = trained
    common = ["--n", "3", "--eps", "1", "2", "--version", "custom", "--device", "cpu", "--batch-size", "3"]
    found = []
    for jobs in ("1", "2"):
        out = tmp_path / jobs
        command = [sys.executable, ROOT / "eval.py", folder, *own(path), *common, "--jobs", jobs, "--output-dir", out]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        records = yaml.safe_load((out / "run.autoattack.json").read_text())
        found.append(sorted((r["eps_text"], r["clean_accuracy"], r["robust_accuracy"]) for r in records))
    assert found[0] == found[1] and len(found[0]) == 2


HOSTILE = "from pathlib import Path\nPath({marker!r}).write_text('was run')\ndef small(num_classes): pass\n"


@pytest.mark.parametrize("form", ["nets.py:small", "/abs/nets.py:small", "hostile_nets:small"])
def test_code_that_a_file_names_is_not_run(trained, tmp_path, monkeypatch, capsys, form):
    """Neither by args.yaml nor by a checkpoint, in whichever folder the code lies and the script is started."""
    marker = tmp_path / "marker"
    folder = tmp_path / "run"
    folder.mkdir()
    for name, content in files(trained[0]).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    form = form.replace("/abs", str(folder))
    for name in ("nets.py", "hostile_nets.py"):
        (folder / name).write_text(HOSTILE.format(marker=str(marker)))
    values = yaml.safe_load((folder / "args.yaml").read_text()) | {"model": form}
    (folder / "args.yaml").write_text(yaml.safe_dump(values))
    from experiment.checkpoint import save_checkpoint

    for name in ("best", "latest"):
        state = load_checkpoint(folder / f"{name}.pt")
        save_checkpoint(folder / f"{name}.pt", {**state, "settings": {**state["settings"], "model": form}})
    monkeypatch.chdir(folder)
    monkeypatch.setattr("models.own._USED", {})
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    before = files(folder)
    said = "code is not run because a file names it: give --model"
    assert said in refusal(capsys, "--resume", str(folder))
    assert said in refusal(capsys, "--resume", str(folder), "--dry-run")
    assert said in refusal(capsys, str(folder), "--output-dir", str(tmp_path / "e"), main=eval_script.main)
    assert said in refusal(capsys, str(folder / "best.pt"), "--output-dir", str(tmp_path / "e"), main=eval_script.main)
    assert said in refusal(capsys, str(folder), "--output-dir", str(tmp_path / "a"), main=analyze.main)
    assert said in refusal(capsys, str(folder), "--output", str(tmp_path / "b.json"), main=bench.main)
    assert said in refusal(capsys, str(folder), str(tmp_path / "out.pt"), main=export.main)
    wanted = tiny(tmp_path / "out", "--pretrained", str(folder / "best.pt"))
    assert "was trained with --model" in refusal(capsys, *wanted)
    assert not marker.exists()
    assert files(folder) == before


def test_another_model_than_the_folders_is_refused(trained, tmp_path, capsys):
    folder, path = trained
    wrong = ["--model", "wrn-10-1"]
    assert "runs with nets.py:small" in refusal(capsys, "--resume", str(folder), *wrong, *[])
    error = refusal(capsys, str(folder), *wrong, "--output-dir", str(tmp_path), main=eval_script.main)
    assert "was trained with --model nets.py:small" in error


# --- torchvision's, timm's --------------------------------------------------------------------------------------------


def test_torchvisions_resnet18_is_trained(tmp_path):
    """Its last maps of 32 x 32 images are 1 x 1: of a single image BatchNorm takes no variance there."""
    argv = tiny(tmp_path, "--model", "torchvision.models:resnet18", "--epochs", "1", "--train-subset", "17")
    assert run_training(*argv, "--temperature", "1000") == 0  # whose second batch is one image
    state = load_checkpoint(tmp_path / "run" / "best.pt")
    assert {"conv1.weight", "layer4.1.bn2.running_var", "fc.bias"} <= state["average"].keys()


def test_timms_resnet18_is_trained(tmp_path):
    pytest.importorskip("timm")
    text = "import timm\n\ndef small(num_classes): return timm.create_model('test_resnet', num_classes=num_classes)\n"
    argv = tiny(tmp_path, *own(written(tmp_path / "code", text, "of_timm.py")), "--epochs", "1")
    assert run_training(*argv, "--validation-size", "8") == 0


# --- Others' weights --------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
        self.register_buffer("std", torch.full((3, 1, 1), 0.25))
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone((x - self.mean) / self.std)


def wrapped(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = Wrapped()
    model(torch.rand(2, 3, 8, 8))
    return model


def loads(model: nn.Module, state: dict[str, torch.Tensor], expected: nn.Module, tolerance: float = 0.0) -> None:
    load_weights(model, state, "file.pt")
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module.model.", "a.b._orig_mod.c.", "1."])
def test_a_models_own_names_are_found_behind_any_prefix(prefix):
    """Also where it keeps a mean and std of its own."""
    state = {prefix + name: value for name, value in wrapped(0).state_dict().items()}
    if prefix == "1.":
        with pytest.raises(ValueError, match="normalized input"):
            load_weights(wrapped(1), state, "file.pt")
    else:
        loads(wrapped(1), state, wrapped(0))


def test_a_part_that_was_compiled_is_known():
    state = {name.replace("backbone.", "backbone._orig_mod."): v for name, v in wrapped(0).state_dict().items()}
    loads(wrapped(1), state, wrapped(0))


def test_weights_of_a_bare_network_go_into_one_behind_a_layer(tmp_path):
    def of(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Flatten(), nn.Linear(144, 5)))

    network = of(0)
    behind = nn.Sequential(nn.Identity(), of(1))
    load_weights(behind, network.state_dict(), "file.pt")
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in behind[1].state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_safetensors(tmp_path, dtype):
    state = {name: v.to(dtype) if v.is_floating_point() else v for name, v in wrapped(0).state_dict().items()}
    save_file(state, tmp_path / "half.safetensors")
    read = load_checkpoint(tmp_path / "half.safetensors", foreign=True)
    model = wrapped(1)
    loads(model, read, wrapped(0), tolerance=0.02)
    assert all(value.dtype == torch.float32 for value in model.parameters())


def test_another_number_of_classes_and_another_shape_are_told_apart():
    for head in (nn.Linear(8, 7), nn.Linear(8, 7, bias=False), nn.Conv2d(8, 7, 1)):
        theirs = nn.Sequential(nn.Conv2d(3, 8, 1), head)
        ours = nn.Sequential(nn.Conv2d(3, 8, 1), type(head)(8, 5, *[1] * isinstance(head, nn.Conv2d)))
        if head.bias is None:
            ours[1].bias = None
        with pytest.raises(ValueError, match="weights are for 7 classes, the model has 5"):
            load_weights(ours, theirs.state_dict(), "file.pt")
    wide = nn.Sequential(nn.Conv2d(3, 9, 1), nn.Linear(9, 5))
    with pytest.raises(ValueError, match="'0.weight' of shape"):
        load_weights(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(8, 5)), wide.state_dict(), "file.pt")


class Whole(nn.Module):
    pass


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("content", [Whole(), {"model": Whole(), "epoch": 3}, nn.Sequential(nn.Linear(3, 2))])
def test_a_whole_pickled_model_is_refused_with_the_way_to_convert_it(tmp_path, content, legacy):
    torch.save(content, tmp_path / "whole.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"refused: it names .*a whole model.*state_dict\(\), 'weights.pt'\)") as error:
        load_checkpoint(tmp_path / "whole.pt", foreign=True)
    assert "\n" not in str(error.value)


def test_pretrained_weights_of_torchvision_as_they_come(tmp_path, capsys):
    """The state dict that torchvision publishes, behind a wrapper's prefix, in half precision."""
    import torchvision

    torch.manual_seed(5)
    theirs = torchvision.models.resnet18(num_classes=10)
    state = {f"module.{name}": v.half() if v.is_floating_point() else v for name, v in theirs.state_dict().items()}
    save_file(state, tmp_path / "theirs.safetensors")
    argv = ["--model", "torchvision.models:resnet18", "--dataset", "digits", "--dry-run"]
    assert eval_script.main([str(tmp_path / "theirs.safetensors"), *argv]) == 0
    from experiment.weights import load_pretrained

    values = settings("--model", "torchvision.models:resnet18", "--pretrained", str(tmp_path / "theirs.safetensors"))
    model = build_model(values)
    load_pretrained(model, values)
    torch.testing.assert_close(model.fc.weight, theirs.fc.weight, rtol=1e-2, atol=1e-3)


def test_an_exported_model_loads_as_its_card_says(trained, tmp_path, monkeypatch):
    folder, path = trained
    export.main([str(folder), str(tmp_path / "out.safetensors"), *own(path)])
    text = (tmp_path / "out.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(path.parent))
    names: dict[str, Any] = {}
    exec(code, names)
    average = load_checkpoint(folder / "best.pt")["average"]
    assert all(torch.equal(value, average[name]) for name, value in names["model"].state_dict().items())
    assert load_file(tmp_path / "out.safetensors").keys() == average.keys()


def test_a_run_that_is_compiled_goes_on_and_is_one_like_others(tmp_path, monkeypatch):
    """Without a compiler: torch.compile's own tracing of a model that stands in a file."""
    compiled, compile_ = [], nn.Module.compile
    monkeypatch.setattr("experiment.flags.check_compile", lambda device: None)
    monkeypatch.setattr(
        nn.Module, "compile", lambda self: (compiled.append(type(self).__name__), compile_(self, backend="eager"))
    )
    argv = tiny(tmp_path, *own(written(tmp_path / "code")), "--scheduler", "constant", "--seed", "1")
    for name, flag in (("plain", "false"), ("compiled", "true")):
        assert run_training(*argv, "--name", name, "--epochs", "1", "--compile", flag) == 0
        resumed = ["--resume", str(tmp_path / name), *own(tmp_path / "code" / "nets.py"), "--epochs", "2"]
        assert run_training(*resumed, "--compile", flag) == 0
    assert compiled == ["Net", "Net"]
    assert largest_difference(tmp_path / "compiled", tmp_path / "plain") < 1e-5
    states = [load_checkpoint(tmp_path / name / "best.pt")["average"] for name in ("plain", "compiled")]
    assert states[0].keys() == states[1].keys()


def test_several_processes_train_it_as_one_does_and_the_scripts_take_the_run(tmp_path, monkeypatch):
    """Over gloo, with GroupNorm, cut and resumed; without dropout, which draws in each process for itself."""
    monkeypatch.setattr(attack, "AutoAttack", ShortAutoAttack)
    path = written(tmp_path / "code", GOOD.replace("nn.Dropout(0.2)", "nn.Identity()"))
    argv = [*own(path), "--group-norm", "--scheduler", "constant", "--channels-last", "false"]
    for size in (1, 2):
        root = tmp_path / str(size)
        assert train_together(size, tiny(root, *argv, "--epochs", "1"), root) == [0] * size
        assert train_together(size, ["--resume", str(root / "run"), *own(path), "--epochs", "2"], root) == [0] * size
    folders = [tmp_path / size / "run" for size in ("1", "2")]
    assert largest_difference(*folders) < 1e-3
    assert [row["epoch"] for row in Experiment.open(folders[1]).read_metrics()] == [1, 2]
    with monkeypatch.context() as patch:
        patch.setattr("models.own._USED", {})
        refused = train_together(2, ["--resume", str(folders[1])], tmp_path / "2")
    assert refused == [2, 2] and "give --model" in (tmp_path / "2" / "rank-0.txt").read_text()
    small = ["--n", "4", "--eps", "1", "--version", "custom", "--device", "cpu"]
    assert eval_script.main([str(folders[1]), *own(path), *small]) == 0
    assert export.main([str(folders[1]), str(tmp_path / "out.safetensors"), *own(path)]) == 0
    assert "norm.weight" in load_file(tmp_path / "out.safetensors")
