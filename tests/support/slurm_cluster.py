"""A real Slurm of one node on this machine, its daemons started and ended by the test.

All of it, key, sockets, state and logs, lies in a folder of its own and listens on ports of its
own, so several may run at once. Tools find it by ``SLURM_CONF``, which the environment of nothing
else has: that is also how what it started is found again, by a process that ends it all when the
test is done, or gone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

TOOLS = ("slurmctld", "slurmd", "sbatch", "squeue", "scancel", "munged", "setpriv")
START_S = 30.0

# Preemption is what a lab has: a low partition whose jobs are queued again, with time to save.
# Slurm keeps a job that is queued again waiting for as long as a credential lasts.
CONFIGURATION = """\
ClusterName=fsdpq
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
KillWait=10
MpiDefault=none
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 MaxTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=60
"""


def why_not() -> str:
    """Returns why no cluster can be started here, empty where it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"Slurm's tools are missing: {', '.join(missing)} (`make test-tools` installs them)"
    return "" if os.geteuid() == 0 else "only root can start Slurm's daemons"


class SlurmCluster:
    """A cluster that runs until `close`.

    Attributes:
        environment: variables with which Slurm's tools find it.
    """

    def __init__(self) -> None:
        # Not under pytest's own folder: munge wants to be reachable by everybody.
        self.folder = Path(tempfile.mkdtemp(prefix="fsdpq-slurm-"))
        self.folder.chmod(0o755)
        self._configuration = self.folder / "slurm.conf"
        self.environment = os.environ | {"SLURM_CONF": str(self._configuration), "NO_COLOR": "1"}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._reaper = subprocess.Popen(
            [sys.executable, __file__, str(self.folder)], stdin=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def run(self, *command: str, timeout: float = 30) -> str:
        """Runs a command beside the cluster and returns what it prints."""
        return subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True,
            timeout=timeout,
        ).stdout  # fmt: skip

    def state(self, job: int) -> str:
        """Returns Slurm's word for how a job stands."""
        question = ("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")
        return self.run(*question).strip()

    def wait_for(self, condition: Callable[[], object], *, timeout: float = 200) -> None:
        """Waits until ``condition`` holds; fails with what the daemons said."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.02)

    def logs(self) -> str:
        """Returns the end of what the daemons wrote."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{file.name}: {file.read_text()[-2000:]}" for file in files)

    def close(self) -> None:
        """Ends the daemons and every process of their jobs, and removes the folder."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._reaper.communicate(timeout=30)

    def _start(self) -> None:
        munge = self.folder / "munge"
        munge.mkdir(mode=0o711)
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o600)
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        host = socket.gethostname().partition(".")[0]
        ports = dict(zip(("controller_port", "node_port"), _free_ports(2), strict=True))
        self._configuration.write_text(
            CONFIGURATION.format(host=host, folder=self.folder, **ports), encoding="utf-8"
        )
        self._daemon(
            "munged", "--foreground", "--num-threads=1", f"--key-file={munge / 'key'}",
            f"--socket={munge / 'socket'}", f"--pid-file={munge / 'pid'}",
            f"--log-file={munge / 'log'}", f"--seed-file={munge / 'seed'}",
        )  # fmt: skip
        self.wait_for((munge / "socket").exists, timeout=START_S)
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D")
        self.wait_for(self._is_up, timeout=START_S)

    def _is_up(self) -> bool:
        assert all(daemon.poll() is None for daemon in self._daemons), self.logs()
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%T"], env=self.environment, capture_output=True,
            text=True, timeout=START_S, check=False,
        )  # fmt: skip
        return "idle" in done.stdout

    def _daemon(self, *command: str) -> None:
        """Starts a daemon that ends with this process, also where this is killed."""
        end_with_parent: Sequence[str] = ("setpriv", "--pdeathsig", "TERM")
        with (self.folder / f"{command[0]}.log").open("wb") as log:
            daemon = subprocess.Popen(
                [*end_with_parent, *command], env=self.environment, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._daemons.append(daemon)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def reap(folder: Path) -> None:
    """Ends every process that was started for the cluster in a folder, and removes it.

    Not by psutil's `environ`: slurmstepd writes its title over the start of its own, where that
    stops reading.
    """
    mark, deadline = f"SLURM_CONF={folder}/slurm.conf\0".encode(), time.monotonic() + 20
    while time.monotonic() < deadline:
        found = [pid for pid in psutil.pids() if pid != os.getpid() and mark in _environment(pid)]
        if not found:
            break
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""  # ended meanwhile


if __name__ == "__main__":
    sys.stdin.read()  # until the test that started this closes it, or is gone
    reap(Path(sys.argv[1]))
