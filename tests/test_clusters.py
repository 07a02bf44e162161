"""docs/clusters.md's SLURM script, with stand-ins of srun, scontrol and, but for the large tests, torchrun.

With DYART_LARGE_TESTS=1: two real torchruns, as on two nodes, that are stopped by the signal and started again.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from company import train_together
from runs import contents, differences, tiny

from experiment.processes import free_port

LARGE = os.environ.get("DYART_LARGE_TESTS") == "1"
ROOT = Path(__file__).parents[1]
(SCRIPT,) = re.findall(r"^```bash\n(#!/bin/bash\n.*?)^```$", (ROOT / "docs" / "clusters.md").read_text(), re.M | re.S)

SCONTROL = """case "$1" in
show) [ "$2 $3" = "hostnames node[7-8]" ] && printf "$HEAD\\nnode8\\n" ;;
requeue) echo "$2" >>requeued ;;
esac"""
# As SLURM's it hands SIGTERM on, to a task on each of two nodes.
SRUN = """"$@" & one=$!
"$@" & two=$!
trap 'kill -TERM $one $two; wait' TERM
wait $one; status=$?
wait $two; exit $((status > $? ? status : $?))"""
# The first start goes on until it is stopped, the next ends as $END says.
TORCHRUN = """trap 'sleep 0.2; touch checkpoint; exit 143' TERM
echo "$*, $SRUN_CPUS_PER_TASK CPUs" >>calls
[ ! -e checkpoint ] || exit "$END"
while :; do
    [ "$(wc -l <calls)" -lt 2 ] || touch started
    sleep 0.02
done"""


def start(folder: Path, script: str, torchrun: str, **settings: str) -> subprocess.Popen:
    """A job that runs the script in `folder`, where its commands write."""
    for name, body in {"srun": SRUN, "scontrol": SCONTROL, "torchrun": torchrun, "job": script}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_CPUS_PER_TASK": "32",
        "OMP_NUM_THREADS": "1",
    }
    environment = os.environ | job | {"PATH": f"{folder}:{os.environ['PATH']}"} | settings
    return subprocess.Popen(["bash", folder / "job"], cwd=folder, env=environment, stderr=subprocess.DEVNULL)


def stop_when_there(path: Path, job: subprocess.Popen) -> None:
    """Send the job SIGUSR1, as SLURM does before its time is over, when a file is there; and wait for its end."""
    until = time.monotonic() + 240
    while not path.exists():
        assert time.monotonic() < until and job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    job.wait(120)


@pytest.mark.parametrize("end", [0, 3])
def test_the_slurm_script_stops_with_a_checkpoint_requeues_itself_and_ends_as_its_run_does(tmp_path, end):
    stop_when_there(tmp_path / "started", start(tmp_path, SCRIPT, TORCHRUN, HEAD="node7"))
    assert (tmp_path / "checkpoint").exists() and (tmp_path / "requeued").read_text() == "4711\n"
    assert start(tmp_path, SCRIPT, TORCHRUN, HEAD="node7", END=str(end)).wait(60) == end
    assert (tmp_path / "requeued").read_text() == "4711\n"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 4 and len(set(calls)) == 1  # on each of two nodes, twice
    assert (
        "--nnodes 2 --nproc-per-node 4" in calls[0]
        and "--rdzv-id 4711 --rdzv-endpoint node7:29500 train.py" in calls[0]
    )
    assert calls[0].endswith("--if-exists resume, 32 CPUs")


@pytest.mark.skipif(not LARGE, reason="half a minute of starting processes")
def test_a_requeued_job_ends_with_the_weights_of_one_that_was_not_disturbed(tmp_path):
    flags = ["--group-norm", "--method", "at", "--attack-iter", "2", "--epochs", "8", "--if-exists", "resume"]
    assert train_together(2, tiny(tmp_path / "whole", *flags), tmp_path / "said") == [0, 0]
    port = free_port()
    script = SCRIPT
    training = f"{ROOT}/train.py {' '.join(tiny(tmp_path, *flags))}"
    for before, now in {
        "--nproc-per-node 4": "--nproc-per-node 1",
        ":29500": f":{port}",
        "train.py --dataset cifar10 --output-dir SHARED --if-exists resume": training,
    }.items():
        assert script.count(before) == 1
        script = script.replace(before, now)
    torchrun = f'exec "{sys.executable}" -m torch.distributed.run "$@"'
    stop_when_there(tmp_path / "run" / "latest.pt", start(tmp_path, script, torchrun, HEAD="127.0.0.1"))
    log = tmp_path / "run" / "train.log"
    assert "stopped by SIGTERM; go on with" in log.read_text() and "finished: " not in log.read_text()
    assert (tmp_path / "requeued").read_text() == "4711\n"
    assert start(tmp_path, script, torchrun, HEAD="127.0.0.1").wait(240) == 0
    assert log.read_text().count("resume: from") == 1
    assert not differences(contents(tmp_path / "run"), contents(tmp_path / "whole" / "run"))
