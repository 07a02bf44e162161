"""CUDA graphs: work on a GPU that is captured once and then launched as a whole, without Python in between."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

# Runs before a capture, in which cuDNN chooses its algorithms and lazy initialization happens (PyTorch's CUDA notes).
WARM_UP_RUNS = 3


class CudaGraphs:
    """Functions of tensors, each captured at its first call for inputs of a shape and replayed at later calls.

    A graph holds the addresses of whatever it has read. Weights may change in place, as optimizers and load_state_dict
    change them, but not be replaced or moved. Each keeps memory of its own, about what the function takes at its peak,
    which PyTorch counts as reserved and not as allocated.
    """

    def __init__(self) -> None:
        self._captured: dict[Hashable, tuple] = {}

    def __call__(self, function: Callable[..., Sequence[Tensor]], *inputs: Tensor, key: Hashable) -> tuple[Tensor, ...]:
        """function(*inputs), which are tensors on one GPU; the results are the caller's to keep.

        Of functions that are handed over under the same `key`, the first is captured and stands for all. It must
        neither wait for the GPU nor depend in its shapes on what the tensors hold; else PyTorch raises RuntimeError.
        """
        kind = inputs[0].device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        # Where two inputs are one tensor, the function may count on it.
        same = tuple(next(i for i, other in enumerate(inputs) if other is tensor) for tensor in inputs)
        key = key, autocast, same, tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)
        if key not in self._captured:
            held = [tensor.clone() for tensor in inputs]
            held = [held[index] for index in same]
            # The function is kept, so that an id in `key` of what it uses stays that object's alone.
            self._captured[key] = function, held, *capture(function, held)
        _, held, replay, outputs = self._captured[key]
        for tensor, place in zip(inputs, held, strict=True):
            place.copy_(tensor)
        replay()
        return tuple(output.clone() for output in outputs)


def capture(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
) -> tuple[Callable[[], None], Sequence[Tensor]]:
    """Capture function(*inputs): what replays it on the tensors `inputs`, and the tensors it then fills.

    Source: PyTorch's notes on CUDA semantics, "Whole-network capture".
    """
    with torch.cuda.device(inputs[0].device):
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                function(*inputs)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            outputs = function(*inputs)
    return graph.replay, outputs
