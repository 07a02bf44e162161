"""A checkpoint on disk: written with a checksum, read without executing anything.

For whatever saves or reads the state of a model or a run; which checkpoint a folder has is in folder.py.
"""

import contextlib
import hashlib
import json
import os
import re
import struct
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save

from storage.files import FileError, describe_content, is_safetensors, naming, one_line, open_regular, replacing

CHECKPOINT_FORMAT = 1
# Where the header of a .safetensors file of ours has what a checkpoint says beside its weights.
_OURS = "dyart"


class NewerFormatError(FileError):
    """A checkpoint was written by a later version of this program: intact, but not ours to read or to replace."""


_SCALARS = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)


def digest(value: Any) -> str:
    """SHA-256 over the types, shapes and bytes of nested dicts, lists, tuples, dense tensors and plain values.

    Raises TypeError for anything else, which keeps out what `weights_only` would refuse to load.
    """
    seen: dict[int, bytes] = {}  # A crafted file may hold one list a million times, or inside itself.

    def walk(value: Any, where: str) -> bytes:
        if type(value) in _SCALARS:
            return hashlib.sha256(f"{type(value).__name__} {value!a}".encode()).digest()
        if id(value) in seen:
            if not seen[id(value)]:
                raise TypeError(f"{where} contains itself")
            return seen[id(value)]
        seen[id(value)] = b""
        if type(value) in (torch.Tensor, torch.nn.Parameter):
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise TypeError(f"{where} is not a dense tensor")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise TypeError(f"{where} {tuple(value.shape)} is larger than its storage (an expanded tensor)")
            content = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
            content.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif type(value) in (dict, OrderedDict, Counter):
            content = hashlib.sha256(b"dict")
            for key, item in value.items():
                content.update(walk(key, f"a key of {where}") + walk(item, f"{where}[{key!r}]"))
        elif type(value) in (list, tuple, torch.Size):
            content = hashlib.sha256(b"list" if type(value) is list else b"tuple")
            for index, item in enumerate(value):
                content.update(walk(item, f"{where}[{index}]"))
        else:
            raise TypeError(f"{where} is a {type(value).__qualname__}, neither a tensor nor a plain value")
        seen[id(value)] = content.digest()
        return seen[id(value)]

    return walk(value, "state").hex()


def save_checkpoint(
    path: str | Path, state: dict[str, Any], *, before_rename: Callable[[], None] | None = None
) -> None:
    """Write `state` with the format's version and a checksum; on failure the file that was there stays as it is.

    `state` holds tensors (on any device), None, bool, int, float, str, bytes, and dicts, lists and tuples of those.
    `before_rename` is called when the new file is complete and not yet in place. Raises TypeError for other content,
    FileError where the file cannot be written.
    """
    content = {**state, "format": CHECKPOINT_FORMAT}
    content["sha256"] = digest({key: value for key, value in content.items() if key != "sha256"})

    write_torch(path, content, before_rename)


def safetensors_bytes(
    weights: dict[str, torch.Tensor], metadata: dict[str, str], key: str = "", beside: Mapping[str, Any] | None = None
) -> bytes:
    """A .safetensors file of weights, which may share memory, with what is to be said of them in its header.

    metadata: for whoever reads the header. beside: what a checkpoint of ours holds beside its weights, as plain values
    that JSON has; then `load_checkpoint` reads the file as such a checkpoint, with the weights under `key`.
    """
    weights = {name: weights[name].detach().clone().contiguous() for name in sorted(weights)}
    if beside is not None:
        said = {**beside, "format": CHECKPOINT_FORMAT}
        said["sha256"] = digest({**said, key: weights})
        metadata = {**metadata, _OURS: json.dumps([key, said])}
    return save(weights, {"format": "pt", **metadata})


def write_torch(path: str | Path, content: Any, before_rename: Callable[[], None] | None = None) -> None:
    """Write plain content by torch.save, all of it or nothing. Raises FileError."""
    with naming("write", Path(path)), replacing(path, before_rename) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch hides the system's error behind its own.
            hidden = error.__context__
            raise hidden if isinstance(hidden, OSError) else OSError(one_line(error, 200)) from None


def load_checkpoint(path: str | Path, *, foreign: bool = False) -> dict[str, Any]:
    """The state of a checkpoint on the CPU, with its version under "format" if it is ours; no code in it is ever run.

    With `foreign`, also files that this program did not write: safetensors, bare state dicts and the released code's
    checkpoints, in either of torch's file formats; numpy's numbers in them come back as Python's. A checksum is
    verified where there is one. Raises FileError (NewerFormatError for a later version's checkpoint), which says what a
    file is that is none; the file is left alone.
    """
    path = Path(path)
    with naming("read", path), open_regular(path) as file:
        try:
            state = _read_safetensors(path) if foreign and is_safetensors(path) else _read_torch(file, foreign)
            _verify(state, foreign)
        except NewerFormatError as error:
            raise NewerFormatError(f"{path}: {error}") from None
        except OSError:
            raise
        # Of damaged bytes and hostile pickles the readers make errors of any type.
        except Exception as error:
            reason = str(error) if isinstance(error, FileError) else _reason(error)
            is_refused = reason.startswith("refused")
            what = None if is_refused else describe_content(path)
            reason += f"; {CONVERT}" if is_refused and _holds_a_model(path) else ""
            raise FileError(f"{path}: " + (f"not a checkpoint but {what}" if what else reason)) from error
    return state


def _read_safetensors(path: Path) -> Any:
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in sorted(file.keys())}
        said = (file.metadata() or {}).get(_OURS)
    if said is None:
        return weights
    key, said = json.loads(said)
    return {**said, key: weights}


def _read_torch(file: BinaryIO, foreign: bool) -> Any:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            # torch stores its records as they are; others could expand to more than the memory holds.
            if sum(member.file_size for member in archive.infolist()) > os.fstat(file.fileno()).st_size:
                raise FileError("not written by torch.save (its records are compressed or overlap)")
            # torch does not look at the CRCs, which are all that protects a foreign file.
            damaged = archive.testzip()
            if damaged is not None:
                raise FileError(f"damaged (record {damaged!r})")
    elif not foreign:
        raise FileError("not a checkpoint, or a truncated one")
    file.seek(0)
    with torch.serialization.safe_globals(_NUMPY_STAND_INS if foreign else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of old formats and odd pickles; what matters is an error, or in the content.
        return torch.load(file, map_location="cpu", weights_only=True)


def _verify(state: Any, foreign: bool) -> None:
    if not isinstance(state, dict):
        raise FileError(f"not a checkpoint (it holds a {type(state).__name__})")
    version = state.get("format")
    ours = type(version) is int and "sha256" in state
    if not ours and not foreign:
        raise FileError("not a checkpoint of this program (no format and checksum in it)")
    if ours and version > CHECKPOINT_FORMAT:
        raise NewerFormatError(f"format {version}, of a later version; this one reads up to {CHECKPOINT_FORMAT}")
    if not ours:
        state.pop("format", None)  # Whatever another program means by it: with us it tells our own files.
    checksum = state.pop("sha256") if ours else None
    if digest(state) != checksum and ours:  # Of foreign files, the digest only checks what they hold.
        raise FileError("damaged (its checksum does not match its content)")


def _reason(error: Exception) -> str:
    """torch's page of advice, some of it dangerous, as half a line."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found is not None:
        return f"refused: it names {found[1]}, and only tensors and plain values are loaded"
    if "TorchScript" in str(error):
        return "refused: it is a TorchScript archive, and only tensors and plain values are loaded"
    reason = one_line(str(error).rpartition("WeightsUnpickler error: ")[2] or type(error).__name__, 200)
    return f"not a checkpoint, or a damaged one ({reason})"


# Of a whole pickled model, whose class has to be there, and which only its owner can know to be harmless.
CONVERT = (
    "it is a whole model: who made it, or trusts who did, saves the weights alone, where the model's code is at hand: "
    "torch.save(torch.load(FILE, weights_only=False).state_dict(), 'weights.pt') (of TorchScript: torch.jit.load(FILE))"
)


def _holds_a_model(path: Path) -> bool:
    """Whether a file that was refused holds a pickled nn.Module, by the names of what every module has."""
    with contextlib.suppress(Exception), open(path, "rb") as file:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                start = archive.open(f"{archive.namelist()[0].split('/')[0]}/data.pkl").read(1 << 20)
        else:
            file.seek(0)
            start = file.read(1 << 20)
        return b"_parameters" in start and b"_modules" in start or b"__torch__" in start
    return False  # Of what cannot be looked at nothing is said.


class _NumpyDtype:
    """Stands for numpy.dtype while a foreign checkpoint is read: numpy's own trusts what a pickle tells it."""

    def __init__(self, code: str, *_: Any) -> None:
        formats = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}
        self.format = (formats | {"f2": "e", "f4": "f", "f8": "d"})[code]
        self.order = "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1].replace("|", "=")


def _numpy_scalar(dtype: _NumpyDtype, data: bytes) -> bool | int | float:
    return struct.unpack(dtype.order + dtype.format, data)[0]


_NUMPY_STAND_INS = [
    (_NumpyDtype, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
]
