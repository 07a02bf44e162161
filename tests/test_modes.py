"""Which passes through the network autocast reaches; what `frozen` does to a model is in test_attacks.py."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from dyart.losses import LOSSES
from dyart.modes import PRECISIONS, frozen, mixed_precision

HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize("amp", PRECISIONS)
@pytest.mark.parametrize("method", ["dyart", "at", "trades", "mart", "n-fgsm", "fgsm-rs"])
def test_searches_and_training_have_the_precision_that_is_asked_for(method, amp):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten(), nn.Linear(32, 4))
    model[4].weight.data *= 30
    x = torch.rand(16, 3, 4, 4)
    y = model.eval()(x).argmax(1)
    seen = set()

    def note(module, _, logits):
        seen.add(("training" if module[0].weight.requires_grad else "search", logits.dtype))

    hook = model.register_forward_hook(note)
    with mixed_precision(amp, "cpu"):
        loss, _ = LOSSES[method](model, x, y)
    hook.remove()
    expected = {"none": (FULL, FULL), "searches": (HALF, FULL), "bf16": (HALF, HALF)}[amp]
    assert seen == set(zip(("search", "training"), expected, strict=True))
    loss.backward()
    assert all(parameter.grad.dtype == FULL for parameter in model.parameters())


def test_it_ends_with_its_context_and_holds_for_its_thread():
    model, x = nn.Linear(3, 2), torch.rand(1, 3)

    def precision() -> torch.dtype:
        with frozen(model):
            return model(x).dtype

    with pytest.raises(RuntimeError, match="inside"), mixed_precision("searches", "cpu"):
        assert precision() == HALF
        with ThreadPoolExecutor(1) as other:
            assert other.submit(precision).result() == FULL
        with mixed_precision("none", "cpu"):
            assert precision() == FULL
        raise RuntimeError("inside")
    assert precision() == FULL


def test_an_unknown_precision_is_named():
    message = "unknown precision 'fp16': choose from none, searches, bf16"
    with pytest.raises(ValueError, match=message), mixed_precision("fp16", "cpu"):
        pass
