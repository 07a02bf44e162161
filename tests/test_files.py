"""Files that are written whole or not at all, and read without trust."""

import json
import stat
from pathlib import Path

import pytest
import torch
from folders import a_folder_of_everything, loads_or_refuses, mutate, mutations, names, refused
from hypothesis import given
from hypothesis import strategies as st

from storage.files import read_json, write_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_folder_of_everything(tmp_path_factory.mktemp("mutated"))


@mutations
@given(data=st.data())
def test_mutated_json_is_refused_or_read(folder: Path, data: st.DataObject) -> None:
    path = folder / "mutated.json"
    path.write_bytes(
        mutate(data, b'{"clean": 0.5, "records": [1, null, "x"]}', [b"[" * 10**5, b"\xff", b"NaN", b"\\ud800"])
    )
    loads_or_refuses(path, lambda: read_json(path))


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
