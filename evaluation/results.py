"""The records of AutoAttack, finished and unfinished, as files.

For the evaluation, and for whoever reads its figures.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiment.settings import upgraded
from experiment.weights import MODEL_SETTINGS
from storage.files import FileError, read_json, write_json

IDENTITY = [*MODEL_SETTINGS, "checkpoint", "sha256", "weights", "norm", "eps", "eps_text", "version", "n", "seed"]
IDENTITY += ["batch_size"]  # The attacks draw their random numbers a batch at a time.
IDENTITY += ["weights_key", "images", "test_sha256", "part", "model_content"]
# Of these what lies elsewhere under a name that stays, and may have changed since; in words. None: not known.
ELSEWHERE = {"test_sha256": "other test images", "model_content": "other code of the model"}
# What records of earlier versions lack, with what they were; None where that is not known. What they normalized by is
# known, as it is of settings (`upgraded`).
LATER = {"image_size": None, "dataset_content": None, "part": "test"}
LATER |= {"mean": None, "std": None, "weights_key": None, "images": "first"} | dict.fromkeys(ELSEWHERE)
# The names in a file under which those versions looked for each kind of weights, and no others.
KEYS_BEFORE = {
    "average": {"average", "wa_model", "model_state_dict"},
    "raw": {"model", "unaveraged_model", "unaveraged_model_state_dict"},
    "only": {"", "state_dict"},
}

# What whoever reads a record reckons with: type, least and largest value.
_NUMBERS = {"eps": (int | float, 0, math.inf), "n": (int, 1, math.inf), "test_size": (int, 1, math.inf)}
_NUMBERS |= dict.fromkeys(("clean_accuracy", "robust_accuracy"), (int | float, 0, 1))


def same_identity(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records are of the same evaluation: the same weights, images and attack.

    What a record of an earlier version does not say, and what cannot be known, matches anything that it could be.
    """
    both = [LATER | upgraded(record) for record in (one, other)]
    for name in IDENTITY:
        values = [record[name] for record in both]
        if values[0] == values[1] or (name in ELSEWHERE and None in values):
            continue
        if name == "weights_key" and None in values:
            (known,) = (value for value in values if value is not None)
            if known in KEYS_BEFORE.get(both[0]["weights"], ()):
                continue
        return False
    return True


def _changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What has changed between two records that are of the same evaluation but for what lies elsewhere, in words."""
    if same_identity(one, other) or not same_identity({**one, **dict.fromkeys(ELSEWHERE)}, other):
        return []
    both = {name: {record.get(name) for record in (one, other)} for name in ELSEWHERE}
    return [words for name, words in ELSEWHERE.items() if len(both[name] - {None}) == 2]


def images_of(record: Mapping[str, Any]) -> str:
    """Which test images a record is of, in words."""
    n, total = record["n"], record["test_size"]
    if n == total:
        return f"all {n}"
    balanced = record.get("images") == "balanced"
    return f"{n} class-balanced ones of {total}" if balanced else f"first {n} of {total}"


class Results:
    """autoattack.json and what is unfinished, in a folder or beside a file: PREFIX.json and PREFIX.unfinished.json.

    Both hold a list of records. They are replaced as a whole, so that a crash leaves the old or the new ones. For one
    process at a time.
    """

    def __init__(self, prefix: Path):
        self.path = prefix.with_name(f"{prefix.name}.json")
        self.unfinished_path = prefix.with_name(f"{prefix.name}.unfinished.json")
        self.records = self._read(self.path, ["test_size", "clean_accuracy", "robust_accuracy", "date"])
        unfinished = self._read(self.unfinished_path, ["date"])
        # A crash between the writing of a record and the removal of its progress leaves both.
        self._unfinished = [
            record
            for record in unfinished
            if not any(same_identity(record, other) and record["date"] == other["date"] for other in self.records)
        ]

    @staticmethod
    def _read(path: Path, needed: list[str]) -> list[dict[str, Any]]:
        records = read_json(path) if path.exists() else []
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise FileError(f"{path}: not a list of records")
        for name in [*(name for name in IDENTITY if name not in LATER), *needed]:
            if not all(name in record for record in records):
                raise FileError(f"{path}: a record without {name!r}; move the file away to start a new one")
        for name, (kind, least, most) in _NUMBERS.items():
            values = [record[name] for record in records if name in record]
            if not all(isinstance(value, kind) and least <= value <= most for value in values):
                raise FileError(f"{path}: a record whose {name!r} is no number that it can be; move the file away")
        return records

    @property
    def current(self) -> list[dict[str, Any]]:
        """The finished records but those that a later one replaces: the same on other test images, or by other code.

        The test data was prepared anew between the two, or the file of one's own model edited, and what is there now is
        what counts.
        """
        return [
            record
            for index, record in enumerate(self.records)
            if not any(_changed(later, record) for later in self.records[index + 1 :])
        ]

    def changed(self, identity: dict[str, Any]) -> list[str]:
        """In words, what has changed since a record, finished or not, that is else of `identity`; [] without one."""
        found = (_changed(record, identity) for record in [*self.records, *self._unfinished])
        return next(filter(None, found), [])

    def finished(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The finished record of `identity`, or None."""
        return next((record for record in self.records if same_identity(record, identity)), None)

    def take_up(self, record: dict[str, Any]) -> None:
        """Make a finished record `current` where a later one has replaced it, since what it is of is there again."""
        if record not in self.current:
            records = [*(other for other in self.records if other is not record), record]
            write_json(self.path, records)
            self.records = records

    def unfinished(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The record of `identity` as an interrupted evaluation left it, or None."""
        return next((record for record in self._unfinished if same_identity(record, identity)), None)

    def save(self, record: dict[str, Any]) -> None:
        """Keep an unfinished record."""

        def is_current(other: dict[str, Any]) -> bool:
            same_file = all(other.get(name) == record.get(name) for name in ("checkpoint", "target"))
            replaced = same_file and other["sha256"] != record["sha256"]
            return not replaced and not same_identity(other, record) and not _changed(other, record)

        self._unfinished = [*filter(is_current, self._unfinished), record]
        write_json(self.unfinished_path, self._unfinished)

    def finish(self, record: dict[str, Any]) -> None:
        """Add a finished record, in the place of an earlier one of the same identity."""
        others = [other for other in self.records if not same_identity(other, record)]
        write_json(self.path, [*others, record])
        self.records = [*others, record]
        self._unfinished = [other for other in self._unfinished if not same_identity(other, record)]
        if self._unfinished:
            write_json(self.unfinished_path, self._unfinished)
        else:
            self.unfinished_path.unlink(missing_ok=True)
