"""Folders and .npz files of images as people have them: what is found, what is refused in one line."""

import os
import re
import shutil

import numpy as np
import pytest
import torchvision
from folders import unprivileged
from images import CLASSES, fill, photos, picture

from data.files import DataFileError
from data.image_folder import ImageFolder
from data.image_npz import ImageArchive
from data.own import find_own
from storage.files import FileError

# --- Folders ----------------------------------------------------------------------------------------------------------


def test_files_classes_and_labels_are_those_of_torchvision(tmp_path):
    folder = photos(tmp_path)
    for name in ("B.JPG", "a.jpeg", "sub/c.png", "sub-2/d.webp", "sub/deep/e.tiff", "Z.bmp"):
        (folder / "train" / "red" / name).parent.mkdir(parents=True, exist_ok=True)
        picture((200, 0, 0), 0).save(folder / "train" / "red" / name)
    theirs = torchvision.datasets.ImageFolder(folder / "train")
    ours = ImageFolder(folder)
    assert list(ours.classes) == theirs.classes
    samples = [
        (str(folder / name), label) for name, label in zip(ours.files["train"], ours.labels["train"], strict=True)
    ]
    assert samples == theirs.samples and len(samples) == 30


@pytest.mark.parametrize(
    ("folders", "parts"),
    [
        ([""], {"train"}),
        (["train"], {"train"}),
        (["train", "test"], {"train", "test"}),
        (["train", "val"], {"train", "test"}),  # as ImageNet and Tiny-ImageNet have it
        (["Train", "Val", "TEST"], {"train", "validation", "test"}),
    ],
)
def test_parts_are_told_by_their_folders(tmp_path, folders, parts):
    for folder in folders:
        fill(tmp_path / "a" / folder, each=2)
    found = ImageFolder(tmp_path / "a")
    assert found.labels.keys() == parts and all(len(labels) == 8 for labels in found.labels.values())
    if len(folders) == 3:
        assert found.files["validation"][0] == "Val/blue/0.png" and found.files["test"][0] == "TEST/blue/0.png"


def test_hidden_files_and_what_systems_leave_are_not_seen(tmp_path, caplog):
    folder = photos(tmp_path)
    before = ImageFolder(folder)
    for name in (".DS_Store", "red/._0.png", "red/Thumbs.db", ".git/a.png", "@eaDir/0.png", "red/.hidden/a.png"):
        (folder / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "train" / name).write_bytes(b"not a picture")
    after = ImageFolder(folder)
    assert after.fingerprint == before.fingerprint and after.notes == []


def test_other_files_are_passed_over_and_told_of_once(tmp_path, caplog):
    folder = photos(tmp_path)
    for name in ("train/red/notes.txt", "train/0.png"):
        (folder / name).write_bytes(b"")
    find_own(folder, None, None)
    assert "passed over, since not pictures in a class's folder: train/0.png, train/red/notes.txt" in caplog.text
    caplog.clear()
    find_own(folder, None, None)
    assert caplog.text == ""


def test_links_are_followed(tmp_path):
    folder = photos(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    shutil.move(folder / "train" / "red", elsewhere)
    (folder / "train" / "red").symlink_to(elsewhere)
    (folder / "train" / "blue" / "link.png").symlink_to(elsewhere / "0.png")
    found = ImageFolder(folder)
    assert found.labels["train"].tolist() == [0] * 7 + [1] * 6 + [2] * 6 + [3] * 6
    assert find_own(folder, None, None).counts["train"] == [7, 6, 6, 6]


def dangling(folder):
    (folder / "train" / "red" / "a.png").symlink_to("/nowhere/a.png")


def circle(folder):
    (folder / "train" / "red" / "up").symlink_to(folder / "train" / "red")


def pipe(folder):
    os.mkfifo(folder / "train" / "red" / "a.png")


def heic(folder):
    for number in range(5):
        (folder / "train" / "red" / f"IMG_{number}.HEIC").write_bytes(b"")


def empty_class(folder):
    (folder / "train" / "yellow").mkdir()


def other_class(folder):
    fill(folder / "test", ("yellow",))


def other_case_in_test(folder):
    os.rename(folder / "test" / "red", folder / "test" / "Red")


def other_case_in_train(folder):
    fill(folder / "train", ("Red",))


def one_class(folder):
    for name in CLASSES[1:]:
        shutil.rmtree(folder / "train" / name)


def two_trains(folder):
    fill(folder / "Train")


def no_train(folder):
    shutil.rmtree(folder / "train")


def no_classes(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    picture((0, 0, 0), 0).save(folder / "a.png")


def nothing(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def damaged(folder):
    for name in CLASSES:
        (folder / "train" / name / "1.png").write_bytes(b"not a picture")
    os.truncate(folder / "test" / "red" / "2.png", 60)


def other_size(folder):
    picture((0, 0, 0), 0, width=9).save(folder / "train" / "green" / "0.png")


BAD = [
    (dangling, "links that lead nowhere or in a circle: train/red/a.png; mend or remove them"),
    (circle, "links that lead nowhere or in a circle: train/red/up; mend or remove them"),
    (pipe, "pipes, sockets or devices: train/red/a.png; remove them"),
    (heic, r"cannot be read: train/red/IMG_0.HEIC, .*1.HEIC, train/red/IMG_2.HEIC and 2 more; convert them"),
    (empty_class, "classes without images: yellow; remove them"),
    (other_class, "classes of test that train has not: yellow"),
    (other_case_in_test, r"classes of test that train has not: Red \(in train: red\)"),
    (other_case_in_train, "classes whose names differ in case only: Red and red; rename or merge them"),
    (one_class, "one class only, blue; expected .*/train/CLASS/"),
    (two_trains, "Train and train are both the train images: rename one"),
    (no_train, "there is test/ but no train/ with the images to train on"),
    (no_classes, "no images in folders of classes; expected .*/photos/train/CLASS/"),
    (nothing, "no images in folders of classes; expected .*/photos/train/CLASS/"),
    (
        damaged,
        r"5 of 36 images cannot be read: train/blue/1.png \(not a picture but text.*green/1.*red/1.* and 2 more",
    ),
    (other_size, "images of different sizes: train/green/0.png is 9x8, others are 8x8; --image-size N brings all to"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=lambda value: getattr(value, "__name__", ""))
def test_what_cannot_be_trained_on_is_refused_in_one_line_and_nothing_is_left(tmp_path, spoil, message):
    folder = photos(tmp_path)
    spoil(folder)
    with pytest.raises(FileError, match=f"{re.escape(str(folder))}: .*{message}") as caught:
        find_own(folder, None, None)
    assert "\n" not in str(caught.value)
    left = [path.name for path in tmp_path.glob("*.prepared/*")]
    assert left in ([], [".lock"])


def test_images_of_different_sizes_are_taken_with_a_size(tmp_path):
    folder = photos(tmp_path)
    other_size(folder)
    prepared = find_own(folder, None, 8)
    assert prepared.image_shape == (8, 8, 3) and prepared.sizes == [[8, 8], [8, 9]]


def test_pictures_that_are_not_square_keep_their_shape_where_all_have_it(tmp_path):
    prepared = find_own(photos(tmp_path, width=12), None, None)
    assert prepared.image_shape == (8, 12, 3) and prepared.split("train").images.shape == (24, 8, 12, 3)


def test_a_class_that_test_lacks_is_told_of(tmp_path, caplog):
    folder = photos(tmp_path)
    shutil.rmtree(folder / "test" / "green")
    assert find_own(folder, None, None).counts["test"] == [3, 0, 3, 3]
    assert "no test images of green" in caplog.text


def test_an_empty_test_folder_is_none(tmp_path):
    folder = photos(tmp_path, test=None)
    (folder / "test" / "red").mkdir(parents=True)
    assert find_own(folder, None, None).counts.keys() == {"train"}


def test_without_permission_the_folder_is_named(tmp_path):
    folder = photos(tmp_path)
    os.chmod(folder / "train" / "red", 0)
    with unprivileged(), pytest.raises(FileError, match=f"cannot read {folder}: Permission denied"):
        ImageFolder(folder)


def test_names_that_are_no_utf8_are_names_all_the_same(tmp_path):
    folder = photos(tmp_path)
    os.rename(folder / "train" / "red", os.fsencode(folder / "train") + b"/r\xe9d")
    os.rename(folder / "test" / "red", os.fsencode(folder / "test") + b"/r\xe9d")
    classes = find_own(folder, None, None).classes
    assert [os.fsencode(name) for name in classes] == [b"blue", b"green", b"r\xe9d", b"white"]


def test_a_million_files_cost_no_more_calls_than_they_have_folders(tmp_path, monkeypatch):
    """But for what the listing of a folder says by itself; seconds would be the machine's."""
    folder, looked_at, calls = fill(tmp_path / "a", each=40), os.stat, []
    monkeypatch.setattr("os.stat", lambda *args, **kwargs: (calls.append(args), looked_at(*args, **kwargs))[1])
    assert len(ImageFolder(folder).labels["train"]) == 160
    assert len(calls) <= 2 * (1 + len(CLASSES))


# --- Archives ---------------------------------------------------------------------------------------------------------


def arrays(gray: bool = False, **changes: np.ndarray) -> dict[str, np.ndarray]:
    """As MedMNIST publishes it: labels in a column."""
    rng = np.random.default_rng(0)
    content = {}
    for part, number in (("train", 12), ("val", 4), ("test", 8)):
        content[f"{part}_images"] = rng.integers(256, size=(number, 5, 5, *[3] * (not gray)), dtype=np.uint8)
        content[f"{part}_labels"] = (np.arange(number) % 4)[:, None].astype(np.uint8)
    return content | changes


@pytest.mark.parametrize("gray", [False, True])
def test_an_archive_gives_its_images(tmp_path, gray):
    content = arrays(gray)
    np.savez_compressed(tmp_path / "a.npz", **content)
    prepared = find_own(tmp_path / "a.npz", None, None)
    assert prepared.classes == ("0", "1", "2", "3")
    for ours, theirs in (("train", "train"), ("validation", "val"), ("test", "test")):
        split, images = prepared.split(ours), content[f"{theirs}_images"]
        assert np.array_equal(split.images, np.repeat(images[..., None], 3, axis=3) if gray else images)
        assert split.labels.tolist() == content[f"{theirs}_labels"][:, 0].tolist()
    assert find_own(tmp_path / "a.npz", None, 10).image_shape == (10, 10, 3)


def test_without_test_images_those_of_val_are_tested_on(tmp_path):
    content = {name: value for name, value in arrays().items() if not name.startswith("test")}
    np.savez(tmp_path / "a.npz", **content)
    assert ImageArchive(tmp_path / "a.npz").labels.keys() == {"train", "test"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": np.zeros((12, 5, 5), np.float32)}, r"'train_images' is \(12, 5, 5\) float32, expected"),
        ({"train_images": np.zeros((12, 5, 5, 4), np.uint8)}, r"'train_images' is \(12, 5, 5, 4\) uint8, expected"),
        (
            {"train_labels": np.zeros((12, 14), np.uint8)},
            "'train_labels' is .*one whole number for each of 12",
        ),
        ({"train_labels": np.zeros(11, np.uint8)}, "'train_labels' is .*one whole number for each of 12"),
        ({"train_labels": np.zeros(12)}, "'train_labels' is .* float64"),
        ({"train_labels": np.arange(12) - 1}, "'train_labels' are -1 to 10"),
        ({"train_labels": np.zeros(12, np.uint8)}, "one class only, 0"),
        ({"train_labels": 2 * np.arange(12)}, "classes without training images: 1, 3, 5 and 8 more"),
        ({"train_labels": np.array([0, 10**9] * 6)}, "classes without training images: 1, 2, 3 and"),
        ({"test_labels": np.arange(8)}, "classes of test that train has not: 4, 5, 6 and 1 more"),
        ({"train_images": np.zeros((0, 5, 5), np.uint8), "train_labels": np.zeros(0)}, "."),
        ({"test_images": np.zeros((8, 6, 6), np.uint8)}, r"different sizes: test_images\[0\] is 6x6, others are 5x5"),
    ],
)
def test_an_archive_that_cannot_be_trained_on_is_refused_in_one_line(tmp_path, changes, message):
    np.savez(tmp_path / "a.npz", **arrays(**changes))
    with pytest.raises(DataFileError, match=f"{tmp_path / 'a.npz'}: .*{message}") as caught:
        find_own(tmp_path / "a.npz", None, None)
    assert "\n" not in str(caught.value)


def test_arrays_that_are_missing_and_damage_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", image=np.zeros((2, 3, 3, 3), np.uint8))
    with pytest.raises(DataFileError, match="no array 'train_images' in it, found image"):
        find_own(tmp_path / "a.npz", None, None)
    images = np.random.default_rng(0).integers(256, size=(12, 50, 50), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=np.arange(12) % 4)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.index(images[-1].tobytes())] ^= 1  # well after the header
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataFileError, match="damaged"):
        find_own(tmp_path / "a.npz", None, None)
    assert [path.name for path in (tmp_path / "a.npz.prepared").iterdir()] == [".lock"]
