"""scripts/check_gpu.sh: its parts on a CPU, and what it makes of parts that fail, hang or say nothing.

With DYART_LARGE_TESTS=1 every part runs for real, which takes some minutes; else the training alone.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

LARGE = os.environ.get("DYART_LARGE_TESTS") == "1"
ROOT = Path(__file__).parents[1]
PARTS = ["tests", "bench", "bench-bf16", "bench-contiguous", "bench-float32", "bench-compile", "training", "torchrun"]
PARTS += ["evaluation"]


def stand_in(folder: Path, body: str) -> Path:
    """A repository with this script alone, where Python runs `body` instead of ours, but for the report."""
    (folder / "scripts").mkdir(parents=True)
    for name in ("check_gpu.sh", "check_gpu_report.py", "common.sh"):
        shutil.copy(ROOT / "scripts" / name, folder / "scripts")
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    report = f'*check_gpu_report*) exec "{sys.executable}" "$@" ;;'
    python.write_text(f'#!/bin/bash\ncase "$*" in\n{report}\n{body}\nesac\n')
    python.chmod(0o755)
    return folder / "scripts" / "check_gpu.sh"


def check(script: Path, *argv: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", script, "--device", "cpu", *argv], capture_output=True, text=True, env=environment, cwd="/"
    )


def parts_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {part["name"]: part for part in json.loads((folder / "check-gpu.json").read_text())["parts"]}


def test_a_part_that_fails_or_hangs_does_not_stop_the_next(tmp_path):
    body = '*"-m pytest"*) sleep 60 ;;\n*bench.py*--amp*) trap "" TERM; sleep 60 ;;\n'
    body += "*bench.py*) echo Traceback; echo out of memory >&2; exit 1 ;;\n*eval.py*) exit 0 ;;\n*) exit 3 ;;"
    started = time.monotonic()
    done = check(stand_in(tmp_path / "root", body), "--output", str(tmp_path / "out"), "--limit", "1")
    assert time.monotonic() - started < 30
    assert done.returncode == 1, done.stderr
    parts = parts_of(tmp_path / "out")
    assert list(parts) == PARTS
    outcomes = {name: part["outcome"] for name, part in parts.items()}
    assert outcomes == dict.fromkeys(PARTS, "failed") | {"tests": "timed out", "bench-bf16": "timed out"}
    assert parts["bench"]["said"][:2] == ["Traceback", "out of memory"]
    assert "no figures: ValueError" in parts["evaluation"]["said"][-1]  # it says that it is done, and has done nothing
    assert [line.split()[:2] for line in done.stdout.splitlines()[-10:-1]][1] == ["bench", "failed"]
    assert all(part["seconds"] <= 4 and part["limit"] == 1 for part in parts.values())


def test_ctrl_c_ends_it_with_what_it_runs(tmp_path):
    script = stand_in(tmp_path / "root", f'*"-m pytest"*) echo $$ >"{tmp_path}/pid"; exec sleep 60 ;;\n*) exit 3 ;;')
    process = subprocess.Popen(["bash", script, "--device", "cpu", "--output", tmp_path / "out"])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    process.terminate()
    assert process.wait(10) == 130
    pid = int((tmp_path / "pid").read_text())
    for _ in range(500):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.01)
    else:
        pytest.fail("what it ran is still running")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a", "b"], "usage: "),
        (["--limit"], "usage: "),
        (["--limit", "soon"], "usage: "),
        (["--parts", "nothing"], "--parts nothing: there is no such part"),
        (["/nowhere"], "/nowhere: no cifar-10/train.npz in it"),
        (["--output", "/tmp"], "/tmp exists: a check has a folder of its own"),
    ],
)
def test_what_it_cannot_do_is_said_in_one_line(tmp_path, argv, message):
    output = [] if "--output" in argv else ["--output", str(tmp_path / "out")]
    done = check(ROOT / "scripts" / "check_gpu.sh", *output, *argv)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_its_parts_pass_on_a_cpu(tmp_path):
    wanted = [name for name in PARTS if LARGE or name == "training"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    output = tmp_path / "out"
    command = ["bash", ROOT / "scripts" / "check_gpu.sh", "--device", "cpu", "--output", output]
    done = subprocess.run(
        [*command, "--parts", " ".join(wanted)], capture_output=True, text=True, env=environment, cwd="/"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = parts_of(output)
    assert list(parts) == wanted and {part["outcome"] for part in parts.values()} == {"passed"}
    figures = {name: part["figures"] for name, part in parts.items()}
    assert [epoch["stage"] for epoch in figures["training"]["epochs"]] == ["burn-in", "dyart", "dyart"]
    assert figures["training"]["largest_difference"] == 0  # on a CPU a resumed run is the same to the last bit
    assert figures["training"]["resumed"].endswith(("1 epochs finished", "2 epochs finished"))
    assert not list(output.rglob("*.pt"))
    if LARGE:
        assert figures["tests"]["passed"] > 15 and figures["tests"]["failed"] == []
        assert set(figures["bench-bf16"]["of_plain"]) == set(figures["bench"]["seconds"]) >= {"clean step"}
        assert figures["torchrun"]["largest_difference"] < 1e-5
        assert 0 <= figures["evaluation"]["robust_accuracy"] <= figures["evaluation"]["clean_accuracy"] <= 1
