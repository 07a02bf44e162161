"""Steps whose loss, gradient or weights are no numbers: left out, counted, at last a reason to stop. For train.py."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from experiment.folder import Experiment
from experiment.processes import Stopped
from experiment.state import Run
from models.outputs import finite_outputs

# A run stops at this many steps in a row whose loss or gradient is not finite.
MAX_BAD_STEPS = 10


class Diverged(Stopped):
    """Too many steps in a row with a loss or gradient that is not finite."""


def skip_step(run: Run, buffers: list[Tensor], loss: float, grad_norm: float, experiment: Experiment) -> None:
    """Leave out a step whose loss or gradient is not finite, and put back the model's `buffers` from before it.

    Raises Diverged after too many in a row.
    """
    with torch.no_grad():
        for buffer, before in zip(run.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    progress = run.progress
    progress.bad_steps += 1
    progress.bad_in_a_row += 1
    rate = run.optimizer.param_groups[0]["lr"]
    where = f"epoch {progress.epoch + 1}, batch {progress.step}, lr {rate:.4g}"
    experiment.log(f"skipped a step: loss {loss:.4g}, gradient norm {grad_norm:.4g} ({where})")
    if progress.bad_in_a_row >= MAX_BAD_STEPS:
        problem = f"loss or gradient not finite in {MAX_BAD_STEPS} steps in a row, up to {where}"
        raise Diverged(f"{problem}; {last_good(experiment)}")


def check_finite(run: Run, experiment: Experiment) -> None:
    """Raise Diverged where a weight is no number, so that no such checkpoint replaces a good one."""
    weights = {**run.model.state_dict(), **run.average.model.state_dict()}
    bad = [name for name, value in weights.items() if not value.isfinite().all()]
    if bad:
        where = f"epoch {run.progress.epoch + 1}, batch {run.progress.step}"
        raise Diverged(f"{bad[0]} is not finite ({where}); {last_good(experiment)}")


@contextmanager
def finite_validation(run: Run, experiment: Experiment) -> Iterator[None]:
    """Raise Diverged where the averaged model has outputs that are not finite, of which no accuracy can be told."""
    where = f"validation of epoch {run.progress.epoch + 1}"
    try:
        with finite_outputs(run.average.model, where):
            yield
    except ValueError as error:
        raise Diverged(f"{error}; {last_good(experiment)}") from None


@contextmanager
def anomalies_detected(run: Run) -> Iterator[None]:
    """With --detect-anomaly, let PyTorch print which operation's gradient became NaN, and raise Diverged there."""
    enabled = run.settings["detect_anomaly"]
    with torch.autograd.set_detect_anomaly(enabled):
        try:
            yield
        except RuntimeError as error:
            if not enabled or "returned nan values" not in str(error):
                raise
            where = f"epoch {run.progress.epoch + 1}, batch {run.progress.step + 1}"
            raise Diverged(f"{error} (--detect-anomaly, {where}; the traceback above shows its forward pass)") from None


def last_good(experiment: Experiment) -> str:
    """Where to go back to, for messages."""
    latest = experiment.folder / "latest.pt"
    return f"the last good checkpoint is {latest}" if latest.exists() else "there is no good checkpoint yet"
