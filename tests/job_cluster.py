"""A Ray cluster that takes jobs, and what its users do with it: submit, wait, look who ran where."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.ray_cluster import RayCluster, free_port

RAY = str(Path(sys.executable).parent / "ray")


class JobCluster(RayCluster):
    """A head that only schedules, as in cluster/, with the dashboard, which is the job server."""

    def __init__(self, home: Path, **variables: str) -> None:
        """`variables` are in every node's environment."""
        super().__init__(home)
        self._dashboard = free_port()
        self.environment |= {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self._dashboard}", **variables}

    @property
    def token(self) -> str:
        return self.environment["RAY_AUTH_TOKEN"]

    def start(self, workers: int) -> None:
        self._start("--head", f"--port={self._port}", f"--dashboard-port={self._dashboard}", "--num-cpus=0")
        self._wait_for_nodes(1)
        for _ in range(workers):
            self.add_node()

    def add_node(self) -> subprocess.Popen:
        node = self._start(f"--address=127.0.0.1:{self._port}")
        self._wait_for_nodes(len(self.nodes))  # two that start at once take each other's ports
        return node

    def lose(self, node: subprocess.Popen) -> None:
        """Kill a node, and wait until the cluster knows that it is gone."""
        self.kill(node)
        self._wait_for_nodes(len(self.nodes))

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

    def ray(self, *arguments: str) -> str:
        """What `ray …` prints, as a user of the cluster calls it."""
        done = self._run(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _run(self, *arguments: str) -> subprocess.CompletedProcess:
        command = [RAY, *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=False)

    def _wait_for_nodes(self, count: int) -> None:
        deadline = time.monotonic() + 120
        while True:
            assert all(node.poll() is None for node in self.nodes), "a node did not come up"
            asked = self._run("list", "nodes", "--filter", "state=ALIVE", "--format=json")
            if asked.stdout.count('"node_id"') == count:
                return
            assert time.monotonic() < deadline, asked.stdout + asked.stderr
            time.sleep(0.5)


@contextmanager
def job_cluster(home: Path, workers: int, **variables: str) -> Iterator[JobCluster]:
    """All processes are gone afterwards."""
    cluster = JobCluster(home, **variables)
    try:
        cluster.start(workers)
        yield cluster
    finally:
        cluster.stop()
