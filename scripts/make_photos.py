"""Make a folder of 400 photographs in 5 folders of classes out of Tiny-ImageNet, for those who have none at hand.

python scripts/make_photos.py ZIP FOLDER

ZIP is the official tiny-imagenet-200.zip or a part of it. FOLDER/train/CLASS gets 64 pictures of each class, and
FOLDER/test/CLASS 16: of four of Tiny-ImageNet's classes the first 16 and the next 4 of their training pictures.
"""

import shutil
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiment import flags
from storage.files import FileError, naming, one_line, temporary_name

# WordNet's names of what a class is made of.
CLASSES = {
    "dogs": ("n02085620", "n02094433", "n02099601", "n02106662"),  # Chihuahua, Yorkshire terrier, retriever, shepherd
    "fruit": ("n07747607", "n07749582", "n07753592", "n07768694"),  # orange, lemon, banana, pomegranate
    "insects": ("n02165456", "n02206856", "n02268443", "n02279972"),  # ladybug, bee, dragonfly, monarch
    "landscapes": ("n09193705", "n09246464", "n09332890", "n09428293"),  # alp, cliff, lakeside, seashore
    "vehicles": ("n02814533", "n03100240", "n04146614", "n04285008"),  # beach wagon, convertible, bus, sports car
}
TRAIN, EACH = 16, 20


def main(argv: list[str] | None = None) -> int:
    """Make the folder. Raises FileError where it is there already, or the archive lacks one of the pictures."""
    parser = flags.Parser(prog="make_photos.py", description=__doc__.splitlines()[0])
    parser.add_argument("zip", metavar="ZIP", type=Path, help="tiny-imagenet-200.zip, or a part of it")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="is made, with train/CLASS and test/CLASS")
    args = parser.parse_args(argv)
    if args.folder.exists():
        raise FileError(f"{args.folder} is there already: name another, or remove it")
    with naming("write", args.folder):
        args.folder.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary_name(args.folder)
    try:
        _extract(args.zip, partial)
        partial.rename(args.folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    counts = ", ".join(f"{EACH * len(wnids)} of {name}" for name, wnids in CLASSES.items())
    print(f"{args.folder}: {counts}")
    return 0


def _extract(path: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            for name, wnids in CLASSES.items():
                for part, numbers in (("train", range(TRAIN)), ("test", range(TRAIN, EACH))):
                    (folder / part / name).mkdir(parents=True)
                    for picture in (f"{wnid}_{number}.JPEG" for wnid in wnids for number in numbers):
                        content = archive.read(f"tiny-imagenet-200/train/{picture.partition('_')[0]}/images/{picture}")
                        (folder / part / name / picture).write_bytes(content)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FileError(f"{path}: not the archive of Tiny-ImageNet-200 ({one_line(error)})") from error


if __name__ == "__main__":
    flags.run(main)
