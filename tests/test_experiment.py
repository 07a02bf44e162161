"""The experiment folder: crashes, full disks, two processes at once, and files that lie.

With DYART_LARGE_TESTS=1: 200 kills instead of 20, and 1,500 mutated files of each kind instead of 60.
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import stat
import tempfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dyart import experiment as module
from dyart.experiment import (
    Experiment,
    ExperimentError,
    NewerFormatError,
    check_settings,
    load_checkpoint,
    read_json,
    save_checkpoint,
    write_json,
)

LARGE = os.environ.get("DYART_LARGE_TESTS") == "1"
KILLS = 200 if LARGE else 20
mutations = settings(max_examples=1500 if LARGE else 60, deadline=None, database=None, derandomize=not LARGE)
SETTINGS = {"dataset": "digits", "epochs": 3, "lr": 1e-05, "eps": [2, 4], "pretrained": None, "augment": True}


def quiet(_: str) -> None:
    pass


def new_experiment(root: Path, name: str = "run") -> Experiment:
    return Experiment.create(root, name, SETTINGS, echo=quiet)


def a_state(epoch: int = 0) -> dict[str, Any]:
    """What training saves, in small: every type and several dtypes, with `epoch` written all over it."""
    return {
        "model": OrderedDict(weight=torch.full((3, 4), float(epoch)), running=torch.arange(5) + epoch),
        "half": torch.full((2,), epoch, dtype=torch.bfloat16),
        "scalar": torch.tensor(epoch, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "mask": torch.tensor([True, False]),
        "optimizer": {"state": {0: {"momentum_buffer": None}}, "param_groups": [{"betas": (0.9, 0.95), "lr": 1e-3}]},
        "rng": torch.Generator().manual_seed(0).get_state(),
        "python_rng": random.Random(0).getstate(),
        "settings": {"name": "é\udc80", "flag": True, "nan": float("nan")},
        "raw": b"\0\xff",
        "epoch": epoch,
    }


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def loaded(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "format": 1}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def refused(pattern: str, path: Path | None = None, error: type[Exception] = ExperimentError) -> Iterator[None]:
    """The body raises `error` in one line that matches and names `path`, and leaves the file `path` as it was."""
    before = path.read_bytes() if path is not None and path.is_file() else None
    with pytest.raises(error, match=pattern) as caught:
        yield
    assert "\n" not in str(caught.value)
    if path is not None:
        assert str(path) in str(caught.value)
        assert before is None or path.read_bytes() == before


def in_child(body: Callable[[], Any]) -> int:
    """Start `body` in a forked child that ends without cleaning up; its exit status is 0, or 1 after an exception."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            body()
            status = 0
        except BaseException as error:
            print(f"in the child: {error!r}", flush=True)
        finally:
            os._exit(status)
    return pid


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", a_state(7))
    assert same(load_checkpoint(tmp_path / "a.pt"), loaded(a_state(7)))
    assert same(load_checkpoint(tmp_path / "a.pt", foreign=True), loaded(a_state(7)))
    assert names(tmp_path) == ["a.pt"]


def test_saving_what_was_loaded_gives_the_same_state_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", a_state(7))
    save_checkpoint(tmp_path / "b.pt", load_checkpoint(tmp_path / "a.pt"))
    assert same(load_checkpoint(tmp_path / "b.pt"), loaded(a_state(7)))


def test_memory_layout_does_not_matter_to_the_checksum(tmp_path: Path) -> None:
    x = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    state = {"last": x.contiguous(memory_format=torch.channels_last), "view": x[:, 1:, ::2], "t": x[0, 0].t()}
    save_checkpoint(tmp_path / "a.pt", {**state, "grad": torch.nn.Parameter(x)})
    read = load_checkpoint(tmp_path / "a.pt")
    assert all(torch.equal(read[name], state[name]) for name in state)
    assert read["grad"].requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_on_the_gpu_are_saved_and_read_on_the_cpu(tmp_path: Path) -> None:
    state = {"x": torch.arange(6.0, device="cuda").to(torch.bfloat16)}
    save_checkpoint(tmp_path / "a.pt", state)
    read = load_checkpoint(tmp_path / "a.pt")
    assert read["x"].device.type == "cpu"
    assert torch.equal(read["x"], state["x"].cpu())


def test_the_checksum_stays_what_it_is() -> None:
    # Were this to change, every checkpoint written before would count as damaged: then raise CHECKPOINT_FORMAT.
    state = {"a": [1, 2.5, "é", None, True, b"x"], "b": (torch.arange(3), torch.zeros(2, 1, dtype=torch.bfloat16))}
    assert module._digest(state) == "195d528d2f5c5480f64e63a82d27b2c70d0369c6d79535c34f8e6011ac7ba5e5"


TAMPERED = {
    "one bit of a tensor": lambda s: s["model"]["weight"].view(torch.int32)[0, 0].bitwise_xor_(1),
    "a dtype": lambda s: s["model"].update(weight=s["model"]["weight"].view(torch.int32)),
    "a shape": lambda s: s["model"].update(weight=s["model"]["weight"].reshape(4, 3)),
    "a name": lambda s: s["model"].update(wait=s["model"].pop("weight")),
    "a missing entry": lambda s: s.pop("mask"),
    "an entry more": lambda s: s.update(more=None),
    "a number": lambda s: s.update(epoch=8),
    "a number's type": lambda s: s.update(epoch=7.0),
    "a tuple made a list": lambda s: s["optimizer"]["param_groups"][0].update(betas=[0.9, 0.95]),
    "a text": lambda s: s["settings"].update(name="e"),
    "bytes": lambda s: s.update(raw=b"\0\xfe"),
    "the checksum": lambda s: s.update(sha256="0" * 64),
    "the checksum's type": lambda s: s.update(sha256=None),
}


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED.keys())
def test_the_checksum_covers_all_of_the_content(tmp_path: Path, tamper: Callable[[dict], Any]) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, a_state(7))
    content = torch.load(path, weights_only=True)
    tamper(content)
    torch.save(content, path)
    with refused("damaged .its checksum", path):
        load_checkpoint(path)
    with refused("damaged .its checksum", path):
        load_checkpoint(path, foreign=True)


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        (np.float64(0.5), r"state\['x'\]\[1\] is a float64"),
        (np.zeros(2), "ndarray"),
        ({1, 2}, "set"),
        (torch.zeros(1).expand(10**6), "larger than its storage"),
        (torch.eye(2).to_sparse(), "not a dense tensor"),
        (torch.empty(2, device="meta"), "not a dense tensor"),
        (argparse.Namespace(), "Namespace"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, value: Any, pattern: str) -> None:
    with refused(pattern, error=TypeError):
        save_checkpoint(tmp_path / "a.pt", {"x": [0, value]})
    assert names(tmp_path) == []


def test_a_later_format_is_refused_and_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_experiment(tmp_path) as run:
        run.save_latest(a_state(1))
        monkeypatch.setattr(module, "CHECKPOINT_FORMAT", 2)
        run.save_latest(a_state(2))
        assert load_checkpoint(run.folder / "latest.pt")["epoch"] == 2
        monkeypatch.undo()
        with refused("format 2, of a later version; .* up to 1", run.folder / "latest.pt", NewerFormatError):
            load_checkpoint(run.folder / "latest.pt")
        with refused("format 2", run.folder / "latest.pt", NewerFormatError):
            run.load_latest()


def test_bare_and_released_checkpoints_are_read_when_asked(tmp_path: Path) -> None:
    weights = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()
    released = {"model_state_dict": weights, "wa_model": weights, "epoch": 3, "args": {"lr": 0.1}, "best": (1, 2.0)}
    path = tmp_path / "a.pt"
    for content in (weights, released):
        for new_format in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=new_format)
            assert same(load_checkpoint(path, foreign=True), content)
            with refused("not a checkpoint", path):
                load_checkpoint(path)


def test_numpys_numbers_in_foreign_checkpoints_become_pythons(tmp_path: Path) -> None:
    numbers = {
        **{name: np.dtype(name).type(1) for name in ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32")},
        **{name: np.dtype(name).type(-5) for name in ("int64", "float16", "float32", "float64")},
        "fraction": np.float64(0.1),
        "large": np.uint64(2**64 - 1),
    }
    torch.save({"acc": numbers, "w": torch.ones(2)}, tmp_path / "a.pt")
    read = load_checkpoint(tmp_path / "a.pt", foreign=True)
    assert read["acc"] == {name: number.item() for name, number in numbers.items()}
    assert all(type(value) in (bool, int, float) for value in read["acc"].values())
    rewrite(tmp_path / "a.pt", lambda data: data.replace(b"X\x01\0\0\0<", b"X\x01\0\0\0>"))
    read = load_checkpoint(tmp_path / "a.pt", foreign=True)
    assert (read["acc"]["int32"], read["acc"]["uint16"]) == (2**24, 2**8)
    for other in (np.zeros(2), np.dtype("float32"), np.str_("x"), np.datetime64("2024-01-01")):
        torch.save({"x": other}, tmp_path / "a.pt")
        with refused(".", tmp_path / "a.pt"):
            load_checkpoint(tmp_path / "a.pt", foreign=True)


# --- Files that lie ---------------------------------------------------------------------------------------------------


class Armed:
    """Unpickled as pickle does it, makes a file."""

    def __init__(self, path: Path) -> None:
        self.command = f"touch {path}"

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("how", ["torch", "torch-legacy", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, how: str, foreign: bool) -> None:
    path, marker = tmp_path / "latest.pt", tmp_path / "was-run"
    content = {"model": {"w": torch.ones(2)}, "epoch": Armed(marker), "format": 1, "sha256": "0" * 64}
    if how == "pickle":
        path.write_bytes(pickle.dumps({"epoch": Armed(marker)}, protocol=2))
        pickle.loads(path.read_bytes())
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
        torch.load(path, weights_only=False)
    assert marker.exists(), "the file must be armed for this test to mean anything"
    marker.unlink()
    with refused("refused: it names posix.system" if how == "torch" or foreign else "not a checkpoint", path):
        load_checkpoint(path, foreign=foreign)
    assert not marker.exists()


def test_objects_in_a_checkpoint_are_refused_without_advice_to_trust_them(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(lr=1)}, tmp_path / "a.pt")
    with refused("names argparse.Namespace, and only tensors and plain values are loaded$", tmp_path / "a.pt"):
        load_checkpoint(tmp_path / "a.pt", foreign=True)


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x80\x02}q\0.", b"PK\x03\x04", b"\x89PNG\r\n", bytes(5000)])
@pytest.mark.parametrize("foreign", [False, True])
def test_other_files_are_no_checkpoints(tmp_path: Path, content: bytes, foreign: bool) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with refused("not a checkpoint", tmp_path / "a.pt"):
        load_checkpoint(tmp_path / "a.pt", foreign=foreign)


def test_what_is_no_dict_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "a.pt")
    with refused("it holds a list", tmp_path / "a.pt"):
        load_checkpoint(tmp_path / "a.pt", foreign=True)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"x": torch.arange(10), "epoch": 1})
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with refused(".", path):
            load_checkpoint(path)


def test_one_flipped_bit_in_a_foreign_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.full((4,), 0.1)}, path)
    content = path.read_bytes()
    assert content.count(np.full(4, 0.1, np.float32).tobytes()) == 1
    path.write_bytes(content.replace(np.float32(0.1).tobytes(), np.float32(0.2).tobytes(), 1))
    with refused("damaged .record 'a/data/0'", path):
        load_checkpoint(path, foreign=True)


def test_missing_files_folders_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    cases = {"gone": "No such file", "pipe": "not a regular", ".": "not a regular", "/dev/zero": "not a regular"}
    for name, pattern in cases.items():
        for read in (load_checkpoint, read_json):
            with refused(pattern, tmp_path / name):
                read(tmp_path / name)


def rewrite(
    path: Path, pickled: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED, copies: int = 1
) -> None:
    """Write the archive again with another pickle in it, and all of its CRCs right."""
    source = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", compression) as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, pickled(data) if name.endswith("data.pkl") else data)
        target.filelist *= copies


def test_archives_that_expand_are_refused_before_they_do(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"x": torch.ones(2)}, path)
    rewrite(path, lambda data: data + bytes(10**8), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**6
    with refused("compressed or overlap", path):
        load_checkpoint(path, foreign=True)
    torch.save({"x": torch.ones(1000)}, path)
    rewrite(path, lambda data: data, copies=100)
    with refused("compressed or overlap", path):
        load_checkpoint(path, foreign=True)


def test_content_that_expands_is_refused_or_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"x": torch.ones(1).expand(10**12)}, path)
    with refused("larger than its storage", path):
        load_checkpoint(path, foreign=True)
    doubling: list = []
    for _ in range(60):
        doubling = [doubling, doubling]
    torch.save({"x": doubling}, path)
    load_checkpoint(path, foreign=True)
    itself: list = []
    itself.append(itself)
    torch.save({"x": itself}, path)
    with refused("contains itself", path):
        load_checkpoint(path, foreign=True)
    rewrite(path, lambda _: b"\x80\x02}X\x01\0\0\0x" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"s.")
    with refused("recursion", path):
        load_checkpoint(path, foreign=True)


def mutate(data: st.DataObject, content: bytes, extra: list[bytes] = []) -> bytes:  # noqa: B006
    """`content` with one to four bytes changed, or stretches cut, doubled, or put in."""
    mutated = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(mutated) - 1, 0)))
        match data.draw(st.sampled_from(["flip", "put", "cut", "double", "truncate", *["extra"] * bool(extra)])):
            case "flip" if mutated:
                mutated[at] ^= data.draw(st.integers(1, 255))
            case "put":
                mutated[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case "cut":
                del mutated[at : at + data.draw(st.integers(1, 40))]
            case "double":
                mutated[at:at] = mutated[at : at + data.draw(st.integers(1, 40))]
            case "truncate":
                del mutated[at:]
            case "extra":
                mutated[at:at] = data.draw(st.sampled_from(extra))
    return bytes(mutated)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with new_experiment(tmp_path_factory.mktemp("mutated")) as run:
        save_checkpoint(run.folder / "good.pt", a_state(3))
        torch.save(torch.nn.Linear(3, 2).state_dict(), run.folder / "bare.pt")
        torch.save({"w": torch.ones(3)}, run.folder / "legacy.pt", _use_new_zipfile_serialization=False)
        run.append_metrics({"epoch": 1, "loss": 0.5, "note": 'a, "b"'})
        run.append_metrics({"epoch": 2, "loss": float("nan"), "note": None})
        (run.folder / "good.yaml").write_bytes((run.folder / "args.yaml").read_bytes())
        (run.folder / "good.csv").write_bytes((run.folder / "metrics.csv").read_bytes())
        return run.folder


def loads_or_refuses(path: Path, read: Callable[[], Any]) -> Any:
    """What `read` gives, or None where it refuses in one line; any other exception, or a changed file, fails."""
    before = path.read_bytes()
    try:
        result = read()
    except ExperimentError as error:
        result = None
        assert "\n" not in str(error)
        assert str(path) in str(error)
    assert path.read_bytes() == before
    return result


@mutations
@given(data=st.data())
def test_a_mutated_checkpoint_is_refused_or_unharmed(folder: Path, data: st.DataObject) -> None:
    path = folder / "mutated.pt"
    path.write_bytes(mutate(data, (folder / "good.pt").read_bytes()))
    state = loads_or_refuses(path, lambda: load_checkpoint(path))
    assert state is None or same(state, load_checkpoint(folder / "good.pt"))


@mutations
@given(data=st.data())
def test_a_checkpoint_with_a_mutated_pickle_is_refused_or_unharmed(folder: Path, data: st.DataObject) -> None:
    path = folder / "mutated.pt"
    shutil.copy(folder / "good.pt", path)
    rewrite(path, lambda pickled: mutate(data, pickled))
    state = loads_or_refuses(path, lambda: load_checkpoint(path))
    assert state is None or same(state, load_checkpoint(folder / "good.pt"))


@mutations
@given(data=st.data(), name=st.sampled_from(["bare.pt", "legacy.pt"]))
def test_a_mutated_foreign_checkpoint_is_refused_or_a_dict(folder: Path, data: st.DataObject, name: str) -> None:
    path = folder / "mutated.pt"
    path.write_bytes(mutate(data, (folder / name).read_bytes()))
    assert isinstance(loads_or_refuses(path, lambda: load_checkpoint(path, foreign=True)), dict | None)


NASTY = [
    b"!!python/object/apply:os.system [true]",
    b"!!int ''",
    b"!!timestamp x",
    b"2001-99-99",
    b"&a ",
    b"*a ",
    b"<<: ",
]
NASTY += [
    b"? ",
    b"- ",
    b"{",
    b"[[[[",
    b": ",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"%YAML 9.9\n---\n",
    b"!!binary =",
    b"\n",
]


@mutations
@given(data=st.data())
def test_mutated_settings_are_refused_or_plain(folder: Path, data: st.DataObject) -> None:
    path = folder / "args.yaml"
    path.write_bytes(mutate(data, (folder / "good.yaml").read_bytes(), NASTY))
    opened = loads_or_refuses(path, lambda: Experiment.open(folder).settings)
    for key, value in (opened or {}).items():
        assert type(key) is str
        for item in value if type(value) is list else [value]:
            assert type(item) in (type(None), bool, int, float, str)


@mutations
@given(data=st.data())
def test_mutated_metrics_are_refused_or_rows(folder: Path, data: st.DataObject) -> None:
    (folder / "args.yaml").write_bytes((folder / "good.yaml").read_bytes())
    path = folder / "metrics.csv"
    path.write_bytes(mutate(data, (folder / "good.csv").read_bytes(), [b'"', b",", b"\r", b"\0", b"\xff"]))
    rows = loads_or_refuses(path, lambda: Experiment.open(folder).read_metrics())
    if rows is not None:
        with Experiment.open(folder, lock="train", echo=quiet) as run:
            run.append_metrics({"epoch": 3})
            assert len(run.read_metrics()) == len(rows) + 1


@mutations
@given(data=st.data())
def test_mutated_json_is_refused_or_read(folder: Path, data: st.DataObject) -> None:
    path = folder / "mutated.json"
    path.write_bytes(
        mutate(data, b'{"clean": 0.5, "records": [1, null, "x"]}', [b"[" * 10**5, b"\xff", b"NaN", b"\\ud800"])
    )
    loads_or_refuses(path, lambda: read_json(path))


# --- The folder and its settings --------------------------------------------------------------------------------------


def test_the_settings_come_back_as_they_went(tmp_path: Path) -> None:
    with Experiment.create(tmp_path / "deep" / "er", "run", {**SETTINGS, "eps": (2, 4)}) as run:
        assert run.folder == tmp_path / "deep" / "er" / "run"
        assert run.settings == SETTINGS
    assert Experiment.open(run.folder).settings == SETTINGS
    assert yaml.safe_load((run.folder / "args.yaml").read_text()) == SETTINGS


def test_settings_are_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    with new_experiment(tmp_path) as run:
        with refused("'epochs' holds a dict", run.folder / "args.yaml"):
            run.update_settings({**SETTINGS, "epochs": {}})
        assert run.settings == Experiment.open(run.folder).settings == SETTINGS
        run.update_settings({**SETTINGS, "epochs": 5})
        assert run.settings == Experiment.open(run.folder).settings == {**SETTINGS, "epochs": 5}


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@mutations
@given(values=st.dictionaries(st.text(), scalars | st.lists(scalars, max_size=3), max_size=4))
def test_any_plain_settings_come_back_as_they_went(values: dict) -> None:
    with tempfile.TemporaryDirectory() as root, Experiment.create(root, "run", values) as run:
        read = Experiment.open(run.folder).settings
        assert read == values
        assert same(read, values)


def test_an_existing_folder_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("x")
    (tmp_path / "run-2").write_text("a file of that name")
    with refused("exists and is not overwritten", tmp_path / "run"):
        Experiment.create(tmp_path, "run", SETTINGS, exist="error")
    with new_experiment(tmp_path) as third, new_experiment(tmp_path) as fourth:
        assert [third.folder.name, fourth.folder.name] == ["run-3", "run-4"]
    assert names(tmp_path / "run") == ["precious"]
    assert (tmp_path / "run-2").read_text() == "a file of that name"


def test_processes_that_create_the_same_name_get_a_folder_each(tmp_path: Path) -> None:
    start_read, start_write = os.pipe()

    def create() -> None:
        os.close(start_write)
        os.read(start_read, 1)  # All wait here until the parent closes its end.
        for _ in range(10):
            new_experiment(tmp_path)

    children = [in_child(create) for _ in range(6)]
    os.close(start_write)
    assert [wait(child) for child in children] == [0] * 6
    assert names(tmp_path) == sorted(["run", *(f"run-{number}" for number in range(2, 61))])
    assert all(Experiment.open(folder).settings == SETTINGS for folder in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\0b", "x" * 300])
def test_impossible_names_are_refused(tmp_path: Path, name: str) -> None:
    with refused("cannot be the name|File name too long"):
        Experiment.create(tmp_path, name, SETTINGS)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "bad", [{"a": {"b": 1}}, {"a": [[1]]}, {"a": Path("x")}, {1: 2}, {"a": np.float64(1)}, {"a": torch.ones(1)}, [1]]
)
def test_settings_that_are_not_plain_are_refused_before_a_folder_is_made(tmp_path: Path, bad: Any) -> None:
    with refused("accepted are|must be", tmp_path / "run" / "args.yaml"):
        Experiment.create(tmp_path, "run", bad)
    assert names(tmp_path) == []


def test_a_place_that_cannot_hold_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refused("cannot create .*: File exists", tmp_path / "file"):
        Experiment.create(tmp_path / "file", "run", SETTINGS)
    with refused("exist='ask': accepted are 'rename' and 'error'"):
        Experiment.create(tmp_path, "run", SETTINGS, exist="ask")


BAD_YAML = {
    "nothing": ("", "must be a mapping of settings, is NoneType"),
    "a list": ("- 1", "must be a mapping of settings, is list"),
    "a text": ("hello", "is str"),
    "broken": ("a: [1", "not plain YAML"),
    "tabs": ("a:\n\t- 1", "not plain YAML"),
    "two documents": ("a: 1\n---\nb: 2", "not plain YAML"),
    "code": ("a: !!python/object/apply:os.system ['touch {marker}']", "not plain YAML .*python/object"),
    "a name": ("a: !!python/name:os.system", "not plain YAML"),
    "a date": ("a: 2024-01-01", "'a' holds a date; accepted are null, true"),
    "an impossible date": ("a: 2024-13-41", "not plain YAML"),
    "a number as a name": ("1: a", "must be text, not '1'"),
    "nested": ("a: {b: 1}", "'a' holds a dict"),
    "aliases": ("a: &a [x, x]\nb: *a", "aliases are not accepted"),
    "merges": ("a: &a {x: 1}\nb: {<<: [*a, *a]}", "aliases are not accepted"),
    "depth": ("a: " + "[" * 50_000, "not plain YAML"),
    "length": ("# " + "x" * 100_000, "longer than 100000 bytes"),
    "latin-1": ("name: \xe9".encode("latin-1"), "not UTF-8"),
}


@pytest.mark.parametrize(("content", "pattern"), BAD_YAML.values(), ids=BAD_YAML.keys())
def test_settings_that_lie_are_refused(tmp_path: Path, content: str | bytes, pattern: str) -> None:
    path, marker = tmp_path / "args.yaml", tmp_path / "was-run"
    path.write_bytes(content if isinstance(content, bytes) else content.replace("{marker}", str(marker)).encode())
    with refused(pattern, path):
        Experiment.open(tmp_path)
    assert not marker.exists()
    assert names(tmp_path) == ["args.yaml"]


def test_what_is_no_experiment_folder_is_named(tmp_path: Path) -> None:
    with refused("no such experiment folder", tmp_path / "gone"):
        Experiment.open(tmp_path / "gone")
    with refused("not an experiment folder .no args.yaml", tmp_path):
        Experiment.open(tmp_path)
    (tmp_path / "args.yaml").mkdir()
    with refused("not a regular file", tmp_path / "args.yaml"):
        Experiment.open(tmp_path)


def test_settings_are_held_against_their_types() -> None:
    spec = {"lr": float, "epochs": int, "eps": list, "pretrained": (str, type(None)), "augment": bool}
    good = {"lr": 1, "epochs": 3, "eps": [], "pretrained": None, "augment": False}
    check_settings(good, spec)
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
            check_settings(changed, spec, "run/args.yaml")


# --- The lock ---------------------------------------------------------------------------------------------------------


def hold(folder: Path, also: Callable[[], Any] = lambda: None) -> int:
    """A child that holds the training lock until it is killed; returns once it does."""
    ready_read, ready_write = os.pipe()

    def body() -> None:
        held = Experiment.open(folder, lock="train", echo=quiet)
        also()
        os.write(ready_write, b"x")
        time.sleep(60)
        held.close()

    child = in_child(body)
    os.close(ready_write)
    assert os.read(ready_read, 1) == b"x"
    os.close(ready_read)
    return child


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    new_experiment(tmp_path).close()
    child = hold(tmp_path / "run")
    with refused(f"in use: process {child} on .* has it for train", tmp_path / "run"):
        Experiment.open(tmp_path / "run", lock="train")
    Experiment.open(tmp_path / "run").read_metrics()
    Experiment.open(tmp_path / "run", lock="eval").close()
    kill(child)
    with Experiment.open(tmp_path / "run", lock="train", echo=quiet) as run:
        run.log("mine")


def test_an_orphan_of_a_dead_process_does_not_hold_its_lock(tmp_path: Path) -> None:
    new_experiment(tmp_path).close()
    life_read, life_write = os.pipe()  # Reads as ended once every process that has the other end is gone.

    def orphan() -> None:
        os.read(life_read, 1)

    def fork() -> None:
        os.close(life_write)
        in_child(orphan)

    child = hold(tmp_path / "run", fork)
    kill(child)
    Experiment.open(tmp_path / "run", lock="train").close()
    os.close(life_write)


def test_the_lock_excludes_within_a_process_and_is_given_back(tmp_path: Path) -> None:
    with new_experiment(tmp_path) as run, refused(f"in use: process {os.getpid()}", run.folder):
        Experiment.open(run.folder, lock="train")
    with Experiment.open(run.folder, lock="eval"), refused("has it for eval", run.folder):
        Experiment.open(run.folder, lock="eval")
    Experiment.open(run.folder, lock="train").close()


def test_nothing_is_written_without_the_lock(tmp_path: Path) -> None:
    run = new_experiment(tmp_path)
    run.close()
    before = files(run.folder)
    with Experiment.open(run.folder, lock="eval", echo=quiet) as evaluating:
        for reader in (run, Experiment.open(run.folder), evaluating):
            for write in (
                lambda: reader.save_latest({}),  # noqa: B023
                lambda: reader.save_best({}),  # noqa: B023
                lambda: reader.update_settings(SETTINGS),  # noqa: B023
                lambda: reader.append_metrics({"epoch": 1}),  # noqa: B023
                lambda: reader.truncate_metrics(0),  # noqa: B023
            ):
                with refused("is not open with the lock", error=RuntimeError):
                    write()
    assert {name: data for name, data in files(run.folder).items() if name != ".lock-eval"} == before


def test_abandoned_halves_are_cleared_by_the_run_that_alone_can_write_them(tmp_path: Path) -> None:
    new_experiment(tmp_path).close()
    folder = tmp_path / "run"
    for name in ("latest.pt", "epoch_0010.pt", "metrics.csv", "args.yaml", "autoattack.json"):
        (folder / f".{name}.0123456789abcdef.tmp").write_text("half")
    Experiment.open(folder)
    assert len(list(folder.glob(".*.tmp"))) == 5
    Experiment.open(folder, lock="train").close()
    assert [path.name for path in folder.glob(".*.tmp")] == [".autoattack.json.0123456789abcdef.tmp"]
    Experiment.open(folder, lock="eval").close()
    assert names(folder) == [".lock", ".lock-eval", "args.yaml"]


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Without root's privilege to write where permissions forbid it."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_a_folder_without_write_permission_is_refused_and_left_alone() -> None:
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        with new_experiment(Path(root)) as run:
            run.save_latest(a_state(1))
        (run.folder / ".lock").unlink()
        os.chmod(run.folder, 0o555)
        before = files(run.folder)
        try:
            with unprivileged():
                assert Experiment.open(run.folder).load_latest().state["epoch"] == 1
                with refused("cannot lock .*Permission denied", run.folder / ".lock"):
                    Experiment.open(run.folder, lock="train")
                with refused("cannot write .*Permission denied", run.folder / "latest.pt"):
                    save_checkpoint(run.folder / "latest.pt", a_state(2))
        finally:
            os.chmod(run.folder, 0o755)
        assert files(run.folder) == before


def test_a_permission_lost_on_the_way_leaves_the_last_good_files() -> None:
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        with new_experiment(Path(root)) as run:
            run.save_latest(a_state(1))
            run.append_metrics({"epoch": 1})
            before = files(run.folder)
            os.chmod(run.folder, 0o555)
            try:
                with unprivileged():
                    for write in (lambda: run.save_latest(a_state(2)), lambda: run.append_metrics({"epoch": 2})):
                        with refused("cannot write .*Permission denied"):
                            write()
            finally:
                os.chmod(run.folder, 0o755)
            assert files(run.folder) == before
            run.save_latest(a_state(2))
            assert run.load_latest().state["epoch"] == 2


# --- latest.pt and previous.pt ----------------------------------------------------------------------------------------


def test_latest_and_the_generation_before(tmp_path: Path) -> None:
    with new_experiment(tmp_path) as run:
        assert run.load_latest() is None
        for epoch in (1, 2, 3):
            run.save_latest(a_state(epoch))
        run.save_best(a_state(2))
        run.save_named("epoch_0001", a_state(1))
    read = Experiment.open(run.folder).load_latest()
    assert same(read.state, loaded(a_state(3)))
    assert (read.path, read.note) == (run.folder / "latest.pt", "")
    for name, epoch in {"previous": 2, "best": 2, "epoch_0001": 1}.items():
        assert load_checkpoint(run.folder / f"{name}.pt")["epoch"] == epoch
    assert names(run.folder) == [".lock", "args.yaml", "best.pt", "epoch_0001.pt", "latest.pt", "previous.pt"]


@pytest.mark.parametrize("how", ["truncated", "missing", "text"])
def test_where_latest_is_damaged_previous_serves_and_is_kept(tmp_path: Path, how: str) -> None:
    with new_experiment(tmp_path) as run:
        run.save_latest(a_state(1))
        run.save_latest(a_state(2))
    latest = run.folder / "latest.pt"
    content = {"truncated": latest.read_bytes()[:-100], "text": b"hello", "missing": None}[how]
    latest.unlink()
    if content is not None:
        latest.write_bytes(content)
    with Experiment.open(run.folder, lock="train") as run:
        read = run.load_latest()
        assert read.state["epoch"] == 1
        assert read.path == run.folder / "previous.pt"
        assert str(latest) in read.note
        assert ("No such file" if how == "missing" else "checkpoint") in read.note
        assert "\n" not in read.note
        assert content is None or latest.read_bytes() == content
        run.save_latest(a_state(5))
        assert load_checkpoint(latest)["epoch"] == 5
        assert load_checkpoint(run.folder / "previous.pt")["epoch"] == 1, "a damaged file took a good one's place"
        run.save_latest(a_state(6))
        assert load_checkpoint(run.folder / "previous.pt")["epoch"] == 5


def test_a_latest_that_someone_removed_does_not_stop_the_run(tmp_path: Path) -> None:
    with new_experiment(tmp_path) as run:
        for epoch in (1, 2):
            run.save_latest(a_state(epoch))
        (run.folder / "latest.pt").unlink()
        run.save_latest(a_state(3))
        assert [load_checkpoint(run.folder / name)["epoch"] for name in ("previous.pt", "latest.pt")] == [1, 3]


def test_where_both_are_damaged_both_are_named(tmp_path: Path) -> None:
    with new_experiment(tmp_path) as run:
        run.save_latest(a_state(1))
        (run.folder / "latest.pt").write_bytes(b"")
        with refused("latest.pt: not a checkpoint.*previous.pt: No such file", run.folder / "latest.pt"):
            run.load_latest()
        (run.folder / "previous.pt").write_bytes(b"x")
        with refused("latest.pt: not a checkpoint.*previous.pt: not a checkpoint", run.folder / "previous.pt"):
            run.load_latest()


def no_links(*_: Any) -> None:
    raise PermissionError(1, "Operation not permitted")


def newest(folder: Path) -> int:
    found = Experiment.open(folder).load_latest()
    epoch = found.state["epoch"]
    assert same(found.state, loaded(a_state(epoch)))
    return epoch


@pytest.mark.parametrize("links", [True, False])
def test_a_crash_at_any_system_call_leaves_a_loadable_generation(tmp_path: Path, links: bool) -> None:
    survived = []
    for fatal in range(1, 50):
        folder = tmp_path / f"{fatal}"

        def body() -> None:
            if not links:
                os.link = no_links
            run = new_experiment(tmp_path, folder.name)  # noqa: B023
            run.save_latest(a_state(1))
            run.save_latest(a_state(2))
            calls = 0

            def dying(call: Callable) -> Callable:
                def wrapped(*args: Any, **options: Any) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls == fatal:  # noqa: B023
                        os._exit(9)
                    return call(*args, **options)

                return wrapped

            for name in ("link", "replace", "fsync", "open", "close", "unlink"):
                setattr(os, name, dying(getattr(os, name)))
            run.save_latest(a_state(3))
            run.save_latest(a_state(4))

        status = wait(in_child(body))
        assert not links or (folder / "latest.pt").exists()
        survived.append(newest(folder))
        with Experiment.open(folder, lock="train") as run:
            run.load_latest()
            run.save_latest(a_state(9))
            assert load_checkpoint(folder / "previous.pt")["epoch"] == survived[-1]
            assert names(folder) == [".lock", "args.yaml", "latest.pt", "previous.pt"]
        if status == 0:
            break
        assert status == 9
    assert status == 0
    assert fatal > 8
    assert survived == sorted(survived)
    assert (survived[0], survived[-1]) == (2, 4)


def test_kill_9_at_any_moment_loses_nothing_that_was_finished(tmp_path: Path) -> None:
    new_experiment(tmp_path).close()
    folder = tmp_path / "run"
    chance = random.Random(0)
    reached = 0
    for _ in range(KILLS):
        told_read, told_write = os.pipe()

        def body() -> None:
            run = Experiment.open(folder, lock="train", echo=quiet)
            found = run.load_latest()
            epoch = 0 if found is None else found.state["epoch"]
            run.truncate_metrics(epoch)
            while True:
                os.write(told_write, epoch.to_bytes(4, "little"))  # noqa: B023
                epoch += 1
                run.append_metrics({"epoch": epoch, "loss": 1 / epoch})
                run.save_latest(a_state(epoch))

        child = in_child(body)
        os.close(told_write)
        first = os.read(told_read, 4)
        time.sleep(chance.uniform(0, 0.1))
        kill(child)
        with os.fdopen(told_read, "rb") as told:
            finished = int.from_bytes((first + told.read())[-4:], "little")
        assert finished >= reached
        reached = newest(folder) if (folder / "latest.pt").exists() else 0
        assert finished <= reached <= finished + 1
        rows = Experiment.open(folder).read_metrics()
        assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
        assert reached <= len(rows) <= reached + 1
    assert reached > 0
    Experiment.open(folder, lock="train").close()
    assert not list(folder.glob(".*.tmp"))


# --- A full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [2_000, 100_000, 402_000])
def test_a_full_disk_leaves_the_files_that_were_there(tmp_path: Path, room: int) -> None:
    """With room for nothing, for some of the tensors, and for all but the last bytes of the checkpoint."""
    with new_experiment(tmp_path) as run:
        for value in (0, 1):
            run.save_latest({"x": torch.full((10,), value)})
        run.save_best({"x": torch.zeros(10)})
        (run.folder / "metrics.csv").write_text("note\n" + ("x" * 99 + "\n") * (room // 100 - 1))
        write_json(run.folder / "autoattack.json", [1])
    before = files(run.folder)

    def body() -> None:
        run = Experiment.open(tmp_path / "run", lock="train", echo=quiet)
        run.load_latest()
        large = {"x": torch.randn(100_000), "y": torch.zeros(100)}
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        for name, write in {
            "latest.pt": lambda: run.save_latest(large),
            "best.pt": lambda: run.save_best(large),
            "metrics.csv": lambda: run.append_metrics({"note": "y" * 200}),
            "autoattack.json": lambda: write_json(run.folder / "autoattack.json", ["x" * room]),
        }.items():
            with refused(f"^cannot write .*{name}: File too large$", run.folder / name):
                write()

    assert wait(in_child(body)) == 0
    after = files(run.folder)
    assert {name: after[name] for name in after if name != ".lock"} == {n: before[n] for n in before if n != ".lock"}
    with Experiment.open(run.folder, lock="train") as run:
        assert run.load_latest().path.name == "latest.pt"
        run.save_latest(a_state(3))


def test_a_failed_rename_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "a.pt", a_state(1))

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    for call in ("replace", "fsync"):
        with monkeypatch.context() as broken:
            broken.setattr(os, call, fail)
            with refused("cannot write .*: Input/output error", tmp_path / "a.pt"):
                save_checkpoint(tmp_path / "a.pt", a_state(2))
        assert names(tmp_path) == ["a.pt"]
        assert load_checkpoint(tmp_path / "a.pt")["epoch"] == 1


# --- Metrics, log, results --------------------------------------------------------------------------------------------


def test_metrics_come_back_as_numbers_and_columns_grow(tmp_path: Path) -> None:
    with new_experiment(tmp_path) as run:
        assert run.read_metrics() == []
        run.append_metrics({"epoch": 1, "loss": 0.1 + 0.2, "phase": "burn-in, first"})
        run.append_metrics({"phase": 'a "b"', "epoch": 2, "loss": 1e-300})
        assert (run.folder / "metrics.csv").read_text() == (
            'epoch,loss,phase\n1,0.30000000000000004,"burn-in, first"\n2,1e-300,"a ""b"""\n'
        )
        run.append_metrics({"epoch": 3, "margin": None, "found": 0.5})
        assert (run.folder / "metrics.csv").read_text().splitlines() == [
            "epoch,loss,phase,margin,found",
            '1,0.30000000000000004,"burn-in, first",,',
            '2,1e-300,"a ""b""",,',
            "3,,,,0.5",
        ]
    assert Experiment.open(run.folder).read_metrics() == [
        {"epoch": 1, "loss": 0.1 + 0.2, "phase": "burn-in, first", "margin": None, "found": None},
        {"epoch": 2, "loss": 1e-300, "phase": 'a "b"', "margin": None, "found": None},
        {"epoch": 3, "loss": None, "phase": None, "margin": None, "found": 0.5},
    ]


@pytest.mark.parametrize("value", [torch.tensor(1.0), np.float32(1), [1]])
def test_metrics_that_are_not_plain_are_refused(tmp_path: Path, value: Any) -> None:
    with new_experiment(tmp_path) as run, refused("metric 'loss' is a", error=TypeError):
        run.append_metrics({"epoch": 1, "loss": value})
    assert not (run.folder / "metrics.csv").exists()


def test_a_run_cut_and_resumed_has_the_metrics_of_one_that_was_not(tmp_path: Path) -> None:
    rows = [{"epoch": epoch, "loss": 1 / epoch} | ({"margin": 0.5} if epoch > 3 else {}) for epoch in range(1, 7)]
    with new_experiment(tmp_path, "whole") as whole:
        for row in rows:
            whole.append_metrics(row)
    expected = (whole.folder / "metrics.csv").read_bytes()
    for cut in range(len(rows) + 1):
        for keep in (cut, lambda row: row["epoch"] <= cut):  # noqa: B023
            with new_experiment(tmp_path, "cut") as run:
                assert run.truncate_metrics(keep) == 0
                assert not (run.folder / "metrics.csv").exists()
                for row in rows[: cut + 1]:
                    run.append_metrics(row)
                with open(run.folder / "metrics.csv", "a") as file:
                    file.write("7,0.1")  # As a crash of a program that appends would leave it.
                assert run.truncate_metrics(keep) == len(rows[: cut + 1]) - cut
                assert [row["epoch"] for row in run.read_metrics()] == list(range(1, cut + 1))
                for row in rows[cut:]:
                    run.append_metrics(row)
            assert (run.folder / "metrics.csv").read_bytes() == expected


def test_metrics_that_lie_are_refused(tmp_path: Path) -> None:
    with new_experiment(tmp_path) as run:
        path = run.folder / "metrics.csv"
        cases = {"a,b\n1\n": "row 2 does not fit the 2 columns", "a,b\n1,2,3\n": "row 2", "a,a\n1,2\n": "row 1"}
        for content, pattern in {**cases, 'a,b\n1,"2\n': "unexpected end of data"}.items():
            path.write_text(content)
            for use in (run.read_metrics, lambda: run.append_metrics({"a": 1}), lambda: run.truncate_metrics(0)):
                with refused(pattern, path):
                    use()


def test_the_log_has_a_line_a_message_with_the_time(tmp_path: Path) -> None:
    said: list[str] = []
    with Experiment.create(tmp_path, "run", SETTINGS, echo=said.append) as run:
        run.log("epoch 1: done")
    with Experiment.open(run.folder, lock="train", echo=said.append) as run:
        run.log("resumed \udc80")
    with Experiment.open(run.folder, lock="eval", echo=said.append) as run:
        run.log("attacked")
    assert said == ["epoch 1: done", "resumed \udc80", "attacked"]
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    text = (run.folder / "train.log").read_text()
    assert re.fullmatch(f"{stamp}epoch 1: done\n{stamp}resumed .*\n", text)
    assert re.fullmatch(f"{stamp}attacked\n", (run.folder / "eval.log").read_text())


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "autoattack.json"
    write_json(path, {"clean": 0.5, "records": [1, None, "é"]})
    assert read_json(path) == json.loads(path.read_text()) == {"clean": 0.5, "records": [1, None, "é"]}
    assert not stat.S_IMODE(path.stat().st_mode) & 0o111
    for bad in ({"x": float("nan")}, {"x": torch.ones(1)}, {"x": {1, 2}}):
        with refused("cannot write", path):
            write_json(path, bad)
    with refused("No such file", tmp_path / "gone" / "a.json"):
        write_json(tmp_path / "gone" / "a.json", 1)
    path.write_text('{"a": 1')
    with refused("not JSON", path):
        read_json(path)
    path.write_text("[" * 200_000)
    with refused("not JSON", path):
        read_json(path)
    assert names(tmp_path) == ["autoattack.json"]
