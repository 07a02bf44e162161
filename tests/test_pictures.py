"""Single pictures of every kind that people have, against what was drawn, and against torchvision."""

import os

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize

from data.pictures import read_picture, without_warnings

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def pixels(path, size=None) -> np.ndarray:
    return read_picture(path, size).pixels


def noise(height: int = 6, width: int = 9, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".ppm", ".tif", ".webp"])
def test_colours_are_read_as_they_were_written(tmp_path, suffix):
    content, path = noise(), tmp_path / f"a{suffix}"
    Image.fromarray(content).save(path, **({"lossless": True} if suffix == ".webp" else {}))
    assert np.array_equal(pixels(path), content)
    assert read_picture(path, 4).size == (6, 9) and pixels(path, 4).shape == (4, 4, 3)


def test_gray_pictures_have_three_equal_channels(tmp_path):
    content = noise(channels=1)[..., 0]
    Image.fromarray(content).save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), np.stack([content] * 3, axis=2))


def test_a_palette_gives_its_colours(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putdata([1, 0])
    image.save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").tolist() == [[[*GREEN], [*RED]]]


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette"])
def test_what_is_transparent_is_laid_on_white(tmp_path, kind):
    if kind == "palette":
        image = Image.new("P", (2, 1))
        image.putpalette([*RED, *GREEN])
        image.putdata([1, 0])
        image.save(tmp_path / "a.png", transparency=0)
        expected = [[[*GREEN], [*WHITE]]]
    elif kind == "LA":
        Image.fromarray(np.array([[[100, 255], [100, 0]]], np.uint8), "LA").save(tmp_path / "a.png")
        expected = [[[100] * 3, [*WHITE]]]
    else:
        Image.fromarray(np.array([[[*RED, 255], [*RED, 0], [0, 0, 0, 51]]], np.uint8)).save(tmp_path / "a.png")
        expected = [[[*RED], [*WHITE], [204] * 3]]  # a fifth of black on white
    assert pixels(tmp_path / "a.png").tolist() == expected


def test_cmyk_has_its_colours(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    assert pixels(tmp_path / "a.tif").reshape(-1, 3).tolist() == [[*RED]] * 64
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    assert np.abs(pixels(tmp_path / "a.jpg").astype(int) - RED).max() < 8


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_are_scaled_and_not_cut_off(tmp_path, suffix):
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a{suffix}")
    assert pixels(tmp_path / f"a{suffix}")[0, :, 0].tolist() == [0, 1, 1, 128, 255]  # 255 v / 65535, rounded


def test_32_bits_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="32-bit pixels"):
        read_picture(tmp_path / "a.tif", None)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_rotation_in_exif_is_followed(tmp_path, orientation):
    seen = noise(4, 6)
    # How a camera stores what it saw, by the EXIF standard: the row and column 0 of what is stored are these sides.
    stored = {
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.swapaxes(0, 1),
        6: np.rot90(seen),
        7: seen[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(seen, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "a.png"), seen)
    assert read_picture(tmp_path / "a.png", 4).size == (4, 6)


def test_of_an_animation_the_first_picture_is_taken(tmp_path):
    frames = [Image.new("RGB", (3, 3), colour) for colour in (GREEN, RED)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixels(tmp_path / "a.gif").reshape(-1, 3).tolist() == [[*GREEN]] * 9


@pytest.mark.parametrize(("height", "width"), [(30, 41), (41, 30), (16, 16), (7, 16), (16, 33), (5, 9)])
def test_pictures_are_resized_and_cropped_as_by_torchvision(tmp_path, height, width):
    content = noise(height, width)
    Image.fromarray(content).save(tmp_path / "a.png")
    expected = Compose([Resize(16), CenterCrop(16)])(Image.fromarray(content))
    assert np.array_equal(pixels(tmp_path / "a.png", 16), np.asarray(expected))


def cut_short(path) -> None:
    Image.fromarray(noise(64, 64)).save(path)
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".bmp", ".webp", ".tif"])
def test_what_is_cut_short_is_refused(tmp_path, suffix):
    cut_short(tmp_path / f"a{suffix}")
    with pytest.raises(ValueError), without_warnings():
        read_picture(tmp_path / f"a{suffix}", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "HEIC"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),  # Pillow would start Ghostscript
    ],
)
def test_what_is_no_picture_is_told_for_what_it_is(tmp_path, content, message):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_picture(tmp_path / "a.jpg", None)


def test_damaged_exif_costs_the_rotation_only(tmp_path):
    content = noise(4, 6)
    Image.fromarray(content).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0" + bytes([255] * 30))
    with without_warnings():
        assert np.array_equal(pixels(tmp_path / "a.png"), content)
