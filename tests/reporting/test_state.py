"""What a run's events tell of where it stands."""

from pipeline.reporting.state import RunState


def test_a_run_whose_last_steps_were_not_told_is_shown_at_the_step_of_its_last_evaluation():
    state = RunState()
    for event in (
        {"event": "launch", "trials": [{"trial": "film", "task": "film", "max_steps": 300}]},
        {"event": "step", "step": 295, "tokens_per_second": 9.0, "trials": {"film": {"step": 295, "loss": 0.5}}},
        {"event": "eval", "trial": "film", "step": 300, "metric": "accuracy", "value": 0.9, "loss": 0.5},
        {"event": "finished", "trial": "film", "status": "tuned"},
        {"event": "end", "version": 1, "exit": 0},
    ):
        state.apply(event)
    assert state.step == 300
