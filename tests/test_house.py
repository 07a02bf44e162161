"""The house: which part may import which, where torch.distributed stands, who forks, how long a script may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SCRIPTS = ["train", "eval", "analyze", "bench", "export"]
# Arrows run one way, from the scripts down. A part: the parts that it may import besides itself.
GROUND = {"dyart", "models", "data", "storage"}
MAY_IMPORT: dict[str, set[str]] = {
    "storage": set(),
    "dyart": set(),
    "models": set(),
    "data": {"storage"},
    "experiment": GROUND,
    "evaluation": {"experiment", *GROUND},
    "analysis": {"evaluation", "experiment", *GROUND},
    **dict.fromkeys(["scripts", *SCRIPTS], {"analysis", "evaluation", "experiment", *GROUND}),
}
# The only file that imports torch.distributed, once there is one that does.
PROCESSES = "experiment/processes.py"


def part_of(path: Path) -> str:
    """The folder below the repository in which a file lies, or its own name where it lies in none."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def names(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, in full; of `from a import b`, both a and a.b.

    A module that is named only in a string is none, unless it is importlib.import_module's or __import__'s.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module=module, names=aliases, level=level):
                assert level == 0, f"line {node.lineno}: imports are absolute"
                yield module
                yield from (f"{module}.{alias.name}" for alias in aliases)
            case ast.Call(func=ast.Name(id="__import__") | ast.Attribute(attr="import_module"), args=[first, *_]):
                assert isinstance(first, ast.Constant), f"line {node.lineno}: cannot tell what this imports"
                yield first.value


FILES = sorted([*ROOT.glob("*.py"), *(path for part in MAY_IMPORT for path in (ROOT / part).rglob("*.py"))])


def test_every_part_has_its_place():
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests"}
    scripts = {path.stem for path in ROOT.glob("*.py")}
    assert folders | scripts == MAY_IMPORT.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_run_one_way(path):
    part = part_of(path)
    imported = {name.partition(".")[0] for name in names(ast.parse(path.read_text()))}
    ours = imported & {*MAY_IMPORT, "tests"}
    assert ours - ({part} - {*SCRIPTS, "scripts"}) <= MAY_IMPORT[part]


def test_torch_distributed_is_behind_one_door():
    users = set()
    for path in FILES:
        tree = ast.parse(path.read_text())
        attributes = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
        }
        if "distributed" in attributes or any(f"{name}.".startswith("torch.distributed.") for name in names(tree)):
            users.add(str(path.relative_to(ROOT)))
    assert users <= {PROCESSES}


def test_nothing_forks_but_the_children_of_tests():
    """PyTorch's threads do not survive a fork. Python's warning of it says nothing where warnings are errors."""
    forking = set()
    for path in [*FILES, *ROOT.glob("tests/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case (
                    ast.Attribute(value=ast.Name(id="os"), attr="fork" | "forkpty")
                    | ast.Attribute(value=ast.Name(id="multiprocessing"), attr="Process" | "Pool")
                    | ast.Call(func=ast.Attribute(attr="get_context" | "set_start_method"), args=[ast.Constant("fork")])
                    | ast.Call(func=ast.Name(id="get_context" | "ProcessPoolExecutor"))
                ):
                    forking.add(str(path.relative_to(ROOT)))
    assert forking == {"tests/children.py"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_can_be_read_in_one_go(script):
    assert len((ROOT / f"{script}.py").read_text().splitlines()) <= 350


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_opens_with_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import a.b as c", {"a.b"}),
        ("def f():\n    from a import b, c", {"a", "a.b", "a.c"}),
        ("import importlib\nimportlib.import_module('a.b')", {"importlib", "a.b"}),
        ("__import__('a')", {"a"}),
        ("'import a'  # import a", set()),
    ],
)
def test_imports_are_found_wherever_they_stand(code, expected):
    assert set(names(ast.parse(code))) == expected
