"""Models of one's own: `path/to/file.py:function` or `package.module:function`, as a command line names them.

The code that such a name stands for runs when `use_own` is called with it, and that is for command lines: a name that
stands in a file (args.yaml, a checkpoint) is looked up among those that were used, and nothing is run for it.
"""

import copy
import hashlib
import importlib.util
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

FORM = "path/to/file.py:function or package.module:function"


class Own(NamedTuple):
    """A function that makes models, where it was named, and the SHA-256 of the file that it stands in."""

    make: Callable[..., Any]
    where: str
    content: str | None


# What command lines have named so far, by the short name that settings and files keep.
_USED: dict[str, Own] = {}


def is_own(name: str) -> bool:
    """Whether a model's name is one of one's own models."""
    return ":" in name


def short_name(text: str) -> str:
    """The name that settings keep: a file goes without its folder, since it may lie elsewhere on the next machine.

    Runs nothing. Raises ValueError for what names no function in a file or module.
    """
    where, _, function = text.rpartition(":")
    is_file = Path(where).suffix == ".py"
    if not function.isidentifier() or not (is_file or re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", where)):
        raise ValueError(f"model {text!r}: a model of one's own is {FORM}")
    return f"{Path(where).name}:{function}" if is_file else text


def use_own(text: str) -> str:
    """Run the code that `text` names, as a command line does, and return its short name, which `create_model` knows.

    Raises ValueError or FileNotFoundError, in one line, where there is no such code or it fails.
    """
    name = short_name(text)
    where, _, function = text.rpartition(":")
    module = _module_of_file(Path(where)) if where.endswith(".py") else _module_named(where)
    make = getattr(module, function, None)
    if not callable(make):
        own = (n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__ and callable(v))
        raise ValueError(f"--model {text}: {where} has no function {function}; it has {', '.join(own) or 'none'}")
    source = getattr(module, "__file__", None)
    content = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source and os.path.isfile(source) else None
    _USED[name] = Own(make, text, content)
    return name


def used() -> list[str]:
    """What `use_own` was called with, for processes that this one starts."""
    return [own.where for own in _USED.values()]


def content_of_own(name: str) -> str | None:
    """The SHA-256 of the file that one's own model stands in; None for others, and for those that were not used."""
    return _USED[name].content if name in _USED else None


def check_used(name: str, source: str | Path) -> None:
    """Raise ValueError where `name`, which stands in `source`, is code that no command line has named."""
    if is_own(name) and name not in _USED:
        path = f"PATH/{name}" if ".py:" in name else name
        raise ValueError(
            f"{source}: its model is {name}, and code is not run because a file names it: give --model {path}"
        )


def make_own(name: str, num_classes: int) -> nn.Module:
    """The model of a name that `use_own` gave. Raises ValueError where it was not used, or makes no model."""
    check_used(name, f"model {name!r}")
    make, where, _ = _USED[name]
    try:
        model = make(num_classes=num_classes)
    except (Exception, SystemExit) as error:
        raise ValueError(f"--model {where}: with num_classes={num_classes} it raises {_described(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {where}: it returns a {type(model).__name__}, not a torch.nn.Module")
    _check_parameters(model, f"--model {where}: the model")
    return model


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"--model {path}: no such file")
    # Named after its place: a file may be called train.py or models.py, and is imported once.
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"own_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where pickle and copies look for its classes
    _on_path(path.resolve().parent)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"--model {path}: it cannot be imported: {_described(error)}") from error
    return module


def _module_named(name: str) -> ModuleType:
    _on_path(Path.cwd())
    try:
        return pkgutil.resolve_name(name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"--model {name}: it cannot be imported: {_described(error)}") from error


def _on_path(folder: Path) -> None:
    """Let a model import what lies beside it, after all that is found without."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _described(error: BaseException) -> str:
    """An error of somebody else's code in one line, with the place where it came up."""
    frames = traceback.extract_tb(error.__traceback__)
    said = " ".join(str(error).split()) or "nothing more"
    at = "" if isinstance(error, SyntaxError) else f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})"
    return f"{type(error).__name__}: {said}{at}"


# --- What training, attacks and searches need of a model --------------------------------------------------------------


def check_model(
    model: nn.Module, name: str, num_classes: int, size: tuple[int, int], *, channels_last: bool = False
) -> None:
    """Hold one's own model against all that it is used for, on a copy, with a few random images.

    It maps images (n, 3, *size) with pixels in [0, 1] to logits (n, num_classes), one image like many, in train and
    eval mode; in the latter it does the same each time, for each image by itself, and has a gradient in the image. The
    global random generators stay as they are. Raises ValueError, in one line that names what does not fit.
    """
    problem = f"--model {_USED[name].where if name in _USED else name}: the model"
    try:
        trial = copy.deepcopy(model)
    except Exception as error:
        raise ValueError(f"{problem} cannot be copied, as the weight average needs it: {_described(error)}") from error
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.rand(4, 3, *size, generator=torch.Generator().manual_seed(0))
    x = images.contiguous(memory_format=layout)
    with torch.random.fork_rng(devices=[]):
        trial.eval()
        logits = _pass(trial, x, num_classes, problem, "in eval mode")
        _check_eval_mode(trial, x, logits, num_classes, problem)
        _check_gradient(trial, x, logits, problem)
        _pass(trial.train(), x, num_classes, problem, "in train mode")


def _check_parameters(model: nn.Module, problem: str) -> None:
    parameters = dict(model.named_parameters())
    lazy = [name for name, value in parameters.items() if isinstance(value, UninitializedTensorMixin)]
    if lazy:
        raise ValueError(f"{problem} has weights without a shape yet ({lazy[0]}): let it see an image where it is made")
    if not any(value.requires_grad for value in parameters.values()):
        raise ValueError(f"{problem} has no parameters to train")
    for name, value in parameters.items():
        if value.dtype != torch.float32 or value.is_meta:
            kind = "on the meta device" if value.is_meta else str(value.dtype)
            raise ValueError(f"{problem} has a parameter {name} {kind}: expected torch.float32; --amp lowers precision")
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(f"{problem} keeps a {type(value).__name__} as {name} in its state dict, no dense tensor")


def _pass(model: nn.Module, x: Tensor, num_classes: int, problem: str, when: str) -> Tensor:
    """Logits (n, num_classes) of a pass that has been looked at."""
    shape = (*x.shape,)
    try:
        logits = model(x)
    except Exception as error:
        hint = ""
        if not x.is_contiguous() and "view" in str(error):
            hint = "; flatten or reshape in the place of view, or give --channels-last false"
        raise ValueError(f"{problem} fails {when} on images {shape}: {_described(error)}{hint}") from error
    if not isinstance(logits, Tensor):
        of = f" of {len(logits)}" if isinstance(logits, tuple | list | Mapping) else ""
        raise ValueError(f"{problem} returns a {type(logits).__name__}{of} {when}: return the logits alone")
    expected = (len(x), num_classes)
    if logits.shape != expected:
        why = "a squeeze takes away the batch" if len(x) == 1 else "is num_classes used?"
        raise ValueError(f"{problem} returns {(*logits.shape,)} {when} for images {shape}, not {expected}: {why}")
    if not logits.is_floating_point() or not logits.isfinite().all():
        raise ValueError(f"{problem} returns {logits.dtype} values {when} that are no finite numbers")
    if (logits >= 0).all() and torch.allclose(logits.sum(1), torch.ones(len(x)), rtol=0, atol=1e-4):
        raise ValueError(f"{problem} returns probabilities {when} (each row sums to 1): return logits, without softmax")
    return logits


def _check_eval_mode(model: nn.Module, x: Tensor, logits: Tensor, num_classes: int, problem: str) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        again = _pass(model, x, num_classes, problem, "in eval mode")
        if not torch.equal(logits, again):
            off = (logits - again).abs().max().item()
            what = f"differs by {off:.2g} between two passes in eval mode"
            raise ValueError(f"{problem} {what}: dropout that self.training does not turn off?")
        alone = torch.cat([_pass(model, one, num_classes, problem, "in eval mode") for one in x.split(1)])
    if not torch.allclose(logits, alone, rtol=1e-3, atol=1e-3 * logits.abs().max().clamp_min(1e-3).item()):
        what = "gives an image other logits in eval mode where other images are beside it"
        raise ValueError(f"{problem} {what}: BatchNorm that does not keep running statistics?")
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    if changed:
        raise ValueError(f"{problem} changes {changed[0]} in eval mode: BatchNorm that stays in train mode?")


def _check_gradient(model: nn.Module, x: Tensor, logits: Tensor, problem: str) -> None:
    x = x.clone().requires_grad_()
    z = model(x)
    # Of no constant direction: the sum of logits may be 0 by construction.
    weights = torch.linspace(-1, 1, z.shape[1]).expand_as(z)
    try:
        (grad,) = torch.autograd.grad((weights * z).sum(), x, allow_unused=True)
    except RuntimeError as error:
        raise ValueError(f"{problem} has no gradient in the image ({_described(error)}): detach or no_grad?") from error
    if grad is None or not grad.isfinite().all():
        kind = "no gradient" if grad is None else "a gradient that is not finite"
        raise ValueError(f"{problem} has {kind} in the image: detach or no_grad?")
    # A last layer that starts at 0 gives the same logits to all images, and learns.
    if not grad.any() and (logits != logits[:1]).any():
        raise ValueError(f"{problem} has a gradient of 0 in the image, though its logits differ: are pixels rounded?")
