"""Prepared files: what is written is read; whatever else is in a file ends in one line, and the file is left alone."""

import io
import os
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from children import exit_status, fork, kill
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.files import DataFileError, Split, preparing, read_split, replacing, write_split

LARGE = os.environ.get("DYART_LARGE_TESTS") == "1"
EXAMPLES = settings(
    max_examples=2000 if LARGE else 100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def small_split(n: int = 6, size: int = 4, classes: int = 3) -> Split:
    rng = np.random.default_rng(0)
    return Split(
        torch.from_numpy(rng.integers(256, size=(n, size, size, 3), dtype=np.uint8)),
        torch.from_numpy(rng.integers(classes, size=n)),
    )


def read(path: Path) -> Split:
    return read_split(path, image_size=4, num_classes=3)


def check_refused(path: Path, message: str) -> None:
    before = path.read_bytes()
    with pytest.raises(DataFileError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))
    assert path.read_bytes() == before


@st.composite
def damage(draw: st.DrawFn) -> list[tuple[str, float, bytes]]:
    """A few edits: (what, where in the file as a fraction, bytes)."""
    edit = st.tuples(
        st.sampled_from(["set", "cut", "insert", "end"]), st.floats(0, 1), st.binary(min_size=1, max_size=9)
    )
    return draw(st.lists(edit, min_size=1, max_size=4))


def apply(edits: list[tuple[str, float, bytes]], content: bytes) -> bytes:
    for what, where, new in edits:
        at = int(where * len(content))
        if what == "set":
            content = content[:at] + new + content[at + len(new) :]
        elif what == "cut":
            content = content[:at] + content[at + len(new) :]
        elif what == "insert":
            content = content[:at] + new + content[at:]
        else:
            content = content[:at]
    return content


def test_what_is_written_is_read_and_numpy_reads_it_too(tmp_path):
    split = small_split()
    write_split(tmp_path / "train.npz", split)
    result = read(tmp_path / "train.npz")
    assert torch.equal(result.images, split.images) and torch.equal(result.labels, split.labels)
    with np.load(tmp_path / "train.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["image"], split.images) and np.array_equal(arrays["label"], split.labels)
    with zipfile.ZipFile(tmp_path / "train.npz") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    write_split(tmp_path / "again.npz", split)
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "train.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.npz", "train.npz"]


ARRAYS = {"image": np.zeros((6, 4, 4, 3), np.uint8), "label": np.zeros(6, np.int64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image": np.zeros((6, 5, 5, 3), np.uint8)},
            r"'image' is \(6, 5, 5, 3\) uint8, expected \(N, 4, 4, 3\) uint8",
        ),
        ({"image": np.zeros((6, 4, 4, 3), np.float32)}, "'image' is .* float32"),
        ({"image": np.zeros(6, np.uint8)}, r"'image' is \(6,\) uint8"),
        ({"image": np.zeros((0, 4, 4, 3), np.uint8), "label": np.zeros(0, np.int64)}, "holds no images"),
        ({"image": np.asfortranarray(ARRAYS["image"])}, "Fortran order"),
        ({"image": np.array([open], dtype=object)}, "Python objects"),
        ({"label": np.array([print] * 6, dtype=object)}, "Python objects"),
        ({"label": np.zeros(5, np.int64)}, r"'label' is \(5,\) int64, expected \(6,\) int64"),
        ({"label": np.zeros(6, np.int32)}, "'label' is .* int32"),
        ({"label": np.array([0, 1, 2, 3, 0, 0])}, "labels 0 to 3, expected 0 to 2"),
        ({"label": np.array([0, 1, 2, -1, 0, 0])}, "labels -1 to 2, expected 0 to 2"),
        ({"label": None}, "no array 'label' in it, found image"),
        ({"image": None, "label": None}, "no array 'image' in it, found nothing"),
    ],
)
def test_wrong_content_is_refused(tmp_path, change, message):
    arrays = {key: value for key, value in (ARRAYS | change).items() if value is not None}
    np.savez(tmp_path / "train.npz", **arrays)
    check_refused(tmp_path / "train.npz", message)


def test_foreign_and_empty_files_are_refused_and_missing_ones_are_missing(tmp_path):
    for content, what in (
        (b"", "not an .npz file but an empty file"),
        (b"hello\n", "not an .npz file but text, which begins 'hello'"),
        (np.random.default_rng(0).bytes(1000), "damaged, truncated or not an .npz file"),
    ):
        (tmp_path / "train.npz").write_bytes(content)
        check_refused(tmp_path / "train.npz", what)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.npz")
    with pytest.raises(IsADirectoryError):
        read(tmp_path)


def write_zip(path: Path, image: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("image.npy", image)
        label = io.BytesIO()
        np.save(label, ARRAYS["label"])
        archive.writestr("label.npy", label.getvalue())


def npy(shape: str, content: bytes, descr: str = "'|u1'") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (npy("(1000000000000, 4, 4, 3)", bytes(288)), "claims .* 48000000000000 bytes, but 288 are there"),
        (npy("(6, 4, 4, 3)", bytes(287)), "288 bytes, but 287 are there"),
        (npy("(6, 4, 4, 3)", bytes(289)), "288 bytes, but 289 are there"),
        (npy("(-6, -4, 4, 3)", bytes(288)), "impossible shape"),
        (npy("(6, 4, 4, 3)", bytes(288), descr="'|O'"), "Python objects"),
        (npy("((" * 200, b""), "damaged"),
        (npy("__import__('os').abort()", b""), "damaged"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100), "damaged"),
        (b"\x93NUMPY\x09\x00" + bytes(100), r"format version \(9, 0\)"),
        (b"hello", "damaged"),
        (b"", "damaged"),
    ],
)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_headers_that_lie_are_refused(tmp_path, image, message, compression):
    write_zip(tmp_path / "train.npz", image, compression)
    check_refused(tmp_path / "train.npz", message)


def test_a_member_that_expands_to_more_than_it_says_is_refused(tmp_path):
    """16 MB of zeros that the zip's directory calls 416 bytes, and the reverse."""
    path = tmp_path / "train.npz"
    for true, false in ((1 << 24, 128 + 288), (128 + 288, 1 << 31)):
        image = npy("(6, 4, 4, 3)", bytes(true - 128))
        write_zip(path, image, zipfile.ZIP_DEFLATED)
        content = path.read_bytes()
        assert content.count(true.to_bytes(4, "little")) == 2  # the local header and the directory
        path.write_bytes(content.replace(true.to_bytes(4, "little"), false.to_bytes(4, "little")))
        check_refused(path, "CRC" if true > false else "claims 2147483648 bytes, more than the file can hold")


def test_a_header_as_long_as_it_likes_is_not_read_into_memory(tmp_path):
    """100 kB in the file that expand to a header of 100 MB."""
    header = b"\x93NUMPY\x02\x00" + (100_000_000).to_bytes(4, "little") + bytes(100_000_000)
    write_zip(tmp_path / "train.npz", header, zipfile.ZIP_DEFLATED)
    del header
    tracemalloc.start()
    check_refused(tmp_path / "train.npz", "damaged")
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_other_compressions_are_refused(tmp_path):
    write_zip(tmp_path / "train.npz", npy("(6, 4, 4, 3)", bytes(288)), zipfile.ZIP_LZMA)
    check_refused(tmp_path / "train.npz", "zip compression 14")


@EXAMPLES
@given(edits=damage(), compressed=st.booleans())
def test_a_damaged_file_gives_one_line_or_the_unharmed_arrays(tmp_path, edits, compressed):
    split = small_split()
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, image=split.images.numpy(), label=split.labels.numpy())
    path = tmp_path / "train.npz"
    content = apply(edits, buffer.getvalue())
    path.write_bytes(content)
    try:
        result = read(path)
    except (ValueError, OSError) as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert torch.equal(result.images, split.images) and torch.equal(result.labels, split.labels)
    assert path.read_bytes() == content


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"), replacing(tmp_path / "file") as stream:
        stream.write(b"half of the n")
        raise OSError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == b"old"


def hold(folder: Path, seconds: float) -> None:
    with preparing(folder), open(folder / "half.tmp", "w") as stream:
        stream.write("half")
        stream.flush()
        (folder / "ready").touch()
        time.sleep(seconds)
        (folder / "done").touch()


def start_holding(folder: Path, seconds: float) -> int:
    child = fork(lambda: hold(folder, seconds))
    while not (folder / "ready").exists():
        time.sleep(0.01)
    return child


def test_a_second_process_waits_for_the_first(tmp_path, caplog):
    child = start_holding(tmp_path / "cifar-10", 0.5)
    with preparing(tmp_path / "cifar-10"):
        assert (tmp_path / "cifar-10" / "done").exists()
    assert exit_status(child) == 0
    assert f"process {child} on " in caplog.text and "prepares the data here, waiting for it" in caplog.text


def test_a_killed_process_holds_nothing_and_its_leftovers_go(tmp_path):
    child = start_holding(tmp_path / "cifar-10", 100)
    (tmp_path / "cifar-10" / "scratch.tmp").mkdir()
    (tmp_path / "cifar-10" / "scratch.tmp" / "file").touch()
    kill(child)
    with preparing(tmp_path / "cifar-10") as folder:
        assert sorted(path.name for path in folder.iterdir()) == [".lock", "ready"]
