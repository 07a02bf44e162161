"""The package: the wheel that `pip install .` makes holds `dyart` alone, and works where torch and numpy alone are."""

import ast
import email.message
import importlib.metadata
import inspect
import os
import re
import shutil
import subprocess
import sys
import typing
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dyart

ROOT = Path(__file__).parents[1]
NAMES = (
    "find_boundary, approach_boundary, Boundary, is_locally_closest, margin_gradient_weights, "
    "soft_logit_margin, logit_margin, dyart_loss, boundary_speed, update_direction, WeightAverage, pgd, NORMS, Norm, "
    "MinimumNorm, closest_boundary, minimum_norm_attack, __version__"
)
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]

# For the child, installed top-level modules other than these are not there.
CHILD = """
import sys
import typing
from importlib.machinery import PathFinder

class Some:
    @staticmethod
    def find_spec(name, *where):
        there = name.partition(".")[0] in {there!r} or name.startswith("_sysconfigdata_")  # Python's own, too
        return PathFinder.find_spec(name, *where) if there else None

sys.meta_path[sys.meta_path.index(PathFinder)] = Some
sys.path[:] = [{wheel!r}, *(folder for folder in sys.path if folder != {root!r})]  # dyart may be installed, editable
for name in {others!r}:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"the child can import {{name}}")

from dyart import {names}
import dyart

assert dyart.__file__.startswith({wheel!r}), dyart.__file__
print(__version__)
{body}
"""

# A linear model of two classes has its boundary at |w·x + b| / ‖w‖₁ from x, w and b the classes' difference.
BODY = """
import torch

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)).double()
w, b = (parameter[0] - parameter[1] for parameter in model[1].parameters())
x = 0.5 + 0.02 * torch.randn(8, 3, 2, 2, dtype=torch.float64)
labels = model(x).argmax(1)
boundary = find_boundary(model, x, labels, temperature=float("inf"))
assert boundary.found.all()
torch.testing.assert_close(boundary.margin, (x.flatten(1) @ w + b).abs() / w.abs().sum(), rtol=0.05, atol=0)
torch.testing.assert_close(margin_gradient_weights(boundary), (1 / w.abs().sum()).expand(8))

loss, _ = dyart_loss(model, x, labels, r0=1.0)
loss.backward()
with torch.no_grad():
    for parameter in model.parameters():
        parameter -= 1e-3 * parameter.grad
WeightAverage(model).update(model, 1)
direction = update_direction("dyart", model, [(x, labels)])
assert boundary_speed(model, boundary, labels, direction).shape == (8,)
assert pgd(model, x, labels, steps=2).shape == x.shape
"""


def closure(*names: str) -> set[str]:
    """These distributions and all that they need, as installed here."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another kind of machine
        found.add(name)
        asked = (Requirement(line) for line in required)
        waiting += [one.name for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of everything that it could take in."""
    folder = tmp_path_factory.mktemp("package")
    source, ignored = folder / "source", shutil.ignore_patterns("__pycache__")
    source.mkdir()
    for path in [*ROOT.glob("*.*"), ROOT / "LICENSE", ROOT / ".gitignore"]:
        if path.is_file():
            shutil.copy(path, source)
    for path in ROOT.glob("*/*.py"):
        if not (source / path.parent.name).exists():
            shutil.copytree(path.parent, source / path.parent.name, ignore=ignored)
    before = sorted(source.rglob("*"))
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--wheel-dir", str(folder / "wheels")]
    command += ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(source.rglob("*")) == before, "the build leaves something in the tree"
    (wheel,) = (folder / "wheels").iterdir()
    return wheel


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_holds_dyart_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        information = f"dyart-{dyart.__version__}.dist-info"
        assert archive.read(f"{information}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "dyart").rglob("*") if "__pycache__" not in path.parts}
    assert "dyart/py.typed" in own
    ours = {name for name in names if not name.startswith(information)}
    assert ours == own
    assert set(names) - ours == {
        f"{information}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")
    }


def test_the_metadata_says_what_is_needed(metadata):
    assert (metadata["Name"], metadata["Version"]) == ("dyart", dyart.__version__)
    assert metadata["License-Expression"] == "MIT" and metadata["License-File"] == "LICENSE"
    assert metadata["Summary"]
    wanted = {line: Requirement(line) for line in metadata.get_all("Requires-Dist")}
    needed = [line for line, requirement in wanted.items() if requirement.marker is None]
    assert sorted(wanted[line].name for line in needed) == ["numpy", "torch"]
    # What train.py --tensorboard and bench.py --attacks ask for, and nothing that the package itself needs.
    extra = sorted((one.name, str(one.marker)) for line, one in wanted.items() if line not in needed)
    assert extra == [("adv-lib", 'extra == "attacks"'), ("tensorboard", 'extra == "tensorboard"')]
    assert sorted(metadata.get_all("Provides-Extra")) == ["attacks", "tensorboard"]
    assert set(needed) <= set((ROOT / "requirements.txt").read_text().split())


def test_the_supported_pythons_agree(metadata):
    classified = [line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier") if "Python :: 3." in line]
    assert classified == PYTHONS
    first, last = PYTHONS[0], PYTHONS[-1]
    assert metadata["Requires-Python"] == f">={first}"
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    major, minor = last.split(".")
    assert f"python>={first},<{major}.{int(minor) + 1}" in dependencies
    assert f"Python {first} to {last}" in (ROOT / "README.md").read_text()
    assert f"Python {first} to {last} is needed" in (ROOT / "scripts" / "common.sh").read_text()
    assert f'target-version = "py{first.replace(".", "")}"' in (ROOT / "pyproject.toml").read_text()


def test_it_works_where_only_torch_and_numpy_are(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # Of what is installed, not importlib.metadata.packages_distributions, which in Python 3.10 knows few of them.
    files = [file for name in closure("torch", "numpy") for file in importlib.metadata.files(name) or ()]
    there = {file.parts[0].partition(".")[0] for file in files if ".dist-info" not in file.parts[0]} - {""}
    assert {"torch", "numpy"} <= there
    others = ["yaml", "tqdm", "scipy", "sklearn", "matplotlib", "torchvision", "pyautoattack", "pytest"]
    others += ["train", "models", "data", "storage", "experiment", "evaluation", "analysis"]
    there |= {"dyart", *others[others.index("train") :], *sys.stdlib_module_names}
    code = CHILD.format(wheel=str(tmp_path), root=str(ROOT), there=there, others=others, names=NAMES, body=BODY)
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == dyart.__version__


def test_what_is_exported_is_what_is_promised():
    assert sorted(dyart.__all__) == sorted(NAMES.split(", "))


@pytest.mark.parametrize("path", sorted((ROOT / "dyart").glob("*.py")), ids=lambda path: path.name)
def test_dyart_imports_only_torch_numpy_and_pythons_own(path):
    tops = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            tops |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports, as everywhere here"
            tops.add(node.module.partition(".")[0])
    assert tops - sys.stdlib_module_names <= {"dyart", "torch", "numpy"}


@pytest.mark.parametrize("name", sorted({*dyart.__all__} - {"Boundary", "MinimumNorm", "NORMS", "Norm", "__version__"}))
def test_what_is_exported_is_typed(name):
    exported = getattr(dyart, name)
    for function in [exported.__init__, exported.update] if inspect.isclass(exported) else [exported]:
        names = {*inspect.signature(function).parameters, "return"} - {"self"}
        assert names == typing.get_type_hints(function).keys()


def test_pydoc_reads_well():
    """It begins with what the package is for and a line for each name, and every name has its documentation."""
    command = [sys.executable, "-m", "pydoc", "dyart"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    head, _, rest = done.stdout.partition("PACKAGE CONTENTS")
    assert head.split("DESCRIPTION")[0].split("NAME")[1].strip().startswith("dyart - The method of Dynamics-Aware")
    for name in {*dyart.__all__} - {"__version__"}:
        assert re.search(rf"\b{name}\b", head), name
        exported = getattr(dyart, name)
        if name != "NORMS":
            assert inspect.getdoc(exported).splitlines()[0] in rest, name
    assert max(map(len, head.splitlines())) <= 124
