"""A real SLURM cluster on this machine: munged, slurmctld, and three slurmd that act as three nodes with GPUs."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
UNFINISHED = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED")  # states of a job that has not ended
NODES = 3  # two that train, and a spare to replace a lost one
CPUS = 4  # per node, whatever this machine has; SLURM counts them, and binds no task to them
MAX_ARRAY_SIZE = 50
GPUS = 2  # per node; files stand for them, so jobs train with --device cpu


def missing() -> list[str]:
    """Returns the programs that are not installed."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


class Cluster:
    """Starts the daemons with all their files in a folder; stops them and their processes on exit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        host = socket.gethostname().split(".")[0]
        ports = free_ports(2 + NODES)
        for name in ("state", "log"):
            (folder / name).mkdir()
        for number in range(GPUS):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
        self.config = folder / "slurm.conf"
        self.config.write_text(f"""
ClusterName=test
MaxArraySize={MAX_ARRAY_SIZE}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool%n
SlurmdTimeout=10
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs={CPUS} Gres=gpu:{GPUS}
NodeName=n[1-{NODES}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[1] + NODES - 1}]
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
        for node in range(1, NODES + 1):
            (folder / f"spooln{node}").mkdir()
        self.environ = os.environ | {
            "SLURM_CONF": str(self.config),
            "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
        }

    def __enter__(self) -> "Cluster":
        self._munge()
        self.start_controller()
        for node in range(1, NODES + 1):
            self.start_node(f"n{node}")
        self._wait_for(self.idle, 60)
        return self

    def __exit__(self, *_: object) -> None:
        self.run("scancel", "--user", "root")
        time.sleep(1)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def start_controller(self) -> None:
        """Starts the controller, which restores the queue that an earlier one has left."""
        self.controller = self._start("slurmctld", "-D")

    def start_node(self, name: str) -> None:
        """Starts the daemon of a node."""
        self.nodes[name] = self._start("slurmd", "-D", "-N", name)

    def lose_node(self, name: str) -> None:
        """Kills everything that runs on a node, first its daemon, as in a power failure."""
        self.nodes[name].kill()
        self.nodes[name].wait()
        tasks = [process for process in all_processes() if f"SLURMD_NODENAME={name}" in read_proc(process, "environ")]
        # First their supervisors, which would report their end to the controller.
        parents = {pid for task in tasks for pid in ancestors(task)}
        supervisors = [pid for pid in parents if read_proc(pid, "cmdline")[0][:10] == "slurmstepd"]
        for pid in (*supervisors, *tasks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def restart_count(self, job: object) -> int:
        """Returns how often a job has been requeued."""
        return int(self.job_info(job).get("Restarts", 0))

    def job_info(self, job: object) -> dict[str, str]:
        """Returns the fields of `scontrol show job`."""
        fields = self.run("scontrol", "show", "job", job, "-o").stdout.split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def cancel_all(self) -> None:
        """Cancels all jobs, restarts lost nodes, and waits until all nodes are idle."""
        for name, daemon in self.nodes.items():
            if daemon.poll() is not None:
                self.start_node(name)
        self.run("scancel", "--user", "root")
        self.run("scancel", "--user", "root", "--signal", "KILL")
        self._wait_for(lambda: not self.run("squeue", "-h").stdout.strip(), 180)
        self._wait_for(self.idle, 180)

    def wait_for_requeue(self, job: object, count: int, **changes: object) -> None:
        """Waits until a job has been requeued `count` times, and starts it at once instead of two minutes later."""
        self._wait_for(lambda: self.restart_count(job) >= count)
        self._wait_for(lambda: self.job_info(job).get("JobState") == "PENDING")
        self.start_now(job, **changes)

    def start_now(self, job: object, **changes: object) -> None:
        """Starts a requeued job at once; `changes` are other fields to update."""
        fields = [f"{key}={value}" for key, value in (changes | {"StartTime": "now"}).items()]
        time.sleep(3)  # a job that restarts within a second of its end has a revoked credential
        update = ["scontrol", "update", f"jobid={job}", *fields]
        self._wait_for(lambda: self.run(*update).returncode == 0, 60)  # refused until the job's cleanup is done

    def idle(self) -> bool:
        """Whether every node is idle."""
        return self.run("sinfo", "-h", "-o", "%D %t").stdout.split() == [str(NODES), "idle"]

    def run(self, *command: object, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Runs a SLURM command against this cluster."""
        return subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            check=check,
            env=self.environ,
            timeout=60,
        )

    def submit(self, *arguments: object, cwd: Path, environ: dict[str, str]) -> int:
        """Submits a job with sbatch; returns its number."""
        result = subprocess.run(
            ["sbatch", "--parsable", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env=environ | {"SLURM_CONF": str(self.config)},
        )
        assert result.returncode == 0, result.stderr
        return int(result.stdout.split(";")[0])

    def wait(self, job: object) -> str:
        """Waits until a job has ended; returns its state."""
        self._wait_for(lambda: self.job_info(job).get("JobState", "GONE") not in UNFINISHED)
        return self.job_info(job).get("JobState", "GONE")

    def _munge(self) -> None:
        """Starts munged, which requires its own key file and folders that nobody else can write to."""
        home = self.folder / "munge"
        home.mkdir(mode=0o755)
        key = home / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        shutil.chown(home, "munge", "munge")
        shutil.chown(key, "munge", "munge")
        options = [f"--key-file={key}", f"--socket={home}/socket", f"--pid-file={home}/pid"]
        options += [f"--log-file={home}/log", f"--seed-file={home}/seed", "--force", "--foreground"]
        self._start("munged", *options, user="munge")
        self._wait_for((home / "socket").exists, 20)

    def _start(self, program: str, *arguments: str, user: str | None = None) -> subprocess.Popen[bytes]:
        log = (self.folder / "log" / f"start-{program}-{len(self.daemons)}").open("wb")
        self.daemons.append(
            subprocess.Popen([program, *arguments], env=self.environ, stdout=log, stderr=log, user=user)
        )
        return self.daemons[-1]

    def _wait_for(self, condition, seconds: float = 900) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = "\n".join(f"== {p.name}\n{p.read_text()[-1500:]}" for p in (self.folder / "log").iterdir())
                raise TimeoutError(f"SLURM: waited for {seconds:.0f} s\n{logs}")
            time.sleep(0.5)


def all_processes() -> list[int]:
    """Returns the ids of all processes."""
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]


def read_proc(pid: int, name: str) -> list[str]:
    """Reads a process's `cmdline` or `environ`; one empty string if the process is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace").split("\0")
    except OSError:
        return [""]


def ancestors(pid: int) -> list[int]:
    """Returns the ancestors of a process, nearest first."""
    pids = []
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        pids.append(pid)
    return pids


def free_ports(count: int) -> list[int]:
    """Returns consecutive free ports; processes that search at the same time start at different ports."""
    first = 17001 + os.getpid() % 1200 * 10
    for start in (*range(first, 30000, 10), *range(17001, first, 10)):
        sockets = []
        try:
            for port in range(start, start + count):
                sockets.append(socket.create_server(("", port)))
            return list(range(start, start + count))
        except OSError:
            continue
        finally:
            for server in sockets:
                server.close()
    raise OSError("no free ports")
