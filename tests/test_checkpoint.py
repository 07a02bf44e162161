"""Checkpoints on disk: what comes back, what is damaged, and files that lie."""

import argparse
import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import (
    a_folder_of_everything,
    a_state,
    loaded,
    loads_or_refuses,
    mutate,
    mutations,
    names,
    new_experiment,
    refused,
    same,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from experiment import checkpoint as module
from experiment.checkpoint import NewerFormatError, load_checkpoint, save_checkpoint
from storage.files import read_json


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
    assert module.digest(state) == "195d528d2f5c5480f64e63a82d27b2c70d0369c6d79535c34f8e6011ac7ba5e5"


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_folder_of_everything(tmp_path_factory.mktemp("mutated"))


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


def in_zip(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "."), data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n", "a Git LFS pointer .*git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html><body>Google Drive", "a web page"),
        (b"\xef\xbb\xbf<html>", "a web page"),
        (b"a.pt".ljust(257, b"\0") + b"ustar\x0000" + bytes(600), "a tar archive: unpack it first"),
        (b"\x1f\x8b\x08" + bytes(50), "compressed by gzip"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file, as Keras writes it"),
        (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
        (in_zip(weights__bin=b"x"), "a zip archive: unpack it first"),
        (in_zip(data__pkl=b"x", constants__pkl=b"x"), "a TorchScript archive: save its state_dict"),
        (pickle.dumps({"a": 1}), "a pickle that torch.save did not write"),
        (in_zip(image__npy=b"x", label__npy=b"x"), "NumPy arrays"),
        (b"", "an empty file"),
        (b'{"message": "Not Found"}\n', 'text, which begins \'."message": "Not Found".\''),
        (b"\x08\x08\x12\x07pytorch\x1a\x052.4.1", "an ONNX model"),
        (b"\x08\x01\x12\xa4\x8f\x03" + bytes(50), "a SavedModel of TensorFlow"),
        (bytes(60) + bytes.fromhex("57fb808b247547db"), "the index of a TensorFlow checkpoint"),
        (in_zip(config__json=b"{}", model__weights__h5=b"x"), "a model of Keras"),
        (b"\x28\xb5\x2f\xfd" + bytes(50), "compressed by zstd"),
    ],
)
@pytest.mark.parametrize("foreign", [False, True])
def test_a_file_of_another_kind_is_told_for_what_it_is(
    tmp_path: Path, content: bytes, what: str, foreign: bool
) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with refused(f"a.pt: not a checkpoint but {what}", tmp_path / "a.pt"):
        load_checkpoint(tmp_path / "a.pt", foreign=foreign)


@pytest.mark.parametrize("foreign", [False, True])
def test_a_zip_with_a_damaged_directory_is_refused_in_one_line(tmp_path: Path, foreign: bool) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(2)}, path)
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PK\x01\x03"))
    with refused("not a checkpoint, or a damaged one", path):
        load_checkpoint(path, foreign=foreign)


def test_safetensors_are_read_and_damaged_ones_refused(tmp_path: Path) -> None:
    state = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2, dtype=torch.bfloat16)}
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    found = load_checkpoint(path, foreign=True)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    with refused("not a checkpoint", path):
        load_checkpoint(path)
    content = path.read_bytes()
    for end in (5, 9, 40, len(content) - 1):
        path.write_bytes(content[:end])
        with refused("model.safetensors: ", path):
            load_checkpoint(path, foreign=True)
