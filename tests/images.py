"""What the tests of own images share: small folders of pictures whose colour tells their class."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("blue", "green", "red", "white")
COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (200, 50, 40), "white": (230, 230, 220)}


def picture(colour: tuple[int, int, int], seed: int, width: int = 8, height: int = 8) -> Image.Image:
    """A picture of a colour with noise."""
    noise = np.random.default_rng(seed).integers(-40, 41, size=(height, width, 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


def fill(folder: Path, classes: tuple[str, ...] = CLASSES, each: int = 6, seed: int = 0, **size: int) -> Path:
    """PNGs 0.png, 1.png, ... of each class in folder/CLASS."""
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            image = picture(COLOURS.get(name.lower(), (90, 90, 90)), 1000 * seed + 100 * index + number, **size)
            image.save(folder / name / f"{number}.png")
    return folder


def photos(root: Path, name: str = "photos", test: str | None = "test", **kind: int) -> Path:
    """A folder of train/CLASS/*.png and, unless test is None, test/CLASS/*.png."""
    fill(root / name / "train", **kind)
    if test is not None:
        fill(root / name / test, each=3, seed=1, **{k: v for k, v in kind.items() if k != "each"})
    return root / name
