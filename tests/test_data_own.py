"""Own images prepared: once, by content, cut at any moment, damaged, moved, larger than memory."""

import os
import pickle
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from images import fill, photos, picture
from PIL import Image

from data import Loader, Split, digest, find_images, hold_out, load_images, own, preparation, to_input
from data.files import DataFileError
from data.loader import class_shares
from data.own import find_own, read_about, same_classes
from data.pictures import Picture
from storage.files import FileError, read_json, write_json
from storage.lock import take_lock


def images_of(folder, part: str) -> np.ndarray:
    """The pictures below a folder, in the order of their names."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted((folder / part).rglob("*.png"))])


@pytest.fixture
def few_at_a_time(monkeypatch):
    """Blocks of five images."""
    monkeypatch.setattr(preparation, "CHUNK", 5 * 8 * 8 * 3)


@pytest.fixture
def read(monkeypatch):
    """The files that are decoded, by their names."""
    names, decode = [], own.ImageFolder.pictures.__globals__["read_picture"]

    def counted(path, size) -> Picture:
        names.append("/".join(path.parts[-3:]))
        return decode(path, size)

    monkeypatch.setattr("data.image_folder.read_picture", counted)
    return names


def test_what_is_prepared_is_what_was_drawn(tmp_path):
    folder = photos(tmp_path)
    prepared = find_own(folder, None, None)
    for part, each in (("train", 6), ("test", 3)):
        split, expected = prepared.split(part), images_of(folder, part)
        assert split.images.dtype == torch.uint8 and np.array_equal(split.images, expected)
        assert split.labels.tolist() == np.repeat(range(4), each).tolist()
        assert np.array_equal(np.load(prepared.folder / f"{part}.npy", mmap_mode="r"), expected)
        assert prepared.digests[part] == digest(split)
    pixels = images_of(folder, "train") / 255
    assert prepared.mean == pytest.approx(tuple(pixels.mean((0, 1, 2))), abs=5e-5)
    assert prepared.std == pytest.approx(tuple(pixels.std((0, 1, 2))), abs=5e-5)
    assert prepared.counts == {"train": [6] * 4, "test": [3] * 4} and prepared.sizes == [[8, 8], [8, 8]]
    assert len(prepared.split("validation").labels) == 0


def test_it_is_prepared_once_and_again_when_the_folder_changes(tmp_path, read):
    folder = photos(tmp_path)
    first = find_own(folder, None, None)
    assert len(read) == 36 and len(set(read)) == 36
    assert find_own(folder, None, None) == first and len(read) == 36

    picture((0, 0, 0), 0).save(folder / "train" / "red" / "0.png")
    second = find_own(folder, None, None)
    assert len(read) == 72 and second.content != first.content
    assert second.content.split("/")[3] == first.content.split("/")[3]  # the test images are the same
    assert (second.split("train").images[12] == 0).sum() > 50
    # A run that began with those of before goes on with them.
    assert find_own(folder, None, None, first.content) == first and len(read) == 72


def test_the_same_images_under_other_times_and_another_path_are_the_same(tmp_path, caplog):
    folder = photos(tmp_path)
    first = find_own(folder, None, None)
    os.utime(folder / "train" / "red" / "0.png", (0, 0))
    assert find_own(folder, None, None) == first
    assert [path.name for path in first.folder.parent.iterdir() if path.is_dir()] == [first.folder.name]
    caplog.clear()
    assert find_own(folder, None, None, first.content) == first and not caplog.text
    shutil.copytree(folder, tmp_path / "moved")
    assert find_own(tmp_path / "moved", None, None).content == first.content


def test_names_and_order_of_classes_tell_images_apart(tmp_path):
    first = find_own(photos(tmp_path), None, None).content
    os.rename(tmp_path / "photos" / "train" / "red", tmp_path / "photos" / "train" / "rot")
    os.rename(tmp_path / "photos" / "test" / "red", tmp_path / "photos" / "test" / "rot")
    second = find_own(tmp_path / "photos", None, None).content
    assert first.split("/")[1:] == second.split("/")[1:] and not same_classes(first, second)
    assert same_classes(first, first)


@pytest.mark.parametrize("cut_after", [0, 1, 4, 5, 13, 23, 24, 26, 35])
def test_a_preparation_that_is_cut_goes_on_where_it_was(tmp_path, few_at_a_time, read, monkeypatch, cut_after):
    folder = photos(tmp_path)
    expected = find_own(photos(tmp_path, "other"), None, None).content
    read.clear()
    add = preparation._Writer.add
    added = []

    def cut(writer, image) -> None:
        if len(added) == cut_after:
            raise KeyboardInterrupt
        added.append(0)
        add(writer, image)

    monkeypatch.setattr(preparation._Writer, "add", cut)
    with pytest.raises(KeyboardInterrupt):
        find_own(folder, None, None)
    monkeypatch.setattr(preparation._Writer, "add", add)
    assert not list(tmp_path.glob("photos.prepared/*/about.json"))
    read.clear()
    assert find_own(folder, None, None).content == expected
    done = cut_after - cut_after % 5 if cut_after < 24 else 24 + (cut_after - 24) // 5 * 5
    assert len(read) == 36 - done
    assert [path.name for path in tmp_path.glob("photos.prepared/*.partial")] == []


def test_what_was_damaged_since_it_was_written_is_not_gone_on_with(tmp_path, few_at_a_time, monkeypatch):
    folder = photos(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_read_back", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            find_own(folder, None, None)
    (written,) = tmp_path.glob("photos.prepared/*.partial/train.npy")
    content = bytearray(written.read_bytes())
    content[1000] ^= 1
    written.write_bytes(content)
    with pytest.raises(DataFileError, match="not as it was written"):
        find_own(folder, None, None)
    assert np.array_equal(find_own(folder, None, None).split("train").images, images_of(folder, "train"))


@pytest.mark.parametrize(
    "content", ["{}", "not JSON", '{"shape": [8, 8, 3], "rows": [5], "crc": [], "sizes": [[8, 8], [8, 8]]}']
)
def test_progress_that_lies_is_told_and_the_next_call_starts_afresh(tmp_path, few_at_a_time, monkeypatch, content):
    folder = photos(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_read_back", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            find_own(folder, None, None)
    (progress,) = tmp_path.glob("photos.prepared/*.partial/train.progress.json")
    progress.write_text(content)
    with pytest.raises(FileError, match="photos.prepared"):
        find_own(folder, None, None)
    assert np.array_equal(find_own(folder, None, None).split("train").images, images_of(folder, "train"))


def test_what_is_left_of_a_folder_as_it_was_is_removed(tmp_path, few_at_a_time, monkeypatch):
    folder = photos(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_read_back", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            find_own(folder, None, None)
    os.unlink(folder / "train" / "red" / "0.png")
    assert find_own(folder, None, None).counts["train"] == [6, 6, 5, 6]
    assert list(tmp_path.glob("photos.prepared/*.partial")) == []


def test_a_second_process_waits_for_the_first_and_takes_what_it_made(tmp_path, read):
    folder = photos(tmp_path)
    (tmp_path / "photos.prepared").mkdir()
    lock = take_lock(tmp_path / "photos.prepared" / ".lock")
    found = []
    waiting = threading.Thread(target=lambda: found.append(find_own(folder, None, None)))
    waiting.start()
    time.sleep(0.3)
    assert not found and not read
    shutil.copytree(folder, tmp_path / "b" / "photos")
    made = find_own(tmp_path / "b" / "photos", None, None).folder
    read.clear()
    shutil.copytree(made, tmp_path / "photos.prepared" / made.name)
    lock.release()
    waiting.join(20)
    assert found[0].folder.name == made.name and not read


def spoil_images(folder):
    content = bytearray((folder / "train.npy").read_bytes())
    content[500] ^= 1
    (folder / "train.npy").write_bytes(content)


def spoil_labels(folder):
    labels = np.load(folder / "train-labels.npy")
    labels[0] = 9
    np.save(folder / "train-labels.npy", labels)


def cut_images(folder):
    os.truncate(folder / "train.npy", 1000)


def remove_images(folder):
    os.unlink(folder / "test.npy")


@pytest.mark.parametrize("spoil", [spoil_images, spoil_labels, cut_images, remove_images])
def test_damaged_prepared_files_are_made_again_or_named(tmp_path, spoil, caplog):
    folder = photos(tmp_path)
    prepared = find_own(folder, None, None)
    expected = images_of(folder, "train")
    spoil(prepared.folder)
    parts = load_images(str(folder))
    assert np.array_equal(parts["train"].images, expected) and "preparing it again" in caplog.text
    spoil(prepared.folder)
    shutil.rmtree(folder)
    with pytest.raises(DataFileError, match=f"{prepared.folder}.*; {folder}, which it was prepared from, is gone"):
        load_images(str(folder), None, None, prepared.content)


@pytest.mark.parametrize(
    "change",
    [
        {"content": "x"},
        {"classes": ["a"]},
        {"counts": {"train": [6] * 3}},
        {"mean": [0.5]},
        {"std": [0.1, float(2), 0.1]},
        {"sizes": 3},
        {"digests": {}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_a_prepared_folder_says_of_itself_is_not_believed(tmp_path, change):
    folder = photos(tmp_path)
    prepared = find_own(folder, None, None)
    assert read_about(prepared.folder) == prepared
    write_json(prepared.folder / "about.json", read_json(prepared.folder / "about.json") | change)
    assert read_about(prepared.folder) is None
    assert find_own(folder, None, None) == prepared


def test_a_source_that_is_gone_or_other_is_said(tmp_path, caplog, monkeypatch):
    folder = photos(tmp_path)
    first = find_own(folder, None, None)
    shutil.move(folder, tmp_path / "away")
    monkeypatch.setattr(own, "_FOUND", set())  # in another process
    for _ in range(2):
        assert find_own(folder, None, None, first.content) == first
    assert caplog.text.count("has changed, or is gone") == 1
    with pytest.raises(FileNotFoundError, match=f"--dataset {folder}: no such folder, or .npz file"):
        find_own(folder, None, None)
    shutil.rmtree(first.folder)
    fill(folder / "train", seed=5)
    with pytest.raises(DataFileError, match=f"--dataset {folder}: its images .* are not those of the run"):
        find_own(folder, None, None, first.content)


def test_images_are_prepared_below_data_dir_where_one_is_given(tmp_path):
    folder = photos(tmp_path)
    assert find_images(str(folder), tmp_path / "data").folder.parent == tmp_path / "data" / "photos.prepared"
    assert find_images(str(folder)).folder.parent == tmp_path / "photos.prepared"
    shutil.rmtree(tmp_path / "data")
    assert find_images(str(folder), tmp_path / "data").folder.parent == tmp_path / "photos.prepared"


def test_a_full_disk_is_said_and_nothing_counts(tmp_path, few_at_a_time, monkeypatch):
    folder = photos(tmp_path)
    write, written = preparation._Writer._write, []

    def full(writer, content) -> None:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(0)
        write(writer, content)

    monkeypatch.setattr(preparation._Writer, "_write", full)
    with pytest.raises(FileError, match=r"elsewhere: --data-dir\) in .*photos.prepared: No space left on device"):
        find_own(folder, None, None)
    monkeypatch.setattr(preparation._Writer, "_write", write)
    assert np.array_equal(find_own(folder, None, None).split("train").images, images_of(folder, "train"))


# --- Larger than memory -----------------------------------------------------------------------------------------------


def test_images_that_stay_on_disk_give_the_same_batches_and_splits(tmp_path, monkeypatch):
    folder = photos(tmp_path)
    in_memory = load_images(str(folder))
    monkeypatch.setattr(own, "IN_MEMORY", 0)
    stored = load_images(str(folder))
    assert not isinstance(stored["train"].images, torch.Tensor)
    assert digest(stored["test"]) == digest(in_memory["test"])
    for ours, theirs in zip(hold_out(stored["train"], str(folder), 3), hold_out(in_memory["train"], str(folder), 3)):  # noqa: B905
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert torch.equal(ours.images.read(), theirs.images) and ours.images.shape == theirs.images.shape
        assert torch.equal(to_input(ours.images[2:5]), to_input(theirs.images[2:5]))
        batches = zip(*(Loader(split, 7, seed=1).epoch(2, 1) for split in (ours, theirs)), strict=True)
        for (x, y), (x2, y2) in batches:
            assert torch.equal(x, x2) and torch.equal(y, y2)
    again = pickle.loads(pickle.dumps(stored["train"].images[3:9]))
    assert torch.equal(again.read(), in_memory["train"].images[3:9])


def test_nothing_is_read_of_stored_images_but_the_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(own, "IN_MEMORY", 0)
    train = load_images(str(photos(tmp_path)))["train"]
    rows = []
    read_rows = train.images.source.rows
    monkeypatch.setattr(train.images.source, "rows", lambda index: (rows.append(len(index)), read_rows(index))[1])
    kept, _ = hold_out(train, str(tmp_path), 0)
    next(iter(Loader(kept, 4, seed=0).epoch(0)))
    assert rows == [4]


# --- Held out ---------------------------------------------------------------------------------------------------------


def test_a_share_of_each_class_is_held_out():
    labels = torch.tensor([0] * 100 + [1] * 20 + [2] * 3 + [3])
    held = class_shares(labels, 0.1, seed=0)
    assert [held[labels == label].sum().item() for label in range(4)] == [10, 2, 1, 0]
    assert torch.equal(held, class_shares(labels, 0.1, seed=0)) and not torch.equal(held, class_shares(labels, 0.1, 1))
    assert [class_shares(labels, 0.9, 0)[labels == label].sum().item() for label in range(4)] == [90, 18, 2, 0]
    with pytest.raises(ValueError, match="no class has two training images"):
        hold_out(Split(torch.zeros(2, 4, 4, 3), torch.arange(2)), "/x", 0)
