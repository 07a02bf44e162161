"""Generated data: rows as they are in the file, checks before training, and memory that does not grow with the file."""

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from folders import unprivileged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import content_of, load_auxiliary
from data.files import DataFileError
from tests.test_data_files import apply, damage

LARGE = os.environ.get("DYART_LARGE_TESTS") == "1"
SHAPE = (4, 4, 3)


def arrays(n: int = 50, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"image": rng.integers(256, size=(n, *SHAPE), dtype=np.uint8), "label": rng.integers(10, size=n)}


def load(path: Path, **options: object):
    return load_auxiliary(path, **({"image_shape": SHAPE, "num_classes": 10} | options))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("label_type", ["int64", "uint8", "int16", ">i4", "uint64"])
def test_rows_are_those_of_the_file_in_the_order_asked_for(tmp_path, save, label_type):
    content = arrays()
    save(tmp_path / "x.npz", image=content["image"], label=content["label"].astype(label_type), other=np.arange(3))
    auxiliary = load(tmp_path / "x.npz")
    index = np.array([7, 49, 0, 7, 23])
    images, labels = auxiliary.rows(index)
    assert len(auxiliary) == 50
    assert images.dtype == torch.uint8 and np.array_equal(images, content["image"][index])
    assert labels.dtype == torch.int64 and np.array_equal(labels, content["label"][index])
    assert auxiliary.labels.itemsize == 1
    assert auxiliary.rows(index[:0]).images.shape == (0, *SHAPE)


def test_labels_of_many_classes_take_two_bytes(tmp_path):
    content = arrays()
    content["label"] = np.arange(50) * 19
    np.savez(tmp_path / "x.npz", **content)
    auxiliary = load(tmp_path / "x.npz", num_classes=1000)
    assert auxiliary.labels.itemsize == 2 and auxiliary.rows(np.array([49])).labels.tolist() == [931]


def test_an_uncompressed_file_is_read_in_place(tmp_path):
    np.savez(tmp_path / "x.npz", **arrays())
    auxiliary = load(tmp_path / "x.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"] and auxiliary.path == tmp_path / "x.npz"


def test_the_file_is_open_as_long_as_what_reads_it_is_there(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **arrays())

    def is_open() -> bool:
        return str(path) in {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}

    auxiliary = load(path)
    assert is_open() and len(auxiliary) == 50
    del auxiliary
    assert not is_open()


def test_a_compressed_file_is_converted_once_and_again_when_it_changes(tmp_path, caplog):
    path, cache = tmp_path / "x.npz", tmp_path / "cache"
    np.savez_compressed(path, **arrays())
    first = load(path, cache_dir=cache).path
    assert first.parent == cache / "x.npz.converted" and first.stat().st_size == 128 + 50 * 48
    assert np.array_equal(np.load(first, mmap_mode="r"), arrays()["image"])
    assert "converting it, once" in caplog.text
    caplog.clear()
    written = first.stat().st_mtime_ns
    os.utime(path, (0, 0))
    assert load(path, cache_dir=cache).path == first and first.stat().st_mtime_ns == written and not caplog.text

    np.savez_compressed(path, **arrays(seed=1))
    images, _ = load(path, cache_dir=cache).rows(np.arange(50))
    assert np.array_equal(images, arrays(seed=1)["image"])

    os.truncate(first, 1000)  # by hand: a write of ours is complete or not there
    np.savez_compressed(path, **arrays())
    assert np.array_equal(load(path, cache_dir=cache).rows(np.arange(50)).images, arrays()["image"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "x.npz"]


def test_a_conversion_that_fails_leaves_nothing_to_be_used(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, **arrays(2000))
    content = bytearray(path.read_bytes())
    content[50_000] ^= 1  # in the images, well after the header
    path.write_bytes(content)
    with pytest.raises(DataFileError, match=f"{path}: damaged"):
        load(path)
    assert [path.name for path in (tmp_path / "x.npz.converted").iterdir()] == [".lock"]


def test_a_full_disk_is_said_before_converting(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", **arrays())
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="needs 2400 bytes decompressed, 1000 are free .elsewhere: --cache-dir"):
        load(tmp_path / "x.npz")


ZEROS = {"image": np.zeros((6, 4, 4, 3), np.uint8), "label": np.zeros(6, np.int64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image": np.zeros((6, 3, 4, 4), np.uint8)},
            r"'image' is \(6, 3, 4, 4\) uint8, expected \(N, 4, 4, 3\) uint8",
        ),
        ({"image": np.zeros((6, 4, 4, 3), np.float32)}, "'image' is .* float32, expected .* uint8"),
        ({"image": np.asfortranarray(ZEROS["image"])}, "Fortran order"),
        ({"image": np.array([open], dtype=object)}, "Python objects"),
        ({"image": None}, "no array 'image' in it, found label"),
        ({"label": None}, "no array 'label' in it, found image"),
        ({"label": np.zeros((6, 10), np.int64)}, r"'label' is \(6, 10\) int64, expected \(6,\) integers"),
        ({"label": np.zeros(5, np.int64)}, r"'label' is \(5,\) int64, expected \(6,\) integers"),
        ({"label": np.zeros(6, np.float64)}, "'label' is .* float64"),
        ({"label": np.array([print] * 6, dtype=object)}, "Python objects"),
        ({"label": np.array([0, 10, 2, 3, 0, 0])}, "labels 0 to 10, expected 0 to 9"),
        ({"label": np.array([0, -1, 2, 3, 0, 0], np.int8)}, "labels -1 to 3, expected 0 to 9"),
        ({"label": np.array([0, 2**64 - 1, 2, 3, 0, 0], np.uint64)}, "labels 0 to 18446744073709551615"),
        ({"image": ZEROS["image"][:0], "label": ZEROS["label"][:0]}, "holds no images"),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_wrong_content_is_refused_in_one_line(tmp_path, change, message, save):
    path = tmp_path / "x.npz"
    save(path, **{key: value for key, value in (ZEROS | change).items() if value is not None})
    before = path.read_bytes()
    with pytest.raises(DataFileError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_files_that_are_missing_truncated_or_of_another_kind(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", **arrays())
    os.truncate(tmp_path / "x.npz", 2000)
    np.save(tmp_path / "x.npy", arrays()["image"])
    torch.save({"image": torch.zeros(3)}, tmp_path / "x.pt")
    for name, message in (("x.npz", "truncated"), ("x.npy", "not an .npz file"), ("x.pt", "no array 'image'")):
        with pytest.raises(DataFileError, match=f"{tmp_path}/{name}: .*{message}"):
            load(tmp_path / name)


def test_a_file_that_shrinks_under_a_running_training_is_named(tmp_path):
    np.savez(tmp_path / "x.npz", **arrays())
    auxiliary = load(tmp_path / "x.npz")
    os.truncate(tmp_path / "x.npz", 2000)
    with pytest.raises(DataFileError, match=f"{tmp_path}/x.npz: no longer holds image 49"):
        auxiliary.rows(np.array([0, 49]))


@settings(
    max_examples=2000 if LARGE else 100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(edits=damage(), compressed=st.booleans())
def test_a_damaged_file_gives_one_line_or_rows_of_the_right_kind(tmp_path, edits, compressed):
    content = arrays(6)
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **content)
    path = tmp_path / "x.npz"
    damaged = apply(edits, buffer.getvalue())
    path.write_bytes(damaged)
    try:
        auxiliary = load(path)
        images, labels = auxiliary.rows(np.arange(6))
    except (ValueError, OSError) as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        # The images of an uncompressed file are not read, so that their CRC is not checked.
        assert images.shape == content["image"].shape and np.array_equal(labels, content["label"])
        assert not compressed or np.array_equal(images, content["image"])
    assert path.read_bytes() == damaged


MEASURE = """
import sys, numpy as np, torch
from data import Loader, Split, load_auxiliary

def memory(which):  # MB
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(which)) / 1024

train = Split(torch.zeros(5000, 32, 32, 3, dtype=torch.uint8), torch.zeros(5000, dtype=torch.int64))
for x, y in Loader(train, 512, seed=0).epoch(0):
    pass
before = memory("VmHWM")
for path in sys.argv[1:]:
    auxiliary = load_auxiliary(path, image_shape=(32, 32, 3), num_classes=10)
    for x, y in Loader(train, 512, seed=0, auxiliary=auxiliary, auxiliary_fraction=0.7).epoch(0):
        pass
    for start in range(0, len(auxiliary) - 4096, 4096):  # nearly every image once
        auxiliary.rows(np.arange(start, start + 4096))
print("grown by", memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc, which only Linux has")
def test_memory_does_not_grow_with_the_file(tmp_path, capsys):
    """Peak resident memory (in which the pages of a memory map would count) against a run without generated data."""
    megabytes, allowed = (3072, 500) if LARGE else (256, 100)
    images = np.zeros((megabytes << 20) // 3072 * 3072, np.uint8).reshape(-1, 32, 32, 3)
    labels = np.zeros(len(images), np.int64)
    np.savez(tmp_path / "plain.npz", image=images, label=labels)
    np.savez_compressed(tmp_path / "compressed.npz", image=images[::2], label=labels[::2])
    paths = [tmp_path / "plain.npz", tmp_path / "compressed.npz"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    grown = float(re.search("grown by (.*)", result.stdout)[1])
    with capsys.disabled():
        print(f" [{megabytes} MB of generated images: {grown:.0f} MB more] ", end="")
    for path in tmp_path.rglob("*.np[yz]"):
        path.unlink()  # pytest keeps the folders of three runs
    assert grown < allowed


def test_a_page_or_a_pointer_is_told_for_what_it_is(tmp_path):
    for content, what in [
        (b"<html>404", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ]:
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(DataFileError, match=f"a.npz: not an .npz file but .*{what}"):
            load(tmp_path / "a.npz")


def test_what_tells_a_file_stays_where_it_goes_and_changes_with_its_content(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        np.savez(tmp_path / f"{name}.npz", **arrays(seed=seed))
    a, b, c = (content_of(tmp_path / f"{name}.npz") for name in "abc")
    assert a == b != c


def test_where_a_copy_cannot_be_written_another_place_is_named():
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        np.savez_compressed(Path(root) / "a.npz", **arrays())
        os.chmod(Path(root) / "a.npz", 0o644)
        with unprivileged():
            with pytest.raises(DataFileError, match="Permission denied.*a.npz is compressed: .*--cache-dir"):
                load(Path(root) / "a.npz")
            with tempfile.TemporaryDirectory() as cache:
                assert len(load(Path(root) / "a.npz", cache_dir=cache)) == 50
                assert list(Path(cache).rglob("*.npy"))
