"""What the command lines of the scripts share: types of flags, one-line errors, exit statuses."""

import argparse
import errno
import io
import math
import os
import signal
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, on standard error, with exit status 2."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def add_switch(group: Any, *names: str, **kwargs: Any) -> argparse.Action:
    """Add a flag to a parser or group that is on by itself (`--flag`), and takes true or false (`--flag false`)."""
    return group.add_argument(*names, nargs="?", const=True, type=boolean, metavar="true|false", **kwargs)


def boolean(text: str) -> bool:
    """true or false, in the usual spellings."""
    known = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return known[text.lower()]


def number(*, above: float = -math.inf, least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """The type of a flag that takes a number, or a fraction like 8/255, within bounds."""

    def value(text: str) -> float:
        numerator, slash, denominator = text.partition("/")
        if "/" in denominator:  # which Fraction would read: 1/2/3 as 1.5
            raise ValueError
        # So that 2.1/255 is to the last bit what `length` makes of 2.1.
        return float(Fraction(numerator)) / float(Fraction(denominator)) if slash else float(text)

    return _within(value, "a number", above, least, most)


class Length(NamedTuple):
    """A length in the space of images: its value, in units of pixels in [0, 1], and how it is written."""

    value: float
    text: str


def length(text: str, norm: str, flag: str, *, zero: bool = False) -> Length:
    """What a length on a command line means, in every script and for every flag; the norm decides.

    Linf: `8/255` is that share of the range of pixels, at most 1; `8`, a number from 1 to 255, is 8/255; `0.03`, up to
    0.3, is a share of the range. L2: the number or fraction is the length itself. zero: whether 0 is a length. Raises
    ValueError, beginning with `flag`, for what is no number or too small, and for what cannot be told or meant.
    """
    try:
        value = (number(least=0) if zero else number(above=0))(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{flag}: {error}, or a fraction like 8/255") from None
    if norm == "L2":
        if value > 6 and "/" not in text:
            raise ValueError(f"{flag} {text}: in L2 that is {value:g} times a pixel's whole range; 0.5 is usual")
        return Length(value, f"{value:g}")
    if "/" not in text:
        if 0.3 < value < 1:
            raise ValueError(f"{flag} {text}: in Linf, is that {text}/255 or {255 * value:g}/255? Write which")
        value = value / 255 if value >= 1 else value
    if value > 1:
        raise ValueError(f"{flag} {text}: in Linf at most 255, which means 255/255, is accepted")
    return Length(value, f"{255 * value:g}/255")


def length_words(value: float, norm: str) -> str:
    """A length as `length` reads it again, to the last digit. Raises ValueError in Linf above 1, which is not read."""
    if norm != "L2" and value > 1:
        raise ValueError(f"a length of {value:g} cannot be said for Linf, where at most 1 is accepted")
    usual = 0 <= value <= (6 if norm == "L2" else 0.3)
    numerator, denominator = Fraction(value).as_integer_ratio()
    return str(value) if usual else f"{numerator}/{denominator}"


def length_text(kind: Callable[[str], float]) -> Callable[[str], str]:
    """The type of a flag for a length, whose meaning waits until the norm is known (`length`); a number like `kind`."""

    def check(text: str) -> str:
        kind(text)
        return text

    return check


def triple(text: str) -> list[float]:
    """The type of a flag that takes a number for each colour channel, as in 0.4914,0.4822,0.4465."""
    try:
        values = [float(part) for part in text.strip("[]").split(",")]
    except ValueError:
        values = []
    if len(values) != 3 or not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"{text!r} is not three numbers with commas between them")
    return values


def path(text: str) -> str:
    """The type of a flag for a path, which is made absolute: a run may be resumed from another folder."""
    return str(Path(text).absolute())


def whole(*, least: int = 0, most: float = math.inf) -> Callable[[str], int]:
    """The type of a flag that takes a whole number within bounds."""
    return _within(int, "a whole number", -math.inf, least, most)


def optional(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of a flag that also takes `none`."""

    def convert(text: str) -> Any:
        if text.lower() == "none":
            return None
        try:
            return kind(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error} or none") from None

    return convert


def plain(value: Any) -> str:
    """A flag's value as it is written on a command line."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _within(kind: Callable[[str], Any], noun: str, above: float, least: float, most: float) -> Callable[[str], Any]:
    bounds = [f"above {above}"] * (above > -math.inf) + [f"at least {least}"] * (least > -math.inf)
    bounds += [f"at most {most}"] * (most < math.inf)
    accepted = " ".join([noun, " and ".join(bounds)]).strip()

    def convert(text: str) -> Any:
        try:
            value = kind(text)
            accepts = math.isfinite(value) and value > above and least <= value <= most
        except (ValueError, ZeroDivisionError, OverflowError):
            accepts = False
        if not accepts:
            raise argparse.ArgumentTypeError(f"{text!r} is not {accepted}")
        return value

    return convert


def device(name: str, *, cuda_graphs: bool = False) -> torch.device:
    """The device called `name`. Raises ValueError where there is none of that name here, or none for CUDA graphs."""
    try:
        found = torch.device(name)
        torch.zeros(1, device=found).item()  # "meta" is a device, but one without values
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not to be had here ({str(error).splitlines()[0]})") from None
    if cuda_graphs and found.type != "cuda":
        raise ValueError(f"--cuda-graphs: only on a GPU, not with --device {name}")
    return found


def check_compile(device: torch.device) -> None:
    """Raise ValueError, in one line, where torch.compile does not work here, for want of a compiler mostly."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"--compile: does not work here ({reason[0]}); it needs a C++ compiler, g++ say") from None


def check_writable(folder: str | Path, flag: str) -> None:
    """Raise PermissionError where `folder`, or the nearest folder above it that exists, cannot be written to."""
    path = Path(folder).resolve()
    while not path.exists():
        path = path.parent
    if not (path.is_dir() and os.access(path, os.W_OK | os.X_OK, effective_ids=True)):
        raise PermissionError(f"{flag} {folder}: cannot write to {path}")


def print_on() -> list[OSError]:
    """Let nothing that is printed in this process end its work.

    A letter that a terminal does not have becomes an escape; what cannot be printed at all, to a pipe whose reader is
    gone or to a full disk, is passed over. Returns the list in which the first error of standard output will be.
    """
    lost: list[OSError] = []

    def passing_over(call: Callable[..., Any], keep: bool) -> Callable[..., Any]:
        def attempt(*args: Any) -> Any:
            try:
                return call(*args)
            except OSError as error:
                lost.extend([error] * (keep and not lost))
                return len(args[0]) if args else None

        return attempt

    # Python has None for a stream that was closed before it started.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (for the rest of the process)
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            stream.write = passing_over(stream.write, stream is sys.stdout)
            stream.flush = passing_over(stream.flush, stream is sys.stdout)
    return lost


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's main; what is wrong with its input (ValueError, OSError) ends in one line and exit status 2.

    Ctrl-C where main does not take it ends with 128 + SIGINT, as a signal does elsewhere.
    """
    lost = print_on()
    script = Path(sys.argv[0]).name
    try:
        status = main()
        sys.stdout.flush()
        # Whoever closes a pipe wants no more of it; who has given a file is told that it is not whole.
        if not status and any(error.errno != errno.EPIPE for error in lost):
            print(f"{script}: error: what was printed is not all there: {lost[0].strerror}", file=sys.stderr)
            status = 2
        sys.exit(status)
    except (ValueError, OSError) as error:
        print(f"{script}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
