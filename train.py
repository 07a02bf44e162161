"""Train a robust classifier: a clean burn-in, then DyART or a baseline, into an experiment folder.

    python train.py --dataset cifar10 --burn-in-epochs 10 --epochs 200

The order of the file is the order of a run: its parts, its stages, one epoch, one step, the end of an epoch. The loss
of a step is in dyart/losses.py, the flags are in experiment/train_flags.py.
"""

import contextlib
import math
import random
import signal
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import Loader
from dyart.averaging import WeightAverage, statistics_momentum
from dyart.graphs import CudaGraphs
from dyart.losses import LOSSES
from dyart.modes import batch_norm_momentum, mixed_precision
from experiment import flags
from experiment.build import (
    Data,
    build_model,
    build_optimizer,
    generated_content,
    load_splits,
    loss_options,
    share_statistics,
    stages_of,
    step_seed,
)
from experiment.folder import Experiment, Loaded
from experiment.guards import anomalies_detected, check_finite, finite_validation, skip_step
from experiment.metrics import Meter, describe, on_host, peak_memory_mib
from experiment.processes import ALONE, Processes, Stopped
from experiment.schedules import SCHEDULES, idle_epochs
from experiment.settings import as_yaml, default_name, resolve
from experiment.signals import Interrupted, Signals
from experiment.state import Progress, Run, begin, begun, check_metrics, resume, rewind
from experiment.tensorboard import Board, check_tensorboard
from experiment.train_flags import PROCESS_TIMEOUT_MINUTES, parse
from experiment.validation import track_dynamics, validate
from experiment.weights import load_pretrained

# --- The run: its folder, model and images ----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, make or reopen the folder, train. The exit status: 0, 1 diverged, 128 + n after signal n."""
    with contextlib.ExitStack() as held:
        processes = held.enter_context(Processes.of_environment())
        given = parse(argv)
        processes.connect(given.pop("process_timeout_minutes", PROCESS_TIMEOUT_MINUTES))
        return new_or_resumed(given, processes, held)


def new_or_resumed(given: dict[str, Any], processes: Processes, held: contextlib.ExitStack) -> int:
    """A run from its flags to its end; its folder is given back by `held`, however it ends. The exit status."""
    dry_run, folder = given.pop("dry_run", False), given.pop("resume", None)
    output_dir, exist = given.get("output_dir", "experiments"), given.get("if_exists", "rename")
    if folder is None:
        settings, loaded = resolve(given), None
        name = (given.get("name") or default_name(settings)) + given.get("name_extra", "")
        if exist == "resume":
            folder = begun(output_dir, name, settings, processes)
    if folder is None:
        check_early(settings, output_dir, processes)
    else:
        with processes.rank_0_first():
            experiment, settings, loaded = resume(folder, given, processes, dry_run=dry_run)
        held.enter_context(experiment)
    if dry_run:
        print(as_yaml(settings), end="")
        return 0
    epochs = stages_of(settings)[-1].end
    if loaded is not None and loaded.state["progress"]["epoch"] == epochs:
        tqdm.write(f"{folder}: nothing left to do, all {epochs} epochs are finished")
        return 0

    # A folder is made, or changed, only when everything that the run needs is there.
    if folder is not None:
        check_metrics(experiment)
    settings["aux_data_content"] = generated_content(settings)
    data = load_splits(settings)
    run = prepare(settings, data, loaded, processes)
    if folder is None:
        exist = {"rename": "rename", "stop": "error", "resume": "adopt"}[exist]
        experiment = held.enter_context(begin(output_dir, name, settings, exist, processes))
    else:
        rewind(experiment, settings, loaded)
    shown = settings if processes.rank == 0 else settings | {"tensorboard": False}
    board = held.enter_context(Board(shown, experiment.folder, data.validation, run.progress.epoch))
    for stage in stages_of(settings):
        if idle := idle_epochs(stage.scheduler, stage.epochs):
            experiment.log(
                f"warning: {idle} of the {stage.epochs} epochs of {stage.name} have less than a hundredth of the "
                f"learning rate, as --scheduler {stage.scheduler} has it; for short runs: --scheduler cyclic"
            )
    try:
        train(run, data, experiment, board, Signals(in_company=processes.connected))
    except Interrupted as stop:
        experiment.log(f"stopped by {signal.Signals(stop.args[0]).name}; go on with --resume {experiment.folder}")
        return 128 + stop.args[0]
    except Stopped as error:
        processes.tell(error)
        experiment.log(f"stopped: {error}")
        return 1
    experiment.log(f"finished: {experiment.folder}")
    return 0


def check_early(settings: dict[str, Any], output_dir: str, processes: Processes) -> None:
    """What can be told to be wrong before data is fetched and a folder made. Raises ValueError or OSError."""
    flags.device(processes.device(settings["device"]), cuda_graphs=settings["cuda_graphs"])
    model = build_model(settings)
    if settings["pretrained"] is not None:
        load_pretrained(model, settings)
    generated_content(settings)
    flags.check_writable(output_dir, "--output-dir")


def prepare(settings: dict[str, Any], data: Data, loaded: Loaded | None, processes: Processes = ALONE) -> Run:
    """The run at its start, or where a checkpoint left it. Raises ValueError or OSError for what cannot be used."""
    device = flags.device(processes.device(settings["device"]), cuda_graphs=settings["cuda_graphs"])
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings["tf32"]
    random.seed(settings["seed"])
    np.random.seed(settings["seed"] % 2**32)  # noqa: NPY002  (whatever uses the global generator)
    torch.manual_seed(settings["seed"])

    model = build_model(settings)
    if settings["pretrained"] is not None and loaded is None:
        load_pretrained(model, settings)
    model = share_statistics(model.to(device), settings, device, processes.size)
    check_tensorboard(settings["tensorboard"])
    if settings["compile"]:
        flags.check_compile(device)
        model.compile()
    stage = 0 if loaded is None else loaded.state["progress"]["stage"]
    run = begin_stage(settings, stage, model, data, Progress(), processes)
    if loaded is not None:
        run.restore(loaded.state, loaded.path)
    if processes.connected:
        processes.check_alike("weights or images", run.checksum())
    return run


# --- Its stages -------------------------------------------------------------------------------------------------------


def begin_stage(
    settings: dict[str, Any], index: int, model: nn.Module, data: Data, progress: Progress, processes: Processes = ALONE
) -> Run:
    """The run at the start of stage number `index`, from the model's weights as they are."""
    stage = stages_of(settings)[index]
    device = next(model.parameters()).device
    mixed_in = {} if stage.name == "burn-in" else data.generated
    options = {"seed": settings["seed"], "augment": settings["augment"], "device": device, **mixed_in}
    loader = Loader(data.train, stage.batch_size, part=processes.part(), **options)
    # The average copies during the first 2.5 % of all steps.
    average = WeightAverage(model, tau=settings["tau"], warmup_steps=round(0.025 * stage.epochs * len(loader)))
    optimizer = build_optimizer(model, stage, settings)
    scheduler = SCHEDULES[stage.scheduler].make(optimizer, stage.lr, stage.epochs, len(loader))
    progress.stage = index
    # To look for anomalies waits for the GPU, which a captured graph cannot.
    graphs = CudaGraphs() if settings["cuda_graphs"] and not settings["detect_anomaly"] else None
    return Run(settings, stage, loader, model, average, optimizer, scheduler, progress, Meter(), graphs, processes)


def train(run: Run, data: Data, experiment: Experiment, board: Board, signals: Signals) -> None:
    """Go through the epochs and stages that are left of a run, writing to `experiment`.

    Raises Interrupted after a checkpoint, Diverged, or ValueError and OSError for files that cannot be written.
    """
    settings, stages = run.settings, stages_of(run.settings)
    while True:
        last_stage = run.progress.stage == len(stages) - 1
        while run.progress.epoch < run.stage.end:
            try:
                train_epoch(run, experiment, signals)
                check_finite(run, experiment)
                with finite_validation(run, experiment):
                    scores = validate(run.average.model, data.validation, settings, signals, run.processes)
                scores |= track_dynamics(run, data.train)
            except Interrupted:
                check_finite(run, experiment)
                experiment.save_latest(run.checkpoint_to_resume())
                run.processes.meet()  # the first to end would end the others before they have saved
                raise
            end_epoch(run, scores, experiment, board, last_stage=last_stage)
        if last_stage:
            return
        # The next stage starts from this one's averaged weights.
        run.model.load_state_dict(run.average.model.state_dict())
        run = begin_stage(settings, run.progress.stage + 1, run.model, data, run.progress, run.processes)


# --- One epoch, one step ----------------------------------------------------------------------------------------------


def train_epoch(run: Run, experiment: Experiment, signals: Signals) -> None:
    """Take the steps of an epoch that are still to be taken. Raises Interrupted between two of them, and Diverged."""
    stage, loader, progress, meter = run.stage, run.loader, run.progress, run.meter
    if loader.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(loader.device)
    started = time.monotonic() - meter.state["seconds"]
    saved = time.monotonic()
    bar = tqdm(
        loader.epoch(progress.epoch, progress.step),
        desc=f"{stage.name} {progress.epoch + 1}/{stage.end}",
        initial=progress.step,
        total=len(loader),
        leave=False,
    )
    with bar:
        for x, y in bar:
            train_step(run, x, y, experiment, signals)
            bar.set_postfix(meter.summary(run.settings["norm"]), refresh=False)
            meter.state["seconds"] = time.monotonic() - started
            signals.check()
            if time.monotonic() - saved > 60 * (run.settings["checkpoint_minutes"] or math.inf):
                check_finite(run, experiment)
                experiment.save_latest(run.checkpoint_to_resume())
                saved = time.monotonic()


def train_step(run: Run, x: Tensor, y: Tensor, experiment: Experiment, signals: Signals) -> None:
    """One step on a batch: x (n, 3, h, w) with pixels in [0, 1], y (n,). Raises Diverged.

    Each of several processes has its rows of the batch; from the sum of their gradients on, all do the same.
    """
    settings, stage, progress, device = run.settings, run.stage, run.progress, run.loader.device
    images = run.loader.batch_rows(progress.step)
    options = loss_options(settings, stage.method)
    seed = step_seed(settings, stage.epochs_before, progress.total_steps)
    run.processes.reseed(seed)
    if stage.method != "clean":
        options["generator"] = run.processes.noise(torch.Generator(device).manual_seed(seed), images)
    if stage.method == "dyart":
        options["graphs"] = run.graphs
    if settings["channels_last"]:
        x = x.contiguous(memory_format=torch.channels_last)
    no_step_taken = progress.total_steps == progress.bad_steps

    def momentum_of(usual: float) -> float:
        # The first step that a run takes has the statistics of its batch as they are.
        if no_step_taken or settings["rules"] < 2:  # 1: folders from before short runs had their own
            return 1.0 if no_step_taken else usual
        # Of a run that may be made longer, nothing depends on how long it is.
        extendable = SCHEDULES[stage.scheduler].extendable and stage.name != "burn-in"
        return statistics_momentum(usual, progress.total_steps + 1 if extendable else stage.epochs * len(run.loader))

    buffers_before = [buffer.clone() for buffer in run.model.buffers()]

    run.optimizer.zero_grad()
    with batch_norm_momentum(run.model, momentum_of), anomalies_detected(run):
        with mixed_precision(settings["amp"], device.type):
            loss, metrics = LOSSES[stage.method](run.model, x, y, **options)
        loss.backward()
    loss, metrics = run.processes.add_up(run.model, buffers_before, loss, metrics, images, signals)
    grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), stage.clip_grad or math.inf)
    grad_norm, loss, *values = on_host([grad_norm, loss, *metrics.values()])
    progress.step += 1
    progress.total_steps += 1
    if grad_norm.isfinite() and loss.isfinite():
        run.optimizer.step()
        run.average.update(run.model, (progress.epoch - stage.epochs_before) * len(run.loader) + progress.step)
        run.meter.add(dict(zip(metrics, values, strict=True)), grad_norm.item(), images)
        progress.bad_in_a_row = 0
    else:
        skip_step(run, buffers_before, loss.item(), grad_norm.item(), experiment)
    if SCHEDULES[stage.scheduler].every_step:
        run.advance_schedule()


# --- The end of an epoch ----------------------------------------------------------------------------------------------


def end_epoch(run: Run, scores: dict[str, float], experiment: Experiment, board: Board, *, last_stage: bool) -> None:
    """Write down a finished epoch: metrics.csv and the log, best.pt and its like, and at last latest.pt."""
    stage, progress, meter = run.stage, run.progress, run.meter
    progress.epoch += 1
    progress.step = 0
    row = {"epoch": progress.epoch, "stage": stage.name, "lr": run.optimizer.param_groups[0]["lr"]}
    row |= {**meter.means(), **meter.margin_quantiles(), **scores, "bad_steps": progress.bad_steps}
    row["seconds"] = round(meter.state["seconds"], 2)
    row["peak_memory_mib"] = round(peak_memory_mib(next(run.model.parameters()).device), 1)
    if not SCHEDULES[stage.scheduler].every_step:
        run.advance_schedule()
    run.meter = Meter()
    experiment.append_metrics(row)
    board.add_epoch(row, meter.state["margins"], run)
    experiment.log(describe(row, run.settings["norm"]))
    weights = run.checkpoint_to_evaluate(scores)
    score = [scores["val_robust"], scores["val_clean"]]
    if last_stage and score >= progress.best:  # [] at first; of equal ones the latest
        progress.best = score
        experiment.save_best(weights)
    if not last_stage and progress.epoch == stage.end:
        experiment.save_named("burn_in", weights)
    every = run.settings["save_every"]
    if every and progress.epoch % every == 0:
        experiment.save_named(f"epoch_{progress.epoch:04d}", weights)
    experiment.save_latest(run.checkpoint_to_resume())


if __name__ == "__main__":
    flags.run(main)
