"""README.md and docs/: what they link to, name, tell the reader to run and show as code is there, and works."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from data.files import Split, write_split
from dyart import NORMS, find_boundary, margin_gradient_weights
from experiment import flags, settings, train_flags
from experiment.build import build_model
from scripts import compare_methods_report
from tests.runs import run_training, tiny

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
EXTENDING = ROOT / "docs" / "extending.md"
MAX_README_LINES = 150

# What a run, a release or the reader has, and not this repository. In capitals stand words for the reader's own.
NOT_HERE = {"args.yaml", "train.log", "eval.log", "metrics.csv", "autoattack.json", "figures/", "experiments/"}
NOT_HERE |= {"latest.pt", "previous.pt", "best.pt", "burn_in.pt", "epoch_0010.pt", "out.pt", ".npz", ".venv"}
NOT_HERE |= {"nets.py", "out.safetensors", "tensorboard/", "curve.png", "curve.csv", "curve.json"}
A_PATH = re.compile(r"[\w.-]+/[\w./-]*|[\w./-]*\.(?:py|sh|md|json|png|csv|toml|yml|yaml|txt|npz|pt|log)")
A_FLAG = re.compile(r"--\w|-\w$|-\w ")

# Whose flags a command takes; a shell script hands them on.
PARSERS = {name: importlib.import_module(name).build_parser for name in ("eval", "analyze", "bench", "export")}
PARSERS["train"] = train_flags.build_parser
PARSERS["compare_methods"] = compare_methods_report.build_parser
HANDS_ON = {"eval": "eval", "analyze": "analyze", "resume": "train", "compare_methods": "compare_methods"}


# --- What a document holds --------------------------------------------------------------------------------------------


def code_blocks(text: str) -> list[str]:
    """The blocks of code, fenced or indented, without fence and indent."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S)
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    indented = re.findall(r"(?<=\n\n)((?: {4}.*\n(?:\n(?= {4}))*)+)", f"\n\n{rest}\n")
    return blocks + [re.sub(r"^ {4}", "", block, flags=re.M) for block in indented]


def prose(text: str) -> str:
    """A document without its blocks of code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return re.sub(r"^ {4}.*$", "", text, flags=re.M)


def spans(text: str) -> list[str]:
    """What stands between backticks in the prose of a document; a table's escaped bars as they are meant."""
    return [span.replace("\\|", "|").replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose(text))]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- What may be wrong with one: each gives the problems that it finds ------------------------------------------------


def broken_links(path: Path, text: str) -> list[str]:
    """Relative links that lead to no file, or to no heading of it."""
    problems = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists():
            problems.append(f"{path.name}: no file {target}")
        elif anchor and anchor not in anchors(text if file == path else file.read_text()):
            problems.append(f"{path.name}: no heading {target}")
    return problems


def missing_paths(path: Path, text: str) -> list[str]:
    """Paths between backticks that this repository has not; a test's file may be named without its folder."""
    words = [word for span in spans(text) for word in re.sub(r"--[\w-]+[ =]\S+|[\[\]:;,…]", " ", span).split()]
    names = {word for word in words if A_PATH.fullmatch(word) and not re.search(r"\d/\d|[A-Z]{4}", word)}
    names |= {word for word in words if re.match(r"(bash|scripts|data)/.*\.sh", word)}
    names -= NOT_HERE
    return [
        f"{path.name}: no file {name}"
        for name in sorted(names)
        if name.split("/")[0] != "experiments"
        and not (ROOT / name).exists()
        and not (name.startswith("test_") and (ROOT / "tests" / name).exists())
    ]


def missing_in_tree(path: Path, text: str) -> list[str]:
    """Lines of a drawn tree (a name, spaces, what it is) that name no file; indented ones are in the folder above."""
    problems = []
    for block in code_blocks(text):
        lines = [re.match(r"( *)((?:[\w.-]+(?:\.py|/)  ?)+) *\S", line) for line in block.splitlines()]
        if not lines or not all(lines):
            continue
        folder = ROOT
        for line in lines:
            for name in line[2].split():
                place = (folder if line[1] else ROOT) / name
                problems += [] if place.exists() else [f"{path.name}: no file {place.relative_to(ROOT)}"]
            if not line[1]:
                folder = ROOT / line[2].split()[0]
    return problems


def missing_definitions(path: Path, text: str) -> list[str]:
    """`NAME` in `FILE.py`, where the file defines no such name; `NAME`, `OTHER` in `FILE.py` are two of them."""
    problems = []
    for names, file in re.findall(r"((?:`\w+`(?:,| and)?\s+)+)in\s+`([\w/]+\.py)`", prose(text)):
        defined = definitions(ROOT / file) if (ROOT / file).exists() else []
        problems += [
            f"{path.name}: no {name} in {file}" for name in re.findall(r"\w+", names) if name not in [*defined, "and"]
        ]
    return problems


def definitions(file: Path) -> list[str]:
    """The names that a Python file defines: functions and classes anywhere, variables of the module."""
    tree = ast.parse(file.read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = [node.name for node in ast.walk(tree) if isinstance(node, kinds)]
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


def missing_tests(path: Path, text: str) -> list[str]:
    """Tests that do not exist in the file named before them in the same row or paragraph; `test_abc_...` is a start."""
    problems = []
    if not re.search(r"`test_\w+\.py`", text):
        return problems
    for paragraph in re.split(r"\n\n|(?<=\|)\n", prose(text)):
        file, tests = None, []
        for span in re.findall(r"`(test_[\w.]+)`", paragraph):
            if span.endswith(".py"):
                file = span
                tests = definitions(ROOT / "tests" / file) if (ROOT / "tests" / file).exists() else []
            elif file is None:
                problems.append(f"{path.name}: {span} in which file?")
            elif not any(test.startswith(span[:-3]) if span.endswith("...") else test == span for test in tests):
                problems.append(f"{path.name}: no {span} in {file}")
    return problems


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command that starts a script: `python X.py ...` or `bash X.sh ...`."""
    lines = [line for block in code_blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *spans(text)]:
        found = re.search(r"\b(?:python|bash) \S+\.(?:py|sh)\b.*", line)
        if found:
            yield shlex.split(re.sub(r"\s#.*|\.\.\.|…|[\[\]]", "", found[0]))[1:]


def broken_commands(path: Path, text: str) -> list[str]:
    """Commands whose script does not exist, or does not know a flag or its value; flags that no script knows."""
    problems = []
    for script, *words in commands(text):
        name = Path(script).stem
        if not (ROOT / script).is_file():
            problems.append(f"{path.name}: no script {script}")
        elif script == f"{name}.py":
            problems += [f"{path.name}: {error}" for error in refused(PARSERS[name](), words)]
        elif any(map(A_FLAG.match, words)):
            names = HANDS_ON.get(name, "train" if name.startswith(("Cifar10", "TinyImgNet")) else None)
            known = PARSERS[names]()._option_string_actions if names else {}
            unknown = [word for word in words if A_FLAG.match(word) and word.partition("=")[0] not in known]
            problems += [f"{path.name}: {script} knows no {word}" for word in unknown]
    known = {flag for build in PARSERS.values() for flag in build()._option_string_actions} | {"--help"}
    for span in spans(text):
        if A_FLAG.match(span):
            unknown = [word for word in span.split() if A_FLAG.match(word) and word not in known]
            problems += [f"{path.name}: no script knows {word}" for word in unknown]
    return problems


def refused(parser: flags.Parser, words: list[str]) -> list[str]:
    """What a parser says of words that it does not take."""
    said = []

    def error(message: str) -> None:
        said.append(f"{parser.prog} {' '.join(words)}: {message}")
        raise SystemExit

    parser.error = error
    with suppress(SystemExit):
        parser.parse_args([word for word in words if word != "--help"])
    return said


# --- The tests --------------------------------------------------------------------------------------------------------

CHECKS = [broken_links, missing_paths, missing_in_tree, missing_definitions, missing_tests, broken_commands]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_what_a_document_names_is_there(path, check):
    # Of the examples in extending.md, the commands are those that they make possible.
    with worked_examples() if (path, check) == (EXTENDING, broken_commands) else nullcontext():
        assert check(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("check", "wrong"),
    [
        (broken_links, "[a](docs/missing.md)"),
        (broken_links, "![a](results/missing.png)"),
        (broken_links, "[a](docs/results.md#no-such-heading)"),
        (broken_links, "[a](#no-such-heading)"),
        (missing_paths, "`dyart/missing.py`"),
        (missing_paths, "`missing.py: find_boundary`"),
        (missing_paths, "`results/missing/`"),
        (missing_paths, "| a | `bash scripts/missing.sh FOLDER` |"),
        (missing_paths, "`test_missing.py`"),
        (missing_in_tree, "\n    dyart/          the method\n      missing.py    is not there\n"),
        (missing_in_tree, "\n    eval.py  missing.py   scripts\n"),
        (missing_definitions, "`find_nothing` in `dyart/margin.py`"),
        (missing_definitions, "`find_boundary` in `dyart/losses.py`"),
        (missing_definitions, "`NORMS` and `MISSING` in `dyart/projection.py`"),
        (missing_tests, "`test_docs.py`: `test_what_is_not_there`"),
        (missing_tests, "`test_docs.py`: `test_what_a_document_names`"),
        (missing_tests, "| a | `test_docs.py` |\n| b | `test_what_a_document_names_is_there` |"),
        (missing_tests, "`test_docs.py`: `test_what_is_not_...`"),
        (broken_commands, "`python missing.py`"),
        (broken_commands, "`bash scripts/missing.sh`"),
        (broken_commands, "\n    python train.py --epochs 1 \\\n        --no-such-flag 2\n"),
        (broken_commands, "\n    python train.py --epochs none\n"),
        (broken_commands, "`python export.py FOLDER`"),
        (broken_commands, "`bash scripts/eval.sh FOLDER [--epochs 2]`"),
        (broken_commands, "`bash scripts/quickstart.sh --epochs 2`"),
        (broken_commands, "`--no-such-flag 2`"),
    ],
)
def test_each_check_finds_what_is_wrong(check, wrong):
    readme = ROOT / "README.md"
    assert len(check(readme, wrong + "\n")) == 1


def test_each_check_passes_what_is_right():
    text = "# A b: c\n[a](#a-b-c) [b](docs/results.md) `dyart/margin.py` `find_boundary` in `dyart/margin.py`\n"
    text += "`test_docs.py`: `test_each_check_passes_what_is_right`, `test_each_check_...` `experiments/a/best.pt`\n"
    text += "`--epochs 3` `16/255` `python train.py ... --epochs 3` `bash scripts/eval.sh FOLDER [-v custom]`\n\n"
    text += "    python bench.py FOLDER \\\n        --rounds 2  # a comment --with-no-flag\n\n"
    text += "    dyart/          the method\n      margin.py       searches\n    train.py        trains\n"
    assert [problem for check in CHECKS for problem in check(ROOT / "README.md", text)] == []


def test_the_readme_is_two_pages_and_lines_are_no_wider_than_the_code():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES
    for path in DOCS:
        wide = [line for line in path.read_text().splitlines() if len(line) > 120 and not line.startswith("|")]
        assert wide == [], path.name


# --- The code that they show ------------------------------------------------------------------------------------------


def shown(path: Path, first_line: str) -> str:
    """The block of Python code that starts with this line."""
    (block,) = (block for block in code_blocks(path.read_text()) if block.startswith(first_line))
    return block


@pytest.fixture
def linear() -> dict[str, Any]:
    """What a reader has: a linear model of two classes, whose margins are known, and a batch within the box."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    x = 0.2 + 0.6 * torch.rand(16, 3, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        model[1].bias -= model(x).mean(0)
    labels = model(x).argmax(1)
    loader = [(x[:8], labels[:8]), (x[8:], labels[8:])]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return {"model": model, "x": x, "labels": labels, "loader": loader, "optimizer": optimizer}


def margins_of(model: nn.Module, x: torch.Tensor, labels: torch.Tensor, order: float = 1) -> torch.Tensor:
    """The closed form: the margin of the label over the other class, by the dual norm of the difference."""
    w, b = (parameter[0] - parameter[1] for parameter in model[1].parameters())
    return (1 - 2 * labels) * (x.flatten(1) @ w + b) / torch.linalg.vector_norm(w, order)


def test_the_library_is_used_as_the_readme_shows(linear, capsys):
    exec(shown(ROOT / "README.md", "from dyart import"), linear)
    boundary, expected = linear["boundary"], margins_of(linear["model"], linear["x"], linear["labels"])
    assert boundary.found.all() and torch.allclose(boundary.margin, expected, rtol=0.05)
    printed = float(re.search(r"[\d.]+", capsys.readouterr().out)[0])
    assert printed == pytest.approx(255 * boundary.margin.mean().item(), rel=1e-4)
    assert linear["surrogate"].shape == (16,) and linear["surrogate"].requires_grad
    assert torch.allclose(linear["weights"], 1 / boundary.grad.flatten(1).abs().sum(1))


def test_margins_as_shown(linear, capsys):
    exec(shown(EXTENDING, "# library: margins of your model"), linear)
    expected = margins_of(linear["model"], linear["x"], linear["labels"])
    assert torch.allclose(linear["margins"], expected, rtol=0.05)
    assert (linear["margins"] >= expected * (1 - 1e-9)).all()
    assert torch.equal(linear["vulnerable"], linear["margins"] < 8 / 255)
    said = re.fullmatch(r"16 of 16 have a margin, the median is ([\d.]+)/255\n", capsys.readouterr().out)
    assert float(said[1]) == pytest.approx(255 * expected.median().item(), rel=0.05)


def test_a_training_step_as_shown_raises_the_margins(linear):
    model, x, labels = (linear[name] for name in ("model", "x", "labels"))
    before = margins_of(model, x, labels)
    for _ in range(10):
        exec(shown(EXTENDING, "# library: a training step in your own loop"), linear)
    after = margins_of(model, x, labels)
    assert (after - before).mean() > 0.01 * before.mean()
    # Within the warm-up the average copies.
    for mine, trained in zip(linear["evaluated"].parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, trained)
    assert not linear["evaluated"].training
    assert linear["metrics"]["found"] > 0


def test_a_new_loss_as_shown_has_the_gradient_of_the_hinge(linear):
    model, r0 = linear["model"], 16 / 255
    # Without those so near to r0 that a search which ends a little beyond the boundary may leave them out.
    rows = (margins_of(model, linear["x"], linear["labels"]) / r0 - 1).abs() > 0.05
    linear |= {name: linear[name][rows] for name in ("x", "labels")}
    exec(shown(EXTENDING, "# library: a new loss"), linear)
    x, labels = linear["x"], linear["labels"]
    expected = margins_of(model, x, labels)
    assert 0 < (expected < r0).sum() < len(x), "the hinge is to act on some and not on all"
    hinge = nn.functional.cross_entropy(model(x), labels) + 10.0 * (r0 - expected).clamp_min(0).mean()
    for parameter, gradient in zip(model.parameters(), torch.autograd.grad(hinge, model.parameters()), strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=0.02, atol=0.02 * gradient.abs().max().item())


def test_a_new_norm_as_shown_has_its_margins(linear):
    with patch.dict(NORMS):
        exec(shown(EXTENDING, "# library: a new norm"), linear)
    expected = margins_of(linear["model"], linear["x"], linear["labels"], float("inf"))
    boundary = linear["boundary"]
    within = expected < 0.3  # One pixel alone can go that far.
    assert within.any() and torch.allclose(boundary.margin[within], expected[within], rtol=0.05)


def test_a_speed_as_shown_is_the_change_of_the_margins(linear, capsys):
    exec(shown(EXTENDING, "# library: the boundary's speed"), linear)
    before, after = (margins_of(linear[name], linear["x"], linear["labels"]) for name in ("model", "moved"))
    change = (after - before).detach()
    assert torch.allclose(linear["speed"], change, rtol=0.02, atol=0.02 * change.abs().max().item())
    assert capsys.readouterr().out == f"{(change < 0).double().mean():.0%} of the margins shrink\n"


def test_there_are_five_examples_of_the_library_and_all_are_run():
    shown_here = re.findall(r"^# (library: .*)$", EXTENDING.read_text(), re.M)
    run_here = re.findall(r'shown\(EXTENDING, "# (library: [^"]*)"\), linear', Path(__file__).read_text())
    assert len(shown_here) == 5
    assert all(any(name.startswith(start) for start in run_here) for name in shown_here)


@contextmanager
def worked_examples() -> Iterator[None]:
    """All of docs/extending.md's examples, as if they stood in the files that they name; at the end they do not."""
    with patch.dict(NORMS), ExitStack() as stack:
        new_norm = shown(EXTENDING, "# library: a new norm")
        exec(new_norm[: new_norm.index("boundary =")], {})
        for file, block in re.findall(r"^```python\n# (\S+)\.py\n(.*?)^```$", EXTENDING.read_text(), re.M | re.S):
            names = vars(importlib.import_module(file.replace("/", ".").removesuffix(".__init__")))
            for name, table in names.items():
                if name.isupper() and type(table) is dict:
                    stack.enter_context(patch.dict(table))
            exec(block, dict(names))
        yield


@pytest.fixture
def examples():
    with worked_examples():
        yield


def test_models_of_timm_as_shown(tmp_path):
    pytest.importorskip("timm")
    (tmp_path / "nets.py").write_text(shown(EXTENDING, "# own: nets.py"))
    for function in ("small", "normalized"):
        values = settings.resolve(train_flags.parse(["--model", f"{tmp_path / 'nets.py'}:{function}"]))
        model = build_model(values).eval()
        x = torch.rand(1, 3, 32, 32)
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        if function == "normalized":
            torch.testing.assert_close(model(x), model[1]((x - mean) / std))


def test_a_new_loss_model_dataset_and_search_are_trained_with(examples, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "birds").mkdir()
    for name in ("train", "test"):
        images = torch.from_numpy(rng.integers(256, size=(60, 64, 64, 3), dtype=np.uint8))
        write_split(tmp_path / "birds" / f"{name}.npz", Split(images, torch.arange(60) % 20))
    small = ["--dataset", "birds", "--data-dir", str(tmp_path), "--model", "small-cnn", "--validation-size", "4"]
    small += ["--epochs", "1", "--train-subset", "20", "--attack-iter", "2"]
    for extra in (["--method", "pairing", "--beta", "0.5"], ["--search", "newton"]):
        assert run_training(*tiny(tmp_path, *small, *extra, "--name", extra[1])) == 0
        assert (tmp_path / extra[1] / "best.pt").exists()


def test_a_new_search_and_norm_find_the_closest_points_of_a_linear_model(examples):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    x = 0.4 + 0.2 * torch.rand(32, 12, dtype=torch.float64)
    with torch.no_grad():
        model[1].bias -= model(x).mean(0)  # The boundary goes through the examples: within the box.
        logits = model(x)
    labels, slope = logits.argmax(1), (model[1].weight[0] - model[1].weight[1]).detach().abs()
    for norm, search, dual in (
        ("L1", "fast", slope.max()),
        ("L1", "newton", slope.max()),
        ("Linf", "newton", slope.sum()),
    ):
        boundary = find_boundary(model, x, labels, norm=norm, search=search)
        closest = (logits[:, 0] - logits[:, 1]).abs() / dual
        assert boundary.found.all() and (boundary.value < 0).all()
        assert torch.allclose(boundary.margin, closest, rtol=0.03)
        weights = margin_gradient_weights(boundary, norm)
        assert torch.allclose(weights, 1 / dual.expand(32))
