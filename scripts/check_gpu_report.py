"""For check_gpu.sh: the outcome and the figures of each part that has run, as a table and as check-gpu.json.

python scripts/check_gpu_report.py FOLDER        exit status 1 where a part has not passed

It needs nothing but Python, so that it also tells what went wrong where there is no PyTorch.
"""

import csv
import json
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

TIMED_OUT = (124, 137)  # what timeout ends with, after SIGTERM and after SIGKILL


def tests(folder: Path) -> dict[str, Any]:
    """How many tests passed, failed or were left out, and which failed."""
    suite = xml.etree.ElementTree.parse(folder / "tests" / "junit.xml").getroot()[0]
    cases = suite.findall("testcase")
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {"passed": len(cases) - len(failed) - len(skipped), "failed": failed, "left_out": len(skipped)}


def bench(folder: Path, name: str) -> dict[str, Any]:
    """Seconds and MiB of each part of a step, and their multiples of those without the option, if they were taken."""
    compared = name != "bench" and (folder / "bench" / "bench.json").exists()
    report, plain = read_bench(folder, name), read_bench(folder, "bench") if compared else None
    figures = {key: report[key] for key in ("machine", "bf16_tflops_per_second", "versions")}
    (subject,) = report["subjects"]
    figures["seconds"] = {step: part["seconds"]["median"] for step, part in subject["times"].items()}
    figures["mib"] = {step: part["mib"] for step, part in subject["memory"].items()}
    if plain is not None:
        before = {step: part["seconds"]["median"] for step, part in plain["subjects"][0]["times"].items()}
        figures["of_plain"] = {step: value / before[step] for step, value in figures["seconds"].items()}
    return figures


def read_bench(folder: Path, name: str) -> dict[str, Any]:
    """What bench.py wrote in a part."""
    return json.loads((folder / name / "bench.json").read_text(encoding="utf-8"))


def training(folder: Path) -> dict[str, Any]:
    """How fast it was, where it was cut, and how far the resumed run is from the one in one go."""
    log = (folder / "training" / "cut" / "train.log").read_text(encoding="utf-8")
    (resumed,) = (line for line in log.splitlines() if " resume: " in line)
    figures = {"resumed": resumed.partition(" resume: ")[2]} | epochs(folder / "training" / "whole")
    return figures | {"largest_difference": difference(folder, "training/whole", "training/cut")}


def torchrun(folder: Path) -> dict[str, Any]:
    """How fast it was, and how far from the training without torchrun."""
    figures = epochs(folder / "torchrun" / "whole")
    return figures | {"largest_difference": difference(folder, "training/whole", "torchrun/whole")}


def epochs(run: Path) -> dict[str, Any]:
    """Seconds, memory and validation of each epoch of a run."""
    names = ("loss", "seconds", "peak_memory_mib", "val_clean", "val_robust")
    return {"epochs": [{"stage": row["stage"]} | {name: float(row[name]) for name in names} for row in metrics(run)]}


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv."""
    with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def difference(folder: Path, one: str, other: str) -> float:
    """Of two runs' losses, the largest relative difference in an epoch. Raises ValueError where epochs are missing."""
    rows, others = metrics(folder / one), metrics(folder / other)
    if [row["epoch"] for row in rows] != [row["epoch"] for row in others]:
        raise ValueError(f"{one} and {other} have not the same epochs")
    pairs = [(float(a["loss"]), float(b["loss"])) for a, b in zip(rows, others, strict=True)]
    return max(abs(a - b) / abs(a) for a, b in pairs)


def evaluation(folder: Path) -> dict[str, Any]:
    """The accuracies, and the seconds of each attack."""
    (path,) = (folder / "evaluation").glob("*.autoattack.json")
    (record,) = json.loads(path.read_text(encoding="utf-8"))
    names = ("device", "n", "clean_accuracy", "robust_accuracy", "robust_accuracy_after", "seconds", "warnings")
    return {name: record[name] for name in names}


FIGURES = {"tests": tests, "training": training, "torchrun": torchrun, "evaluation": evaluation}


def describe(folder: Path, line: str) -> dict[str, Any]:
    """A part as check-gpu.json has it, from the line that check_gpu.sh wrote of it."""
    name, status, seconds, limit, command = line.split("\t")
    outcome = "timed out" if int(status) in TIMED_OUT else "failed" if int(status) else "passed"
    part = {"name": name, "outcome": outcome, "seconds": int(seconds), "limit": int(limit), "command": command}
    said = [text for text in (folder / name / "output.log").read_text(errors="replace").splitlines() if text.strip()]
    try:
        part["figures"] = bench(folder, name) if name.startswith("bench") else FIGURES[name](folder)
    except (OSError, ValueError, LookupError, xml.etree.ElementTree.ParseError) as error:
        part["figures"] = None
        said.append(f"no figures: {type(error).__name__}: {error}")
        part["outcome"] = "failed" if outcome == "passed" else outcome
    return part if part["outcome"] == "passed" else part | {"said": said[-3:]}


def main() -> int:
    """Write check-gpu.json, print the table."""
    folder = Path(sys.argv[1])
    parts = [describe(folder, line) for line in (folder / "parts.tsv").read_text(encoding="utf-8").splitlines()]
    path = folder / "check-gpu.json"
    temporary = path.with_name(".check-gpu.json.tmp")
    temporary.write_text(json.dumps({"parts": parts}, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    for part in parts:
        print(f"{part['name']:20}{part['outcome']:12}{part['seconds']:4} s  {' '.join(part.get('said', [])[-1:])[:80]}")
    print(f"outcomes and figures in {path}")
    return int(any(part["outcome"] != "passed" for part in parts))


if __name__ == "__main__":
    sys.exit(main())
