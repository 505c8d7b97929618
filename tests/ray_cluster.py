"""A Ray cluster of several nodes on this machine, as an operator starts it: `ray start`, token authentication on."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

BIN = Path(sys.executable).parent
RAY = str(BIN / "ray")
TOKEN = "0123456789abcdef0123456789abcdef"


@dataclass
class RayCluster:
    """What a user of the cluster has: the environment with its address and token."""

    environment: dict[str, str]
    head_address: str
    nodes: list[subprocess.Popen] = field(default_factory=list)
    """The head first."""

    def add_node(self, cpus: int) -> subprocess.Popen:
        """One more machine; nodes of one machine differ in their ports alone."""
        node = _start(["--address", self.head_address, f"--num-cpus={cpus}"], self.environment)
        self.nodes.append(node)
        return node

    def wait_for_nodes(self, count: int) -> None:
        def alive() -> bool:
            listed = self.ray("list", "nodes", "--filter", "state=ALIVE", "--format=json", check=False)
            return listed.count('"node_id"') == count

        _wait(alive, f"{count} nodes", self.nodes)

    def submit(self, name: str, *entrypoint: str, folder: Path) -> str:
        """`ray job submit` from a working folder, which the cluster gets a copy of; the submission's name."""
        for attempt in range(30):  # the cluster takes jobs a little after its dashboard answers
            submission = f"{name}-{attempt}"
            command = ["job", "submit", "--no-wait", f"--submission-id={submission}", f"--working-dir={folder}"]
            done = self._run(*command, "--", *entrypoint)
            if done.returncode == 0:
                return submission
            assert "No available agent" in done.stderr, done.stdout + done.stderr
            time.sleep(2)
        raise AssertionError("the cluster took no job")

    def finish(self, submission: str, timeout: float = 240) -> str:
        """What a job printed that ended well."""
        deadline = time.monotonic() + timeout
        # Asked for, not followed: `ray job submit` that waits can wait for ever, and then tells nothing of the job.
        while not (ended := re.search("succeeded|failed|stopped", status := self.ray("job", "status", submission))):
            assert time.monotonic() < deadline, f"{status}\n{self.ray('job', 'logs', submission)}"
            time.sleep(1)
        output = self.ray("job", "logs", submission)
        assert ended[0] == "succeeded", output
        return output

    def listed(self, what: str, *filters: str) -> list[dict[str, Any]]:
        """What Ray's state service lists: nodes, actors, tasks."""
        chosen = [word for one in filters for word in ("--filter", one)]
        return json.loads(self.ray("list", what, *chosen, "--format=json", "--limit=10000", "--detail"))

    def ray(self, *arguments: str, check: bool = True) -> str:
        """What `ray …` prints, as a user of the cluster calls it."""
        done = self._run(*arguments)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _run(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [RAY, *arguments], env=self.environment, capture_output=True, text=True, timeout=120, check=False
        )


@contextmanager
def ray_cluster(home: Path, cpus: Sequence[int], **variables: str) -> Iterator[RayCluster]:
    """One node for each number of CPUs, the first of them the head; all processes are gone afterwards.

    `variables` are in every node's environment.

    Ports, home and temporary folder are its own: other Rays may run on this machine.
    """
    port, dashboard = free_port(), free_port()
    # Short, for socket names; and its own, since Ray leaves a note in it that later starts would follow.
    sessions = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "HOME": str(home),
        **variables,
    }
    cluster = RayCluster(environment, f"127.0.0.1:{port}")
    try:
        head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={sessions}",
                f"--ray-client-server-port={free_port()}", f"--num-cpus={cpus[0]}"]  # fmt: skip
        cluster.nodes.append(_start(head, environment))
        _wait(lambda: _answers(dashboard), "the dashboard", cluster.nodes)
        for count in cpus[1:]:
            cluster.add_node(count)
        cluster.wait_for_nodes(len(cpus))
        yield cluster
    finally:
        for node in cluster.nodes:
            kill_tree(node)
        shutil.rmtree(sessions, ignore_errors=True)


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL a process that we started and all below it, as when its machine is lost."""
    with suppress(psutil.NoSuchProcess):
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen:
    shared = ["--block", "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={free_port()}",
              "--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000"]  # fmt: skip
    return subprocess.Popen(
        [RAY, "start", *arguments, *shared],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(ready, what: str, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for process in processes:
            assert process.poll() is None, process.stdout.read()
        if ready():
            return
        time.sleep(0.5)
    raise AssertionError(f"{what} did not come up")
