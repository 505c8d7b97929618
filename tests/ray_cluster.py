"""A Ray cluster of several nodes on this machine, started as an operator would; nodes can be killed or drained."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RayCluster:
    """A head and workers of one CPU each; ports and folders are its own, for other Rays may run beside it."""

    def __init__(self, home: Path) -> None:
        # Short, for socket names; and its own, since Ray leaves a note in it that later starts would follow.
        self._sessions = tempfile.mkdtemp(prefix="ray", dir="/tmp")
        self._port = free_port()
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef",
            "RAY_AUTH_MODE": "token",
            "RAY_ADDRESS": f"127.0.0.1:{self._port}",
            "HOME": str(home),
        }
        self.nodes: list[subprocess.Popen] = []
        """The head first."""

    def start(self, workers: int) -> None:
        head = self._start("--head", f"--port={self._port}", "--include-dashboard=false")
        deadline = time.monotonic() + 60
        while True:
            assert head.poll() is None, head.stdout.read()
            assert time.monotonic() < deadline, "the head did not come up"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self._port)) == 0:
                    break
            time.sleep(0.2)
        for number in range(workers):
            self._start(f"--address=127.0.0.1:{self._port}")
            self._wait_for_cpus(2 + number)  # two that start at once take each other's ports

    def _start(self, *arguments: str) -> subprocess.Popen:
        ports = ["metrics-export-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"]
        command = [_RAY, "start", "--block", "--num-cpus=1", "--object-store-memory=100000000", *arguments]
        command += [f"--{name}={free_port()}" for name in [*ports, "runtime-env-agent-port"]]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]
        # A folder for each, as on machines of their own: a node unpacks a job's working folder after it has removed
        # what it finds there, also while a driver of another node runs in it.
        command += [f"--temp-dir={self._sessions}/{len(self.nodes)}"]
        if "--head" in arguments:
            command += [f"--ray-client-server-port={free_port()}"]
        environment = {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"}
        node = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.nodes.append(node)
        return node

    def _wait_for_cpus(self, count: int) -> None:
        script = "import ray; ray.init(log_to_driver=False); print(int(ray.cluster_resources().get('CPU', 0)))"
        deadline = time.monotonic() + 90
        while True:
            command = [sys.executable, "-c", script]
            asked = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
            if asked.stdout.strip() == str(count):
                return
            assert time.monotonic() < deadline, asked.stdout + asked.stderr

    def node_of(self, process: psutil.Process) -> subprocess.Popen:
        """The node on which a worker runs."""
        above = {parent.pid for parent in process.parents()}
        return next(node for node in self.nodes if node.pid in above)

    def kill(self, node: subprocess.Popen) -> None:
        """SIGKILL everything on a node, as a machine that loses its power."""
        with suppress(psutil.NoSuchProcess):
            everything = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
            for process in everything:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        node.wait()
        self.nodes.remove(node)

    def tell_to_leave(self, node: subprocess.Popen) -> None:
        """SIGTERM a node, as a machine that is about to be taken away."""
        node.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        for node in self.nodes[::-1]:
            self.kill(node)
        shutil.rmtree(self._sessions, ignore_errors=True)


@contextmanager
def ray_cluster(home: Path, workers: int) -> Iterator[RayCluster]:
    cluster = RayCluster(home)
    try:
        cluster.start(workers)
        yield cluster
    finally:
        cluster.stop()
