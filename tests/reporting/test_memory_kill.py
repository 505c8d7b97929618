"""What Ray's memory monitor says, as one clause."""

from pathlib import Path

from ray.exceptions import OutOfMemoryError

from pipeline.corpus.shards import _without_ray
from pipeline.reporting.memory_kill import memory_kill
from pipeline.tuning import launch

TOLD = """Task was killed due to the node running low on memory.
Memory on the node (IP: 10.0.0.7, ID: 3c6f) was 3.81GB used / 4.00GB limit (0.952500)
OOM kill reason: memory usage threshold
(lease ID=ab, task name=RayTrainWorker.run, required resources={}, pid=4711, actual memory used=2.10GB, worker ID=9)
Top 10 memory users: PID MEM(GB) COMMAND
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/
"""


def test_the_process_and_the_amount_are_named_in_one_clause():
    told = memory_kill(TOLD)
    assert told is not None and "\n" not in told
    assert "process 4711 (RayTrainWorker.run, 2.10 GB)" in told
    assert "3.81 of 4.00 GB were in use on node 10.0.0.7" in told


def test_other_words_of_ray_are_left_as_they_are_and_fewer_words_are_enough():
    assert memory_kill("The actor died unexpectedly") is None
    assert "a process because its node ran low on memory" in memory_kill("killed: node running low on memory")


def test_each_stage_says_what_its_own_processes_can_do_with_less_of():
    tuning = str(launch._sentence(RuntimeError(TOLD), 3, (), 60.0))
    assert "process 4711" in tuning and "lower cluster.num_workers or cluster.tokens_per_microbatch" in tuning
    for text in (TOLD, "Ray does not say why"):
        tokenising = str(_without_ray(OutOfMemoryError(text), "task 'a', train", Path()))
        assert "shorter cells" in tokenising and "microbatch" not in tokenising and "\n" not in tokenising
    assert all("RAY_memory_usage_threshold" in told for told in (tuning, tokenising))
