"""Started again with fewer or more ranks, a run goes on where it was."""

import pytest

from tests.job_process import distance, events, finish, project_in, run, start, steps_written, wait_for_step

EXACT = ("--set", "model.products=exact")
STEPS = 1200
"""Long enough that one rank is killed before it has ended."""
TOLERANCE = 1e-3
"""Relative distance of a prompt at the end. Sums are made in another order; int8 products would round that up."""


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact") / "project"
    run(project_in(folder, max_steps=STEPS), *EXACT)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (2, 3)])
def test_a_run_killed_and_started_again_on_other_ranks_ends_with_the_same_prompts(exact, tmp_path, first, then):
    settings = project_in(tmp_path / "project", max_steps=STEPS)
    folder = tmp_path / "project/runs/small"
    process = start(settings, *EXACT, "--set", f"cluster.num_workers={first}")
    wait_for_step(folder, 60, process)
    process.kill()
    finish(process)
    run(settings, *EXACT, "--set", f"cluster.num_workers={then}")
    assert [event["step"] > 0 for event in events(folder, "resume")] == [True]
    assert steps_written(folder) == list(range(1, STEPS + 1))
    assert distance(tmp_path / "project/bank", exact / "bank") < TOLERANCE
