"""Tiny-ImageNet-200: 100,000 training and 10,000 test images of 64x64, prepared by data/TinyImageNet-200.sh.

Images are read out of the official zip without unpacking it, so no path or link in it can lead anywhere.
"""

import argparse
import io
import logging
import re
import stat
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch
from PIL import Image
from tqdm import tqdm

from data.download import download
from data.files import DataFileError, Split, is_bad_content, other_kind, preparing, read_split, write_split
from storage.files import one_line

logger = logging.getLogger(__name__)

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
FOLDER = "tiny-imagenet-200"  # also the folder that all of the zip lies in
SIZE = 64
NUM_CLASSES = 200
OFFICIAL_COUNTS = (100_000, 10_000)
FILE_LIMIT = 1 << 20  # bytes, for an image and for each text file: the largest real ones have 13 kB and 370 kB

Read = Callable[[str], bytes]


def load_tiny_imagenet(data_dir: str | Path, *, download: bool = True) -> tuple[Split, Split]:
    """Return (train, test): images (N,64,64,3) uint8, classes in the order of their wnids; test is the official val.

    Reads <data_dir>/tiny-imagenet-200/{train,test}.npz. Raises DataFileError, saying which command makes them, if they
    are missing or damaged: `download` is ignored, as the preparation is a command of its own.
    """
    folder = Path(data_dir) / FOLDER
    try:
        return _read_prepared(folder)
    except (FileNotFoundError, DataFileError) as error:
        reason = f"{error.filename} is missing" if isinstance(error, FileNotFoundError) else error
        script = Path(__file__).with_name("TinyImageNet-200.sh")
        raise DataFileError(
            f"Tiny-ImageNet-200: {reason}. Prepare it with: bash {script} --data-dir {data_dir}"
        ) from error


def prepare(data_dir: str | Path, source: str | Path | None = None) -> tuple[Split, Split]:
    """Make and return the prepared files from `source`, a zip or a folder in the official layout.

    Without `source`: nothing is done if the complete dataset is there; else the official zip or its unpacked folder is
    looked for in `data_dir` and `data_dir`/tiny-imagenet-200, and then downloaded. Interrupted at any point, the next
    call ends in the same state. Raises DataFileError or OSError, in one line, for whatever is wrong with the source.
    """
    folder = Path(data_dir) / FOLDER
    if source is not None and not Path(source).exists():
        raise FileNotFoundError(f"{source}: no such file")
    # Before the folder is written to, which may be for reading only; and after whoever was waited for has made them.
    if source is None and (splits := _complete(folder)):
        return splits
    with preparing(folder):
        downloaded = None
        if source is None:
            if splits := _complete(folder):
                return splits
            source = _find_source(Path(data_dir))
            if source is None:
                source = downloaded = _download(folder)
        train, test = _decode(Path(source))
        if (len(train.labels), len(test.labels)) != OFFICIAL_COUNTS:
            if downloaded:
                raise DataFileError(
                    f"{source}: {len(train.labels)} training and {len(test.labels)} val images, not all"
                )
            logger.warning("%s is not the complete dataset: only a part of its images is there", source)
        # An interruption here must not leave a training split beside the test split of another source.
        (folder / "test.npz").unlink(missing_ok=True)
        write_split(folder / "train.npz", train)
        write_split(folder / "test.npz", test)
        if downloaded:
            downloaded.unlink()
    return train, test


def _complete(folder: Path) -> tuple[Split, Split] | None:
    """The prepared splits, if all images of the dataset are there."""
    try:
        splits = _read_prepared(folder)
    except (FileNotFoundError, DataFileError):
        return None
    return splits if tuple(len(split.labels) for split in splits) == OFFICIAL_COUNTS else None


def _read_prepared(folder: Path) -> tuple[Split, Split]:
    train, test = (
        read_split(folder / f"{name}.npz", image_size=SIZE, num_classes=NUM_CLASSES) for name in ("train", "test")
    )
    return train, test


def _find_source(data_dir: Path) -> Path | None:
    for place in (data_dir, data_dir / FOLDER):
        if (place / f"{FOLDER}.zip").exists():
            return place / f"{FOLDER}.zip"
    for place in (data_dir / FOLDER, data_dir / FOLDER / FOLDER):
        if (place / "wnids.txt").exists():
            return place
    return None


def _download(folder: Path) -> Path:
    target = folder / f"{FOLDER}.zip"
    try:
        download(URL, target, _is_intact_zip)
    except OSError as error:
        raise OSError(
            f"Tiny-ImageNet-200: {one_line(error)}. By hand: download {URL} on any machine and run: "
            f"bash {Path(__file__).with_name('TinyImageNet-200.sh')} PATH-TO-THE-ZIP"
        ) from error
    return target


def _is_intact_zip(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # see is_bad_content
        return False


@contextmanager
def _open_source(source: Path) -> Iterator[tuple[list[str], Read]]:
    """Open a zip or a folder: give the names of its files, below tiny-imagenet-200/, and a function that reads one."""
    if source.is_dir():
        names = [path.relative_to(source).as_posix() for path in source.glob("*.txt")]
        for pattern in ("train/*/images/*", "val/images/*", "val/*.txt"):
            names += [path.relative_to(source).as_posix() for path in source.glob(pattern)]

        def read_file(name: str) -> bytes:
            with open(source / name, "rb") as stream:
                return stream.read(FILE_LIMIT + 1)

        yield [name for name in names if not _is_litter(name)], read_file
        return

    with zipfile.ZipFile(source) as archive:
        members = {}
        for info in archive.infolist():
            if _is_litter(info.filename):
                continue
            parts = PurePosixPath(info.filename).parts
            if info.filename.startswith("/") or ".." in parts or "\\" in info.filename:
                raise DataFileError(f"{source}: refused: it holds a path that leaves its folder, {info.filename!r}")
            if stat.S_ISLNK(info.external_attr >> 16):
                raise DataFileError(f"{source}: refused: it holds a link, {info.filename!r}")
            members["/".join(parts[1:] if parts[:1] == (FOLDER,) else parts)] = info

        def read_member(name: str) -> bytes:
            with archive.open(members[name]) as stream:
                return stream.read(FILE_LIMIT + 1)

        yield list(members), read_member


def _is_litter(name: str) -> bool:
    """Whether a file is what macOS leaves beside others."""
    parts = PurePosixPath(name).parts
    return "__MACOSX" in parts or bool(parts) and (parts[-1].startswith("._") or parts[-1] == ".DS_Store")


def _decode(source: Path) -> tuple[Split, Split]:
    """Read both splits out of a zip or a folder."""
    try:
        with _open_source(source) as (names, read):
            wnids, train, test = _layout(set(names), read)
            label_of = {wnid: label for label, wnid in enumerate(wnids)}
            return _decode_split(train, label_of, read, "train"), _decode_split(test, label_of, read, "test")
    except Exception as error:
        if not is_bad_content(error) or str(error).startswith(str(source)):
            raise
        if what := other_kind(source, ".zip"):
            raise DataFileError(f"{source}: not Tiny-ImageNet-200's zip but {what}") from error
        raise DataFileError(f"{source}: damaged or not Tiny-ImageNet-200 ({one_line(error)})") from error


def _layout(names: set[str], read: Read) -> tuple[list[str], list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the sorted wnids, and (file name, wnid) of every training and of every val image."""
    wnids = sorted(_read_text(read, names, "wnids.txt").split())
    train = []
    for name in sorted(names):
        if match := re.fullmatch(r"train/([^/]+)/images/[^/]+\.JPEG", name):
            train.append((name, match[1]))
    if len(wnids) != NUM_CLASSES or set(wnids) != {wnid for _, wnid in train}:
        raise DataFileError(
            f"wnids.txt has {len(wnids)} classes and train/ has images of {len({wnid for _, wnid in train})}, "
            f"expected the same {NUM_CLASSES}"
        )
    test = []
    for number, line in enumerate(_read_text(read, names, "val/val_annotations.txt").splitlines(), 1):
        if not line.strip():
            continue
        file, wnid = (line.split("\t") + [""])[:2]
        name = f"val/images/{file}"
        if name not in names or wnid not in wnids:
            raise DataFileError(f"val/val_annotations.txt, line {number}: no such image or class: {line[:80]!r}")
        test.append((name, wnid))
    annotated = {name for name, _ in test}
    images = {name for name in names if name.startswith("val/images/") and name.endswith(".JPEG")}
    if not test or len(annotated) != len(test) or annotated != images:
        raise DataFileError(
            f"val/val_annotations.txt has {len(test)} lines for {len(annotated)} images, val/images has {len(images)}"
        )
    return wnids, train, test


def _read_text(read: Read, names: set[str], name: str) -> str:
    if name not in names:
        raise DataFileError(f"no {name} in it")
    content = read(name)
    if len(content) > FILE_LIMIT:
        raise DataFileError(f"{name} is larger than {FILE_LIMIT} bytes")
    return content.decode().removeprefix("\ufeff")


def _decode_split(files: list[tuple[str, str]], label_of: dict[str, int], read: Read, what: str) -> Split:
    images = torch.empty((len(files), SIZE, SIZE, 3), dtype=torch.uint8)
    for target, (name, _) in zip(images.numpy(), tqdm(files, desc=f"decoding {what}", unit=" images"), strict=True):
        content = read(name)
        try:
            with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
                if image.size != (SIZE, SIZE) or len(content) > FILE_LIMIT:
                    raise DataFileError(f"{image.size} pixels, {len(content)} bytes, expected {(SIZE, SIZE)}")
                target[:] = image.convert("RGB")  # some are greyscale
        except Exception as error:  # see is_bad_content
            raise DataFileError(f"{name}: {one_line(error)}") from error
    return Split(images, torch.tensor([label_of[wnid] for _, wnid in files]))


def main(arguments: list[str] | None = None) -> int:
    """Prepare the dataset from the command line; return the exit status: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="TinyImageNet-200.sh", description="Download and prepare Tiny-ImageNet-200.")
    parser.add_argument("zip", nargs="?", type=Path, help="the official tiny-imagenet-200.zip, if it is here already")
    parser.add_argument(
        "--data-dir", type=Path, default=Path(__file__).parent, help="where datasets lie (default: data/)"
    )
    args = parser.parse_args(arguments)
    try:
        train, test = prepare(args.data_dir, args.zip)
    except (OSError, ValueError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    print(f"{args.data_dir / FOLDER}: {len(train.labels)} training and {len(test.labels)} test images")
    return 0
