"""Fifty million generated images: opened in seconds, trained on in little memory. The file is sparse, its headers real.

zipfile writes it, with its zip64 headers, and is told of the zeros that it need not write.
"""

import os
import re
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from runs import tiny

from data import content_of, load_auxiliary

ROOT = Path(__file__).parents[1]
IMAGES = 50_000_000
SHAPE = (32, 32, 3)
SIZE = 32 * 32 * 3  # bytes of an image
FILLED = 1000  # images at each of some places
PLACES = [0, 1_398_000, IMAGES // 2, IMAGES - FILLED]  # the second across 2^32 bytes


def filled_rows(place: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(place)
    return rng.integers(256, size=(FILLED, *SHAPE), dtype=np.uint8), rng.integers(10, size=FILLED)


def write_member(archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...], pieces: dict) -> None:
    """An array of zeros but for `pieces`, by the row they begin at; the zeros are not written, but in the CRC-32."""
    row = np.dtype(dtype).itemsize * int(np.prod(shape[1:]))
    zeros = bytes(1 << 24)
    with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
        done = 0
        for start, piece in [*sorted(pieces.items()), (shape[0], b"")]:
            missing = start * row - done
            archive.fp.seek(missing, os.SEEK_CUR)
            stream._file_size += missing
            if name == "label":  # of the images nobody checks it, and it would take minutes
                for at in range(0, missing, len(zeros)):
                    stream._crc = zlib.crc32(zeros[: missing - at], stream._crc)
            stream.write(piece)
            done = start * row + len(piece)


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("huge") / "50m.npz"
    filled = {place: filled_rows(place) for place in PLACES}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        images = {place: images.tobytes() for place, (images, _) in filled.items()}
        write_member(archive, "image", "|u1", (IMAGES, *SHAPE), images)
        labels = {place: labels.astype("<i8").tobytes() for place, (_, labels) in filled.items()}
        write_member(archive, "label", "<i8", (IMAGES,), labels)
    yield path
    path.unlink()


def test_it_opens_in_seconds_and_gives_its_rows(huge):
    status = huge.stat()
    assert status.st_size > 154e9 and status.st_blocks * 512 < 100e6
    with zipfile.ZipFile(huge) as archive:
        image, label = archive.infolist()
        assert label.header_offset > 2**32 and image.file_size == 128 + IMAGES * SIZE
    with open(huge, "rb") as file:
        file.seek(-10_000, os.SEEK_END)
        assert b"PK\6\6" in file.read()  # the end of a zip64's directory

    started = time.monotonic()
    auxiliary = load_auxiliary(huge, image_shape=SHAPE, num_classes=10)
    content_of(huge)
    assert time.monotonic() - started < 60
    assert len(auxiliary) == IMAGES
    for place in PLACES:
        images, labels = filled_rows(place)
        order = np.random.default_rng(0).permutation(FILLED)
        found = auxiliary.rows(place + order)
        assert np.array_equal(found.images, images[order]) and np.array_equal(found.labels, labels[order])
    assert not auxiliary.rows(np.array([FILLED, IMAGES - FILLED - 1])).images.any()


PEAK = """
import sys, train
status = train.main(sys.argv[1:])
print("peak", next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024)
sys.exit(status)
"""


def test_training_takes_little_more_memory_with_it(huge, tmp_path, capsys):
    """Of whole processes: peaks with the file and without it."""
    flags = "--method clean --epochs 1 --batch-size 128 --train-subset 256 --validation-attack-iter 1"
    peaks = []
    for name, extra in (("without", []), ("with", ["--aux-data-filename", str(huge)])):
        argv = tiny(tmp_path / name, *flags.split(), *extra)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", PEAK, *argv], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(float(re.search("peak (.*)", done.stdout)[1]))
    with capsys.disabled():
        print(f" [{IMAGES:,} images: {peaks[1] - peaks[0]:.0f} MB beside {peaks[0]:.0f}] ", end="")
    assert peaks[1] - peaks[0] < 600
