"""How often a training step asks a GPU for values, and so waits for all that it still has to do: counted on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import run_training, tiny
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import train
from data import Loader, load_data
from dyart import projection, search

ASKING = {"item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "masked_select", "equal", "allclose", "unique"}
ASKING |= {"is_nonzero", "repeat_interleave", "bincount"}
ASKING |= {"__bool__", "__int__", "__float__", "__index__", "__contains__", "__format__", "__repr__"}
INDEXING = {"__getitem__", "__setitem__", "index_put_", "index_put"}


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Waits(TorchFunctionMode):
    """Notes the calls that would wait, were the tensors on a GPU: for values, or for how many a mask chooses.

    What `cpu` has fetched, and what is made of it, is free, as is what has no values. Not seen are backward passes, and
    copies from device to device by other calls than `cpu`.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fetched: list[Tensor] = []  # kept alive, so that no other gets their storage

    def is_fetched(self, tensor: Tensor) -> bool:
        storages = {0} | {fetched.untyped_storage().data_ptr() for fetched in self.fetched}
        return tensor.untyped_storage().data_ptr() in storages

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = getattr(func, "__name__", ""), tensors((args, kwargs))
        free = bool(given) and all(map(self.is_fetched, given))
        masked = name in INDEXING and any(index.dtype in (torch.bool, torch.uint8) for index in tensors(args[1]))
        if (name in ASKING or masked or (name == "where" and len(args) == 1)) and not free:
            self.calls.append(name)
        result = func(*args, **(kwargs or {}))
        if name == "cpu":
            result = result.clone()  # on the CPU it is the same tensor, of which more may be asked
        if free or name == "cpu":
            self.fetched += tensors(result)
        return result


@pytest.mark.parametrize(
    ("flags", "waits"),
    [
        ("--method clean", ["cpu"]),
        # Whether the pixels are in the box.
        ("--method at", ["__bool__", "cpu"]),
        ("--method n-fgsm", ["__bool__", "cpu"]),
        # That with what the clean pass gets nearly right, and then what of it is right in eval mode.
        ("--search shared --clip-grad 1", ["tolist", "nonzero", "cpu"]),
        # The check of the pixels, and what is found and passes the filter.
        ("--search fast", ["__bool__", "nonzero", "cpu"]),
    ],
)
def test_a_step_waits_for_what_it_cannot_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, waits: list[str]
) -> None:
    for module in (projection, search):
        monkeypatch.setattr(module, "has_fixed_shapes", lambda x: True)
    train_step, seen = train.train_step, []

    def counted(*args: Any) -> None:
        with Waits() as counter:
            train_step(*args)
        seen.append(counter.calls)

    monkeypatch.setattr(train, "train_step", counted)
    assert run_training(*tiny(tmp_path, *flags.split())) == 0
    assert seen == [waits] * 6


def test_a_batch_comes_without_a_wait() -> None:
    loader = Loader(load_data("digits")[0], 32, seed=0, augment=True, device=torch.device("cpu"))
    with Waits() as counter:
        assert len(list(loader.epoch(0))) == len(loader)
    assert counter.calls == []


def test_waits_are_counted() -> None:
    values = torch.arange(3.0)
    with Waits() as counter:
        values[values > 1]
        if (values >= 0).all():
            float(values.sum())
        fetched = values.cpu()
        assert fetched.exp().tolist() and fetched[0].item() == 0
        values[torch.tensor([0, 1])]
        assert torch.where(values > 1)[0].numel() == f"{values[2]:.0f}".count("2")
    assert counter.calls == ["__getitem__", "__bool__", "__float__", "cpu", "where", "__format__"]
