"""Tiny-ImageNet-200's preparation: a small zip in the official layout, real images, and files that lie."""

import hashlib
import io
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from children import exit_status, fork
from folders import unprivileged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data import DATASETS, load_data, tiny_imagenet
from data.files import DataFileError
from tests.test_data_files import apply, damage

LARGE = os.environ.get("DYART_LARGE_TESTS") == "1"
SCRIPT = Path(__file__).parents[1] / "data" / "TinyImageNet-200.sh"
MINI = Path(__file__).parents[2] / "shared" / "data" / "tiny-imagenet-mini.zip"
ROOT = "tiny-imagenet-200/"
WNIDS = [f"n{(7 * number) % 200:08}" for number in range(200)]  # not in sorted order, as the official list


def jpeg(value: int, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value, 255 - value, 7)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def official_files() -> dict[str, bytes]:
    """A training image a class, in every tenth also a greyscale one, and 20 val images; the pixels tell the class."""
    files = {"wnids.txt": "\n".join(WNIDS).encode(), "words.txt": b"n00000000\tentity"}
    lines = []
    for position, wnid in enumerate(reversed(WNIDS)):
        value = int(wnid[1:])
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"\n"
        if value % 10 == 0:
            files[f"train/{wnid}/images/{wnid}_1.JPEG"] = jpeg(value, mode="L")
        files[f"train/{wnid}/images/{wnid}_0.JPEG"] = jpeg(value)
        if position < 20:
            files[f"val/images/val_{position}.JPEG"] = jpeg(value)
            lines.append(f"val_{position}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    files["val/val_annotations.txt"] = "".join(lines).encode()
    files["test/images/test_0.JPEG"] = b"not looked at"
    return files


FILES = official_files()


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(ROOT + name, content)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_zip(tmp_path_factory.mktemp("zip") / "official.zip", FILES)


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory) -> dict[str, str]:
    """What an undisturbed preparation makes."""
    folder = tmp_path_factory.mktemp("prepared")
    tiny_imagenet.prepare(folder, source)
    return made(folder)


def made(data_dir: Path) -> dict[str, str]:
    """The prepared files that are there, by the hash of their bytes."""
    files = (data_dir / "tiny-imagenet-200").glob("*.npz")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refuse(tmp_path: Path, source: Path, message: str) -> None:
    before = source.read_bytes() if source.is_file() else None
    with pytest.raises((ValueError, OSError), match=message) as caught:
        tiny_imagenet.prepare(tmp_path / "out", source)
    assert "\n" not in str(caught.value) and str(source) in str(caught.value)
    assert made(tmp_path / "out") == {}
    assert before is None or source.read_bytes() == before


def test_classes_are_sorted_by_wnid_and_grey_becomes_rgb(source, tmp_path, caplog):
    tiny_imagenet.prepare(tmp_path, source)
    train, test = load_data("tiny-imagenet", tmp_path)
    assert train.images.shape == (220, 64, 64, 3) and test.images.shape == (20, 64, 64, 3)
    # The wnids are numbered, so that sorted they are the labels; image 1 of a class, which is grey, follows image 0.
    assert train.labels.tolist() == sorted([*range(200), *range(0, 200, 10)])
    assert test.labels.tolist() == [int(wnid[1:]) for wnid in reversed(WNIDS)][:20]
    is_grey = torch.cat([torch.tensor([False]), train.labels[1:] == train.labels[:-1]])
    for images, labels in ((train.images[~is_grey], train.labels[~is_grey]), test):
        wanted = torch.stack([labels, 255 - labels, torch.full_like(labels, 7)], dim=1)
        assert (images.float().mean((1, 2)) - wanted).abs().max() < 4  # JPEG's colours are not exact
    grey = train.images[is_grey]
    assert (grey == grey[..., :1]).all()
    assert (grey.float().mean((1, 2, 3)) - train.labels[is_grey]).abs().max() < 1
    assert "not the complete dataset" in caplog.text


def test_a_folder_gives_the_same_as_the_zip(source, prepared, tmp_path):
    with zipfile.ZipFile(source) as archive:
        archive.extractall(tmp_path)
    tiny_imagenet.prepare(tmp_path)  # where it lies, without network
    assert made(tmp_path) == prepared
    tiny_imagenet.prepare(tmp_path / "other", tmp_path / ROOT)
    assert made(tmp_path / "other") == prepared


@pytest.mark.parametrize("place", ["", ROOT])
def test_a_zip_lying_there_is_used_and_kept(source, prepared, tmp_path, place):
    (tmp_path / place).mkdir(exist_ok=True)
    shutil.copy(source, tmp_path / place / "tiny-imagenet-200.zip")
    tiny_imagenet.prepare(tmp_path)
    assert made(tmp_path) == prepared and (tmp_path / place / "tiny-imagenet-200.zip").exists()


def test_a_download_has_to_be_complete_and_a_complete_one_is_not_repeated(source, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_imagenet, "URL", source.as_uri())
    with pytest.raises(DataFileError, match="220 training and 20 val images, not all"):
        tiny_imagenet.prepare(tmp_path)
    assert made(tmp_path) == {}
    (tmp_path / ROOT / "tiny-imagenet-200.zip").unlink()
    monkeypatch.setattr(tiny_imagenet, "OFFICIAL_COUNTS", (220, 20))
    tiny_imagenet.prepare(tmp_path)
    assert made(tmp_path) == prepared
    assert sorted(path.name for path in (tmp_path / ROOT).iterdir()) == [".lock", "test.npz", "train.npz"]
    monkeypatch.setattr(tiny_imagenet, "URL", "http://127.0.0.1:9/none.zip")
    tiny_imagenet.prepare(tmp_path)
    os.truncate(tmp_path / ROOT / "test.npz", 10_000)
    with pytest.raises(
        OSError, match=r"http://127.0.0.1:9/none.zip: .*refused.*By hand: download .* and run: bash .*\.sh"
    ):
        tiny_imagenet.prepare(tmp_path)


def test_a_complete_one_may_be_for_reading_only_and_another_place_is_named(source, monkeypatch):
    monkeypatch.setattr(tiny_imagenet, "OFFICIAL_COUNTS", (220, 20))
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / ROOT
        tiny_imagenet.prepare(root, source)
        os.chmod(root, 0o755)
        (folder / ".lock").chmod(0o444)
        with unprivileged():
            assert [len(split.labels) for split in tiny_imagenet.prepare(root)] == [220, 20]
        (folder / "test.npz").unlink()
        with unprivileged(), pytest.raises(ValueError, match=f"--data-dir.* in {folder}: Permission denied"):
            tiny_imagenet.prepare(root)


def test_a_half_downloaded_zip_is_not_used(source, tmp_path, monkeypatch):
    half = tmp_path / "half.zip"
    half.write_bytes(source.read_bytes()[:-1000])
    monkeypatch.setattr(tiny_imagenet, "URL", half.as_uri())
    with pytest.raises(OSError, match="not the expected file.*By hand"):
        tiny_imagenet.prepare(tmp_path)
    assert [path.name for path in (tmp_path / ROOT).iterdir()] == [".lock"]


def test_preparing_again_and_from_another_zip(source, prepared, tmp_path):
    smaller = {name: content for name, content in FILES.items() if not re.search("n.*_1.JPEG", name)}
    tiny_imagenet.prepare(tmp_path, write_zip(tmp_path / "smaller.zip", smaller))
    assert len(load_data("tiny-imagenet", tmp_path)[0].labels) == 200
    for _ in range(2):
        tiny_imagenet.prepare(tmp_path, source)
        assert made(tmp_path) == prepared


def test_killed_at_any_moment_the_next_call_ends_in_the_same_state(source, prepared, tmp_path):
    def prepare() -> None:
        tiny_imagenet.prepare(tmp_path, source)

    began = time.monotonic()
    assert exit_status(fork(prepare)) == 0
    whole = time.monotonic() - began
    times = 200 if LARGE else 12
    for number in range(times):
        child = fork(prepare)
        time.sleep(whole * number / times)
        os.kill(child, signal.SIGKILL)
        assert exit_status(child) in (-signal.SIGKILL, 0)
        assert made(tmp_path).items() <= prepared.items()  # whatever is there is whole
    tiny_imagenet.prepare(tmp_path, source)
    assert made(tmp_path) == prepared
    assert sorted(path.name for path in (tmp_path / ROOT).iterdir()) == [".lock", "test.npz", "train.npz"]


def test_missing_or_damaged_files_say_which_command_makes_them(source, tmp_path):
    command = f"bash {SCRIPT} --data-dir {tmp_path}"
    with pytest.raises(DataFileError, match=f"train.npz is missing. Prepare it with: {command}"):
        load_data("tiny-imagenet", tmp_path)
    tiny_imagenet.prepare(tmp_path, source)
    os.truncate(tmp_path / ROOT / "test.npz", 10_000)
    with pytest.raises(DataFileError, match=f"test.npz: damaged.*Prepare it with: {command}") as caught:
        load_data("tiny-imagenet", tmp_path)
    assert "\n" not in str(caught.value)


ANNOTATIONS = FILES["val/val_annotations.txt"].decode()
FIRST = ANNOTATIONS.splitlines(keepends=True)[0]
IMAGE = f"train/{WNIDS[0]}/images/{WNIDS[0]}_0.JPEG"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wnids.txt": None}, "no wnids.txt in it"),
        ({"wnids.txt": "\n".join(WNIDS[1:]).encode()}, "wnids.txt has 199 classes and train/ has images of 200"),
        ({"wnids.txt": "\n".join(["n99999999", *WNIDS[1:]]).encode()}, "wnids.txt has 200 classes .* the same 200"),
        ({"wnids.txt": b"\xff\xfe"}, "decode"),
        ({"wnids.txt": bytes(1 << 21)}, "wnids.txt is larger than 1048576 bytes"),
        ({"train/n99999999/images/n99999999_0.JPEG": jpeg(0)}, "train/ has images of 201"),
        ({"val/val_annotations.txt": None}, "no val/val_annotations.txt in it"),
        ({"val/val_annotations.txt": b""}, "has 0 lines"),
        (
            {"val/val_annotations.txt": ANNOTATIONS.replace("\t", " ").encode()},
            "line 1: no such image or class: 'val_0.JPEG ",
        ),
        ({"val/val_annotations.txt": (ANNOTATIONS + "val_9999.JPEG\tn00000000\n").encode()}, "line 21: no such image"),
        ({"val/val_annotations.txt": (ANNOTATIONS + "../x.JPEG\tn00000000\n").encode()}, "line 21: no such image"),
        ({"val/val_annotations.txt": ANNOTATIONS.replace("\tn", "\tm").encode()}, "no such image or class"),
        ({"val/val_annotations.txt": (ANNOTATIONS + FIRST).encode()}, "21 lines for 20 images"),
        ({"val/val_annotations.txt": ANNOTATIONS.removeprefix(FIRST).encode()}, "19 lines .* val/images has 20"),
        ({"val/images/val_0.JPEG": None}, "line 1: no such image or class"),
        ({IMAGE: b"hello"}, f"{IMAGE}: cannot identify"),
        ({IMAGE: jpeg(3)[:-20]}, f"{IMAGE}: image file is truncated"),
        ({IMAGE: jpeg(3, (32, 32))}, rf"{IMAGE}: \(32, 32\) pixels, .* expected \(64, 64\)"),
        ({IMAGE: jpeg(3, (9000, 9000))}, rf"{IMAGE}: \(9000, 9000\) pixels"),
        ({IMAGE: jpeg(3) + bytes(1 << 21)}, "1048577 bytes, expected"),
        ({"../../../etc/x": b""}, "refused: it holds a path that leaves its folder"),
        ({"train\\x": b""}, "refused: it holds a path that leaves its folder"),
    ],
)
def test_wrong_content_is_refused_in_one_line(tmp_path, change, message):
    files = {name: content for name, content in (FILES | change).items() if content is not None}
    refuse(tmp_path, write_zip(tmp_path / "x.zip", files), message)


def test_absolute_paths_and_links_in_a_zip_are_refused(tmp_path):
    link = zipfile.ZipInfo(ROOT + "val/images/val_1.JPEG")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    files = {name: content for name, content in FILES.items() if ROOT + name != link.filename}
    for entry, message in ((zipfile.ZipInfo("/etc/passwd"), "a path that leaves its folder"), (link, "a link")):
        write_zip(tmp_path / "x.zip", files)
        with zipfile.ZipFile(tmp_path / "x.zip", "a") as archive:
            archive.writestr(entry, "/etc/passwd")
        refuse(tmp_path, tmp_path / "x.zip", f"refused: it holds {message}, '{entry.filename}'")


def test_other_files_are_refused(source, tmp_path):
    np.savez(tmp_path / "x.npz", image=np.zeros(3))
    (tmp_path / "empty.zip").touch()
    (tmp_path / "cut.zip").write_bytes(source.read_bytes()[:-100])
    refuse(tmp_path, tmp_path / "x.npz", "damaged or not Tiny-ImageNet-200 .*no wnids.txt")
    refuse(tmp_path, tmp_path / "empty.zip", "not Tiny-ImageNet-200's zip but an empty file")
    refuse(tmp_path, tmp_path / "cut.zip", "damaged or not Tiny-ImageNet-200")
    with pytest.raises(FileNotFoundError, match="none.zip: no such file"):
        tiny_imagenet.prepare(tmp_path, tmp_path / "none.zip")


SOME = settings(
    max_examples=1000 if LARGE else 40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SOME
@given(edits=damage())
def test_a_damaged_zip_gives_one_line_or_the_dataset(source, prepared, tmp_path, edits):
    damaged = apply(edits, source.read_bytes())
    path = tmp_path / "x.zip"
    path.write_bytes(damaged)
    try:
        tiny_imagenet.prepare(tmp_path, path)
    except (ValueError, OSError) as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert made(tmp_path) == prepared
    assert path.read_bytes() == damaged


@settings(SOME, max_examples=2000 if LARGE else 200)
@given(edits=damage(), name=st.sampled_from(["wnids.txt", "val/val_annotations.txt"]))
def test_damaged_lists_give_one_line_or_known_classes(edits, name):
    files = FILES | {name: apply(edits, FILES[name])}
    try:
        wnids, train, test = tiny_imagenet._layout(set(files), files.__getitem__)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert wnids == sorted(WNIDS) and len(train) == 220 and len(test) == 20
        assert all(wnid in WNIDS and file in FILES for file, wnid in train + test)


def test_the_script_from_another_directory(source, prepared, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    shutil.copy(source, tmp_path / "a.zip")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", SCRIPT, "a.zip", "--data-dir", "here"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "here/tiny-imagenet-200: 220 training and 20 test images\n"
    assert made(tmp_path / "here") == prepared


def test_an_error_is_one_line_and_status_2(tmp_path, capsys):
    assert tiny_imagenet.main([str(tmp_path / "none.zip"), "--data-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/none.zip: no such file\n"
    assert not (tmp_path / ROOT).exists()


def test_real_images(tmp_path):
    if not MINI.exists():
        pytest.skip(f"{MINI} is not there")
    tiny_imagenet.prepare(tmp_path, MINI)
    train, test = load_data("tiny-imagenet", tmp_path)
    assert torch.bincount(train.labels).tolist() == [25] * 200 and torch.bincount(test.labels).tolist() == [5] * 200
    info = DATASETS["tiny-imagenet"]
    for channel, mean, std in zip(train.images.unbind(-1), info.mean, info.std, strict=True):
        pixels = channel.float() / 255  # of a twentieth of the images
        assert pixels.mean() == pytest.approx(mean, abs=5e-3) and pixels.std() == pytest.approx(std, abs=5e-3)
    with zipfile.ZipFile(MINI) as archive:
        first = sorted(archive.read("tiny-imagenet-200/wnids.txt").decode().split())[0]
        names = [name for name in archive.namelist() if f"train/{first}/images/" in name and name.endswith("JPEG")]
        expected = [np.asarray(Image.open(archive.open(name)).convert("RGB")) for name in sorted(names)]
    assert np.array_equal(train.images[:25], expected)


def test_what_other_systems_leave_beside_or_in_front_is_passed_over(source, prepared, tmp_path):
    """macOS's ._* files, .DS_Store and __MACOSX, and a byte order mark in the lists."""
    files = dict(official_files())
    for name in ("wnids.txt", "val/val_annotations.txt"):
        files[name] = b"\xef\xbb\xbf" + files[name]
    first = next(name for name in files if name.startswith("train/"))
    litter = [f"{first.rpartition('/')[0]}/._{first.rpartition('/')[2]}", "val/images/.DS_Store", "._wnids.txt"]
    path = write_zip(tmp_path / "a.zip", files | dict.fromkeys(litter, b"litter"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/tiny-imagenet-200/._train", b"litter")
    tiny_imagenet.prepare(tmp_path / "zip", path)
    assert made(tmp_path / "zip") == prepared
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    tiny_imagenet.prepare(tmp_path / "folder", tmp_path / ROOT)
    assert made(tmp_path / "folder") == prepared


def test_a_page_or_a_pointer_is_told_for_what_it_is(tmp_path):
    path = tmp_path / "tiny-imagenet-200.zip"
    for content, what in [
        (b"<!doctype html><title>404", "a web page"),
        (b"version https://git-lfs.gi", "git lfs pull"),
    ]:
        path.write_bytes(content)
        refuse(tmp_path, path, f"not Tiny-ImageNet-200's zip but .*{what}")
