"""Several processes that train one run: what they add up, what they tell each other, which of them speaks and writes.

torchrun starts them. All hold the same weights and take the same steps; of each batch every process has some rows. This
is the only file that knows torch.distributed, and with one process (`ALONE`) nothing of it runs; DYART_DISTRIBUTED=1
lets a single one go through it too, which tries out NCCL on one GPU.

Everything goes through one sum over all processes (`Processes.sum_`). Where that fails, a process has ended or hangs:
the others find out which, and why if it could still tell, and all end. Rank 0 speaks for all; the others are silent.
"""

import contextlib
import json
import os
import random
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data import rows_of
from dyart.noise import RowsOf, Source
from experiment.signals import ASKING, Signals
from storage.files import one_line

# How long the processes that are left look for the one that is not, in seconds.
SEARCH = 3.0
# How long rank 0, who may keep the store, stays for the others to read there what has happened, in seconds.
FAREWELL = 10.0
# The most bytes that a process tells the others in one go.
MESSAGE = 8192


def free_port() -> int:
    """A port of this machine at which processes can find each other, some time after this returns.

    Below 32768, from where Linux gives ports to whoever asks for any: another program would be given one of those in
    between, and those that came for the run would wait for an answer from it. Raises OSError where all are taken.
    """
    tries = random.SystemRandom().sample(range(15000, 32000), 100)
    for port in tries:
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"none of {len(tries)} ports from 15000 to 32000 is free")


class Stopped(Exception):
    """The run cannot go on; the message says why, in a line."""


class Lost(Stopped, ConnectionError):
    """Another process has ended, or has not come in time; the message says which. Before training, an OSError."""


class Processes(contextlib.AbstractContextManager):
    """The processes of a run as one of them sees them: number `rank` of `size`.

    A context manager, for the whole of the run: where a process leaves it with an exception, it tells the others why.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, connects: bool = False) -> None:
        self.rank, self.size = rank, size
        self._connects = connects
        self._store: Any = None
        self._timeout = timedelta(0)
        self._sums = 0  # how many have begun
        self._broken = False
        self._streams = sys.stdout, sys.stderr

    @classmethod
    def of_environment(cls) -> "Processes":
        """Those that torchrun has started, as its environment variables say. Raises ValueError where they make none."""
        try:
            size = int(os.environ.get("WORLD_SIZE", 1))
            rank = int(os.environ["RANK"]) if size > 1 else 0
        except (KeyError, ValueError) as error:
            raise ValueError(f"WORLD_SIZE {os.environ['WORLD_SIZE']} and RANK do not go together ({error!r})") from None
        return cls(rank, size, connects=size > 1 or os.environ.get("DYART_DISTRIBUTED") == "1")

    # --- From beginning to end ----------------------------------------------------------------------------------------

    def __enter__(self) -> "Processes":
        if self.rank:
            self._streams = sys.stdout, sys.stderr
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (until the end)
        return self

    @property
    def connected(self) -> bool:
        """Whether there is something to add up, and others to hear: not for the one process of a run."""
        return self._store is not None

    def connect(self, timeout_minutes: float) -> None:
        """Find the others. timeout_minutes: how long to wait for one, here and at every later sum. Raises Lost."""
        if not self._connects:
            return
        self._timeout = timedelta(minutes=timeout_minutes)
        on_gpu = torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        if on_gpu:
            torch.cuda.set_device(self._local_rank() % torch.cuda.device_count())
        try:
            store, *_ = next(iter(dist.rendezvous("env://", timeout=self._timeout)))
            self._store = dist.PrefixStore(self._name_of_this_start(store), store)
            kind = {"store": self._store, "rank": self.rank, "world_size": self.size}
            # Our own time limit comes before the library's, which ends a process in a page of its own.
            dist.init_process_group(backend, **kind, timeout=self._timeout + timedelta(minutes=1))
        except (RuntimeError, ValueError) as error:
            self._store = None  # it may have found that already, and has nobody to tell
            self._speak()
            what = f"rank {self.rank} does not find the {self.size} processes of the run"
            raise ValueError(f"{what}: {one_line(error, 200)}") from None
        # One that ends before all are connected takes the others' connections with it, and they hear no reason.
        self.meet()

    def _name_of_this_start(self, store: Any) -> str:
        """A new name that all processes agree on, below which they talk. Raises RuntimeError where they do not come.

        torchrun may keep one store for all its restarts, where the words of before, and gloo's addresses, still stand;
        and its count of restarts differs between machines (https://github.com/pytorch/pytorch/issues/135712). So each
        process shows a number of its own, new at each start, and rank 0 says which it has seen: a process that finds
        its number there has found the rank 0 of this start.
        """
        ours = uuid.uuid4().hex
        until = time.monotonic() + self._timeout.total_seconds()
        if self.rank:
            store.set(f"here/{self.rank}", ours)
        while time.monotonic() < until:
            if self.rank:
                name, *seen = store.get("start").decode().split()
                if ours in seen:
                    store.set(f"{name}/{self.rank}", "")
                    return name
            else:
                here = [f"here/{rank}" for rank in self._others]
                store.set("start", " ".join([ours, *(store.get(key).decode() for key in here if store.check([key]))]))
                if all(store.check([f"{ours}/{rank}"]) for rank in self._others):
                    return ours
            time.sleep(0.02)
        raise RuntimeError(f"not in {self._timeout.total_seconds() / 60:g} minutes (--process-timeout-minutes)")

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None:
            self.tell(error)
            if not isinstance(error, (Stopped, ValueError, OSError, SystemExit)):
                self._speak()  # for the traceback, which only this process has
            return
        if self._store is not None and not self._broken:
            dist.destroy_process_group()
            self._store = None
        self._speak()

    def _speak(self) -> None:
        """Let this process be heard, whatever its rank."""
        if self.rank:
            sys.stdout, sys.stderr = self._streams

    def device(self, name: str) -> str:
        """The device of this process where the run's is called `name`: of several GPUs each process takes its own."""
        if self.size == 1 or not name.startswith("cuda"):
            return name
        if name != "cuda":
            raise ValueError(f"--device {name}: {self.size} processes take a GPU each; say --device cuda")
        return f"cuda:{self._local_rank()}"

    def _local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", self.rank))

    # --- Rows of a batch ----------------------------------------------------------------------------------------------

    def rows(self, n: int) -> slice:
        """The rows that this process has of n. Where none is left for it: all, which count for nothing (`weight` 0)."""
        return rows_of(n, self.rank, self.size)

    def part(self) -> tuple[int, int]:
        """Which part of a batch this process has, for a Loader."""
        return self.rank, self.size

    def weight(self, n: int) -> float:
        """What a mean over the rows of this process counts in the mean over all n."""
        return len(range(self.rank, n, self.size)) / n

    def noise(self, generator: torch.Generator, n: int) -> Source:
        """What a loss on the rows of this process draws from."""
        return generator if self.size == 1 else RowsOf(generator, self.rows(n), n)

    def reseed(self, seed: int) -> None:
        """Let what draws from PyTorch's own generator, like dropout, depend on this seed and this process alone."""
        if self.size > 1:
            torch.manual_seed(seed + self.rank)

    # --- Sums ---------------------------------------------------------------------------------------------------------

    def sum_(self, values: Tensor) -> None:
        """Put the sum over all processes in the place of `values`. Raises Lost, or what another process ended with."""
        if not self.connected:
            return
        self._sums += 1
        started = time.monotonic()
        try:
            self._store.set(f"at/{self.rank}", str(self._sums))
            work = dist.all_reduce(values, async_op=True)
            if values.is_cuda:
                # NCCL would wait for ever for a process that has ended.
                while not work.is_completed():
                    waited = time.monotonic() - started
                    if waited > self._timeout.total_seconds() or (waited > 1 and self._ended()):
                        raise RuntimeError("no answer")
                    time.sleep(1e-4 if waited < 1 else 0.1)
                work.wait()
            else:
                work.wait(self._timeout)
        except RuntimeError as error:
            raise self._what_happened(error, time.monotonic() - started) from None

    def whole(self, values: Tensor, n: int, signals: Signals | None = None) -> Tensor:
        """The values (n,) of all rows, of which `values` are those of this process; with the wish to stop."""
        if not self.connected:
            return values
        flat = torch.zeros(n + len(ASKING), device=values.device)
        if self.rank < n:
            flat[:n][self.rows(n)] = values.float()
        flat[n:] = torch.zeros(len(ASKING)) if signals is None else signals.wished()
        self.sum_(flat)
        if signals is not None:
            signals.hear(flat[n:])
        return flat[:n].to(values.dtype)

    def mean_(self, values: Sequence[Tensor], n: int) -> None:
        """Put the mean over all n rows in the place of means over the rows of this process."""
        if self.connected:
            flat = packed([self.weight(n) * value for value in values])
            self.sum_(flat)
            for value, mean in zip(values, unpacked(flat, values), strict=True):
                value.copy_(mean)

    @torch.no_grad()
    def add_up(
        self,
        model: nn.Module,
        buffers_before: Sequence[Tensor],
        loss: Tensor,
        metrics: dict[str, Tensor],
        n: int,
        signals: Signals | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """From a backward pass on the rows of this process to one on the whole batch of n: in one sum.

        Means over rows become means over the batch: gradients, loss, scalar metrics, and what the pass made of the
        model's buffers (BatchNorm's running statistics), which `buffers_before` it were the same everywhere. Metrics
        that have a value a row get those of all rows. What signals wish is heard by all.

        Returns the loss and the metrics.
        """
        if not self.connected:
            return loss.detach(), metrics
        weight = self.weight(n)
        kept = [pair for pair in zip(model.buffers(), buffers_before, strict=True) if pair[0].dtype != torch.bool]
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # A parameter that no loss reaches has no gradient, which is not the same to an optimizer as 0.
        reached = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
        pieces = [torch.zeros_like(p) if p.grad is None else weight * p.grad for p in parameters]
        # As changes, so that what does not change stays to the last bit.
        pieces += [weight * (now - before) for now, before in kept]
        for value in metrics.values():
            if value.dim():
                of_all = value.new_zeros((n, *value.shape[1:]))
                if weight:
                    of_all[self.rows(n)] = value
                pieces.append(of_all)
            else:
                pieces.append(weight * value)
        pieces += [weight * loss, reached, torch.zeros(len(ASKING)) if signals is None else signals.wished()]
        flat = packed(pieces, loss.device)
        self.sum_(flat)
        sums = unpacked(flat, pieces)
        for parameter, by_any, gradient in zip(parameters, sums[-2].tolist(), sums, strict=False):
            if by_any:
                parameter.grad = torch.empty_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad.copy_(gradient)
        sums = sums[len(parameters) :]
        for (buffer, before), change in zip(kept, sums, strict=False):
            buffer.copy_(before + (change if buffer.is_floating_point() else change.round().to(buffer.dtype)))
        if signals is not None:
            signals.hear(sums[-1])
        return sums[-3], dict(zip(metrics, sums[len(kept) :], strict=False))

    # --- Words --------------------------------------------------------------------------------------------------------

    def meet(self, message: str = "") -> list[str]:
        """Wait for all processes; what each of them says, by rank. Raises Lost, or what another process ended with."""
        if not self.connected:
            return [message]
        said = os.fsencode(message)[:MESSAGE]
        every = torch.zeros(self.size, MESSAGE, dtype=torch.uint8)
        every[self.rank, : len(said)] = torch.frombuffer(bytearray(said + b"\0"), dtype=torch.uint8)[: len(said)]
        self.sum_(every)
        return [os.fsdecode(bytes(row.tolist()).rstrip(b"\0")) for row in every]

    @contextlib.contextmanager
    def rank_0_first(self) -> Iterator[None]:
        """In the body rank 0 goes first, and the others when it is through."""
        if self.rank:
            self.meet()
        yield
        if not self.rank:
            self.meet()

    def check_alike(self, what: str, checksum: str) -> None:
        """Raise ValueError where `what` differs between processes, whose checksums these are."""
        theirs = self.meet(checksum)
        for rank, other in enumerate(theirs):
            if other != theirs[0]:
                raise ValueError(f"rank {rank} has other {what} than rank 0: is it the same code, folder and data?")

    def tell(self, error: BaseException) -> None:
        """Let the others know what this process ends with, which they will ask when they miss it."""
        if self._store is None or self._broken:  # then it is what the others have told
            return
        kind = next((kind.__name__ for kind in (Stopped, ValueError, OSError) if isinstance(error, kind)), "")
        message = one_line(error, 2000) if kind else one_line(f"{type(error).__name__}: {error}", 2000)
        with contextlib.suppress(RuntimeError):
            self._store.set(f"end/{self.rank}", json.dumps([kind, message]))
            self._broken = True
            if not torch.cuda.is_available():
                dist.destroy_process_group()  # so that the others miss it now; NCCL would wait for them
            self._linger()

    def _what_happened(self, error: RuntimeError, waited: float) -> Exception:
        """Why a sum has failed: what another process ended with, or which of them is missing."""
        self._broken = True
        found: list[Any] = []
        # In a thread, since the store does not answer where rank 0 keeps it, and hangs.
        search = threading.Thread(target=lambda: found.append(self._search()), daemon=True)
        search.start()
        search.join(2 * SEARCH + 1)
        missing = found[0] if found else [0]
        self._linger([] if isinstance(missing, Exception) else missing)
        if isinstance(missing, Exception):
            return missing
        if self.rank == min({*range(self.size)} - {*missing}):
            self._speak()
        names = f"rank {missing[0]}" if len(missing) == 1 else f"one of the ranks {', '.join(map(str, missing))}"
        if not missing:
            return Lost(f"the processes cannot reach each other any more ({one_line(error, 200)})")
        if waited < 0.99 * self._timeout.total_seconds():
            return Lost(f"{names} of {self.size} processes is gone")
        minutes = self._timeout.total_seconds() / 60
        return Lost(f"waited {minutes:g} minutes for {names} of {self.size} processes (--process-timeout-minutes)")

    def _search(self) -> list[int] | Exception:
        """Which processes are missing, or what one of them ended with."""
        missing = self._others
        try:
            self._store.set(f"left/{self.rank}", "")
            until = time.monotonic() + SEARCH
            while missing and time.monotonic() < until:
                for rank in self._ended():
                    told = json.loads(self._store.get(f"end/{rank}"))
                    self._store.set(f"read/{self.rank}", "")
                    return _as_told(rank, *told)
                missing = [rank for rank in self._others if not self._store.check([f"left/{rank}"])]
                time.sleep(0.05)
            behind = [rank for rank in missing if self._count_of(rank) < self._sums]
            self._store.set(f"read/{self.rank}", "")
        except RuntimeError:
            return [0] if self.rank else missing  # the store has gone with whoever kept it
        return behind or missing

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def _ended(self) -> list[int]:
        """Which of the others have told what they ended with."""
        return [rank for rank in self._others if self._store.check([f"end/{rank}"])]

    def _linger(self, missing: Sequence[int] = ()) -> None:
        """Rank 0 may be who keeps the store: it stays until all but these have read there, or told, what happened."""
        waiting, until = {*self._others} - {*missing}, time.monotonic() + FAREWELL
        with contextlib.suppress(RuntimeError):  # torchrun keeps the store, and has ended
            while not self.rank and waiting and time.monotonic() < until:
                words = ("read", "end")
                waiting -= {rank for rank in waiting for word in words if self._store.check([f"{word}/{rank}"])}
                time.sleep(0.05)

    def _count_of(self, rank: int) -> int:
        return int(self._store.get(f"at/{rank}")) if self._store.check([f"at/{rank}"]) else 0


# The one process of a run that has no others.
ALONE = Processes()


def _as_told(rank: int, kind: str, message: str) -> Exception:
    """What a process ended with, as the others say it."""
    kinds = {"Stopped": Stopped, "ValueError": ValueError, "OSError": OSError}
    return kinds[kind](f"rank {rank}: {message}") if kind else Lost(f"rank {rank} ended with {message}")


def packed(pieces: Sequence[Tensor], device: torch.device | None = None) -> Tensor:
    """All in one, in the widest of their types and at least in float32."""
    dtype = torch.float32
    for piece in pieces:
        dtype = torch.promote_types(dtype, piece.dtype)
    return torch.cat([piece.detach().reshape(-1).to(device, dtype) for piece in pieces])


def unpacked(flat: Tensor, pieces: Sequence[Tensor]) -> list[Tensor]:
    """What `packed` has put together, in its shapes and the type of `flat`."""
    parts = flat.split([piece.numel() for piece in pieces])
    return [part.view(piece.shape) for part, piece in zip(parts, pieces, strict=True)]
