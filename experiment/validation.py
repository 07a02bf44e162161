"""What is measured at the end of an epoch, of which each process of a run has its share. For train.py."""

from typing import Any

import torch
from torch import Tensor, nn

from data import Split, to_input
from dyart.attacks import pgd
from dyart.dynamics import negative_speeds, update_direction
from experiment.build import loss_options, sample, step_seed
from experiment.processes import ALONE, Processes
from experiment.signals import Signals
from experiment.state import Run


def validate(
    model: nn.Module, split: Split, settings: dict[str, Any], signals: Signals, processes: Processes = ALONE
) -> dict[str, float]:
    """Clean accuracy, and robust accuracy under PGD on the CW loss, of the averaged model on held-out images.

    Raises Interrupted between two batches.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(step_seed(settings, 0))
    attack = {"norm": settings["norm"], "eps": settings["attack_eps"], "step_size": settings["attack_step"]}
    attack |= {"steps": settings["validation_attack_iter"], "objective": "cw"}
    clean = robust = 0
    for images in torch.arange(len(split.labels)).split(settings["validation_batch_size"]):
        signals.check()
        x, y = _batch(split, images[processes.rows(len(images))], device)
        correct = images[processes.whole(_is_correct(model, x, y), len(images), signals).cpu()]
        clean += len(correct)
        # What one of the processes has found right another may attack, so that all have as many.
        x, y = _batch(split, correct[processes.rows(len(correct))], device)
        x_adv = pgd(model, x, y, generator=processes.noise(generator, len(correct)), **attack)
        robust += processes.whole(_is_correct(model, x_adv, y), len(correct), signals).sum().item()
    return {"val_clean": clean / len(split.labels), "val_robust": robust / len(split.labels)}


def _batch(split: Split, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    return to_input(split.images[rows]).to(device), split.labels[rows].to(device)


@torch.no_grad()
def _is_correct(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x).argmax(1) == y if len(y) else torch.zeros_like(y, dtype=torch.bool)


def track_dynamics(run: Run, split: Split) -> dict[str, float | None]:
    """The share of negative speeds below --attack-eps, in the epochs that --track-dynamics asks for.

    Of the boundary of the trained model as it is, along minus the gradient of the stage's loss on a fixed batch of
    training images as they are.
    """
    every, method, processes = run.settings["track_dynamics"], run.stage.method, run.processes
    if not every or (run.progress.epoch + 1) % every:
        return {}
    below = run.settings["attack_eps"] if run.settings["rules"] >= 2 else 8 / 255
    device, batch = run.loader.device, sample(split, run.stage.batch_size, run.settings)
    n, options = len(batch.labels), loss_options(run.settings, method)
    if method != "clean":
        options["generator"] = processes.noise(torch.Generator(device).manual_seed(0), n)
    x, y = _batch(batch, torch.arange(n)[processes.rows(n)], device)
    direction = update_direction(method, run.model, [(x, y)], **options)
    processes.mean_(list(direction.values()), n)
    negative = negative_speeds(run.model, x, y, direction, below=below, norm=run.settings["norm"])
    negative = processes.whole(negative, n)
    known = negative[~negative.isnan()].double()
    return {"negative_speeds": known.mean().item() if len(known) else None}
