"""`tools/slurm.sh` under a Slurm of one machine, where that is installed."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SMALL = ["train_cfg.max_iters=2", "prepare_data.train=96", "prepare_data.test=24", "train_dataloader.batch_size=4"]
DAEMONS = ("munged", "slurmctld", "slurmd")

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=cpu Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def run(script, *arguments, folder, **environment):
    """What the script printed and its status."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("SLURM")},
        **{"VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment},
    }
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def slurm(tmp_path):
    """Environment of a running Slurm with two cores; its daemons end with the test."""
    missing = [name for name in DAEMONS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing or os.geteuid():
        pytest.skip(f"{', '.join(missing)} not installed" if missing else "Slurm's daemons are started by root only")
    # munged wants a folder that others can read, and sockets have short names.
    folder = Path("/run") / f"slurm_test_{os.getpid()}"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    with socket.socket() as first, socket.socket() as second:
        for probe in (first, second):
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in (first, second)]
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host, ports=ports))
    key = folder / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    names = {"key": "key", "socket": "munge.sock", "pid": "munged.pid", "log": "log", "seed": "seed"}
    options = [f"--{key}{'' if key == 'socket' else '-file'}={folder / name}" for key, name in names.items()]
    munged = ["munged", "--force", *options]
    try:
        for command in (munged, ["slurmctld"], ["slurmd"]):
            subprocess.run(command, env=environment, check=True, capture_output=True)
        deadline = time.monotonic() + 30
        while "idle" not in subprocess.run(["sinfo"], env=environment, capture_output=True, text=True).stdout:
            if time.monotonic() > deadline:
                pytest.skip("Slurm's daemons do not start here: " + (folder / "slurmd.log").read_text()[-500:])
            time.sleep(0.2)
        yield {"SLURM_CONF": environment["SLURM_CONF"]}
    finally:
        for name in reversed(DAEMONS):
            if (folder / f"{name}.pid").is_file():
                os.kill(int((folder / f"{name}.pid").read_text()), signal.SIGTERM)
        time.sleep(1)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_job_trains_on_two_tasks_and_submitted_again_goes_on(slurm, repository, tmp_path):
    script, config = repository / "tools" / "slurm.sh", "projects/mmmamba/digits/stage1.py"
    job = ["cpu", "digits", config, "--work-dir", str(tmp_path / "job"), "--cfg-options", *SMALL]
    options = dict(folder=tmp_path, GPUS="2", CPUS_PER_TASK="1", GRES="none", **slurm)
    first = run(script, *job, **options)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    again = run(script, *job, "train_cfg.max_iters=3", **options)
    assert again.returncode == 0 and "resumed epoch: 0, iter: 2" in again.stdout + again.stderr
    plain = ["train", config, "2", "--work-dir", str(tmp_path / "plain"), "--cfg-options", *SMALL]
    assert run(repository / "tools" / "dist.sh", *plain, folder=tmp_path).returncode == 0
    paths = (tmp_path / name / "iter_2.pth" for name in ("plain", "job"))
    one, two = (torch.load(path, weights_only=False)["state_dict"] for path in paths)
    assert all(torch.equal(one[key], two[key]) for key in one)
    failing = run(script, "cpu", "digits", "gone.py", **options)
    assert failing.returncode != 0 and "config gone.py is neither a file" in failing.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"GPUS": "none"}, "none was given for GPUS"),
        ({"GPUS": "6", "GPUS_PER_NODE": "4"}, "GPUS is 6, a multiple of GPUS_PER_NODE, 4, is expected"),
    ],
)
def test_numbers_are_checked_before_anything_is_submitted(repository, tmp_path, variables, message):
    result = run(repository / "tools" / "slurm.sh", "cpu", "job", "gone.py", folder=tmp_path, **variables)
    assert result.returncode == 2 and message in result.stderr
