"""A checkpoint as what is analysed: its model, how it was trained, its folder's other figures. For analyze.py."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from analysis.statistics import interval_of
from data import find_data_dir
from evaluation.candidate import check_part, load_candidate
from evaluation.results import Results
from experiment import flags
from experiment.build import build_optimizer, stages_of
from experiment.checkpoint import load_checkpoint
from experiment.folder import Experiment, named_checkpoints
from experiment.settings import check_stored, resolve
from experiment.weights import MODEL_SETTINGS, OF_IMAGES
from models.own import is_own


class Subject(NamedTuple):
    """What is analysed: a model in eval mode, how it was or would be trained, and where it comes from."""

    model: nn.Module
    settings: dict[str, Any]
    identity: dict[str, Any]
    folder: Path | None
    optimizer: torch.optim.Optimizer | None
    clip_grad: float | None
    checkpoint: Mapping[str, Any]


def load_subject(args: Any, device: torch.device) -> Subject:
    """The checkpoint that the flags name. Raises ValueError or OSError for one that cannot be used."""
    target = Path(args.target)
    folder = None if target.is_file() else Experiment.open(target).folder
    name = args.checkpoint or ("latest" if args.direction == "step" else "best")
    if args.checkpoint is not None and folder is None:
        raise ValueError(f"--checkpoint {name}: {target} is a checkpoint itself, not an experiment folder")
    if args.direction == "step" and name not in ("latest", "latest.pt"):
        raise ValueError(f"--checkpoint {name}: --direction step is of latest.pt, which holds the optimizer")
    path = target if folder is None else named_checkpoints(folder, [name])[0]
    # The optimizer's state belongs to the weights that are trained, and not to their average.
    weights = "raw" if args.direction == "step" else None
    candidate = load_candidate(path, weights, vars(args))
    check_part(candidate, args.images)

    state = candidate.checkpoint
    if not candidate.settings:
        settings = resolve({name: candidate.identity[name] for name in MODEL_SETTINGS})
    else:
        settings = check_stored(candidate.settings, path) | {name: candidate.identity[name] for name in OF_IMAGES}
    if args.attack_eps is not None:
        eps = flags.length(args.attack_eps, settings["norm"], "--attack-eps").value
        settings = settings | {"attack_eps": eps, "attack_step": eps / 4}
    data_dir = args.data_dir or find_data_dir(settings["dataset"], settings["data_dir"])
    settings = settings | {"data_dir": str(data_dir)}

    # One's own stays in the format that it was trained in: it may not know another.
    layout = torch.preserve_format if is_own(settings["model"]) else torch.channels_last
    model = candidate.model.to(device, memory_format=layout).requires_grad_(True)
    optimizer = clip_grad = None
    if args.direction == "step":
        if "optimizer" not in state:
            raise ValueError(f"--direction step: {path} holds no state of an optimizer; a folder's latest.pt does")
        stage = stages_of(settings)[state["progress"]["stage"]]
        optimizer, clip_grad = build_optimizer(model, stage, settings), stage.clip_grad
        optimizer.load_state_dict(state["optimizer"])
    return Subject(model, settings, candidate.identity, folder, optimizer, clip_grad, state)


def other_checkpoints(folder: Path, analysed: int) -> Iterator[tuple[int, str, dict[str, Tensor]]]:
    """(epoch, name, averaged weights) of the folder's checkpoints, one an epoch, of other epochs than the analysed."""
    epochs = {analysed}
    for path in (folder / "burn_in.pt", folder / "best.pt", *sorted(folder.glob("epoch_*.pt"))):
        if path.exists():
            state = load_checkpoint(path)
            if state["epoch"] not in epochs:
                epochs.add(state["epoch"])
                yield state["epoch"], path.name, state["average"]


def epoch_of(state: Mapping[str, Any]) -> int:
    """The epoch of a checkpoint to evaluate, or of one to resume from."""
    return state["epoch"] if "epoch" in state else state["progress"]["epoch"]


def autoattack_points(
    results: Results | None, identity: Mapping[str, Any], norm: str, part: str = "test"
) -> list[dict[str, float]]:
    """Robust accuracy from a folder's autoattack.json, of the same weights and part under the same norm, by ε."""
    points = []
    for record in [] if results is None else results.current:
        same = all(record[key] == identity[key] for key in ("sha256", "weights"))
        same = same and record.get("model_content") in (None, identity["model_content"])
        if same and record["norm"] == norm and record.get("part", "test") == part:
            share = record["robust_accuracy"]
            low, high = interval_of(round(share * record["n"]), record["n"])
            points.append({"eps": record["eps"], "share": share, "low": low, "high": high, "n": record["n"]})
    return sorted(points, key=lambda point: point["eps"])
