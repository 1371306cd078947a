"""A true SLURM of two nodes, ``n1`` and ``n2``, on this machine: with a key, daemons, ports and a folder of its own."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
CONFIGURATION = """
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits until the credential of its last start has expired, by default two minutes.
AuthInfo=socket={folder}/munge/socket,cred_expire=10
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=10
MinJobAge=3600
SlurmctldTimeout=30
SlurmdTimeout=10
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/log/slurmd-%n
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no such cluster here; none: there can."""
    os.environ["PATH"] += f"{os.pathsep}/usr/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"no {', '.join(absent)} on this machine (Debian: apt-get install slurm-wlm munge)" if absent else None


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def until(what: Callable[[], object], seconds: float, name: str) -> None:
    """Waits until it is true.

    Raises:
        TimeoutError: it has not become so.
    """
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            raise TimeoutError(f"after {seconds} s still not: {name}")
        time.sleep(0.3)


def descendants(pid: int) -> list[int]:
    """A process's children and theirs."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


class Cluster:
    """Starts it in a folder, and stops what it started.

    Args:
        folder: a short path (a socket's path has at most 107 characters).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("state", "spool", "log", "munge"):
            (folder / name).mkdir()
        folder.chmod(0o755)
        (folder / "munge").chmod(0o711)
        host, (controller, first, second) = socket.gethostname().split(".")[0], free_ports(3)
        (folder / "munge" / "key").write_bytes(os.urandom(1024))
        (folder / "munge" / "key").chmod(0o400)
        settings = {"host": host, "controller": controller, "first": first, "second": second, "user": getpass.getuser(), "folder": folder}
        (folder / "slurm.conf").write_text(CONFIGURATION.format(**settings))
        self.environment = {**{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PYTEST_XDIST"))},
                            "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}  # fmt: skip

    def start(self) -> None:
        """Until both nodes are idle."""
        munge = self.folder / "munge"
        files = (f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed"))
        self.run("munged", "--force", *files, f"--socket={munge}/socket")
        self.run("slurmctld", "-f", str(self.folder / "slurm.conf"))
        for node in ("n1", "n2"):
            self.start_node(node)
        until(lambda: self.nodes_in("idle") == 2, 60, "two idle nodes")

    def stop(self) -> None:
        """Its jobs first, then its daemons, by their process ids."""
        subprocess.run(["scancel", "--user", getpass.getuser()], env=self.environment, check=False)
        for name in ("slurmd-n1.pid", "slurmd-n2.pid"):
            until(lambda name=name: not descendants(self.pid(name)), 30, "jobs have ended")  # type: ignore[misc]
        for name in ("slurmd-n1.pid", "slurmd-n2.pid", "slurmctld.pid", "munge/pid"):
            if pid := self.pid(name):
                os.kill(pid, signal.SIGTERM)
                until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 30, f"{name} has ended")  # type: ignore[misc]

    def pid(self, name: str) -> int:
        """Of a daemon that runs; 0: it does not."""
        path = self.folder / name
        pid = int(path.read_text()) if path.is_file() and path.read_text().strip() else 0
        return pid if pid and Path(f"/proc/{pid}").exists() else 0

    def start_node(self, node: str) -> None:
        """Its slurmd."""
        self.run("slurmd", "-f", str(self.folder / "slurm.conf"), "-N", node)

    def lose_node(self, node: str, spared: int = 0) -> list[int]:
        """Kills all of a node at once: slurmd, what watches its steps, and every process of its jobs, but for one that is spared.

        Returns what was killed.
        """
        daemon = self.pid(f"slurmd-{node}.pid")
        steps = self.steps_of(node)
        doomed = [daemon, *steps, *(child for step in steps for child in descendants(step) if child != spared)]
        for pid in doomed:
            os.kill(pid, signal.SIGSTOP)  # so that none of them sees another one go
        for pid in reversed(doomed):  # children first: a stopped process whose parent goes is woken by the system, and srun would tell
            os.kill(pid, signal.SIGKILL)
        return doomed

    def steps_of(self, node: str) -> list[int]:
        """The slurmstepd of a node: they stand on their own, and their command line names no node, but their log file does."""
        found = []
        for command in Path("/proc").glob("[0-9]*/comm"):
            try:
                if command.read_text().strip() == "slurmstepd" and any(
                    str(link.resolve()).endswith(f"slurmd-{node}") and str(self.folder) in str(link.resolve())
                    for link in (command.parent / "fd").iterdir()
                ):
                    found.append(int(command.parent.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
        return found

    def run(self, *words: str) -> str:
        """One command, which must succeed; its output."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def nodes_in(self, state: str) -> int:
        """How many nodes are in a state."""
        return self.run("sinfo", "--noheader", "--Node", "--format=%T").split().count(state)

    def state(self, job: str) -> str:
        """Of a job: PENDING, RUNNING, COMPLETED ..."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def restarts(self, job: str) -> int:
        """How often it was requeued."""
        return int(self.run("scontrol", "show", "job", job).partition("Restarts=")[2].split()[0])

    def wait(self, job: str, seconds: float) -> str:
        """Until a job has ended; its state."""
        def ended() -> bool:
            states = self.state(job).split()
            return bool(states) and all(state in ENDED for state in states)

        until(ended, seconds, f"job {job} has ended")
        return self.state(job)
