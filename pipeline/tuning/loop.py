"""The tuning of many soft prompts on one frozen model: what a rank does with a run, and the loop of the method.

Every rank runs this over the same numbers, and so takes the same decisions.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from pipeline.backbone.host import Backbone, held_bytes, held_digest
from pipeline.errors import TuningError
from pipeline.settings import Settings
from pipeline.tuning.hosting import host_on_rank
from pipeline.tuning.incumbents import measure_against
from pipeline.tuning.interruption.stop_signal import StopSignal
from pipeline.tuning.interruption.watchdog import (
    call_at_every_layer,
    hang_reports,
    hang_sentence,
    hangs_of,
    rank_process,
)
from pipeline.tuning.progress import TuningRun, resume
from pipeline.tuning.rank_job import RankJob
from pipeline.tuning.ranks import rank, world_size
from pipeline.tuning.run_log import RunLog
from pipeline.tuning.slots import fill_slots, restart
from pipeline.tuning.state import TrialState
from pipeline.tuning.step import losses_and_gradients


def tune_on_rank(job: RankJob, device: torch.device, node_leaves: Callable[[], bool]) -> None:
    """Carry out a run's tuning on this rank; its results are the run's last checkpoint.

    `node_leaves` is that of `StopSignal`.
    Raises: StorageError, BackboneError; TuningError when the frozen weights changed.
    """
    settings, folder = Settings.model_validate(job.settings), Path(job.run_folder)
    timeout, threads = settings.run.hang_timeout, settings.cluster.cpus_per_worker
    run_log = RunLog(folder, silent=rank() != 0)
    if hung := hang_reports(hangs_of(folder)):
        run_log.event("stage", name="tuning", text=f"starting again: {hang_sentence(hung, timeout)}")
    with rank_process(folder, timeout, threads, device) as alive:
        backbone = host_on_rank(settings, job.model_folder, device, run_log)
        call_at_every_layer(backbone.hosted, alive)
        held = ", ".join(f"{size / 2**20:.0f} MiB of {kind}" for kind, size in sorted(held_bytes(backbone).items()))
        before = held_digest(backbone)
        run_log.event("stage", name="tuning", text=f"rank 0 of {world_size()} holds {held}")
        run_log.memory("backbone")
        tokenizer = AutoTokenizer.from_pretrained(job.model_folder, trust_remote_code=False)
        run = job.tuning_run(settings)
        states = tune(run, backbone, tokenizer, StopSignal(folder, node_leaves))
        if job.incumbents and len(states) == len(run.trials) and all(state.ended for state in states):
            run_log.event("stage", name="gate", text=f"{len(job.incumbents)} prompt(s) of the bank measured again")
            measure_against(job.kept_incumbents(), run, states, backbone, tokenizer)
        run_log.memory("tuning")
        if held_digest(backbone) != before:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # or a restart would publish them
            raise TuningError("the frozen weights changed during tuning; the run's prompts are not to be trusted")


def tune(run: TuningRun, backbone: Backbone, tokenizer: Any, stop_signal: StopSignal | None = None) -> list[TrialState]:
    """Tune every trial to its end, resuming from the run's newest checkpoint; their final states.

    Told to stop, it leaves after the step that it is at, with the states of the trials that have started.
    Raises: StorageError when a checkpoint cannot be written.
    """
    progress = resume(run, backbone, tokenizer)
    while True:
        # Between two steps all ranks hear of a stop together, so that none waits for one that has left.
        notice = stop_signal.next(backbone.device) if stop_signal else "go on"
        if notice == "save":  # a node is about to be taken away
            progress.save()
        elif notice == "stop":
            progress.run_log.event("stage", name="tuning", text=f"stopping at step {progress.step}, with a checkpoint")
            break

        # Every `eval_every` steps of its own a trial is measured on dev: its best prompt is kept, and it may end here.
        # A run that was stopped in between has left this to do.
        if due := progress.due():
            progress.measure(due)
            progress.save()

        # A trial that has ended, or is paused at a rung of its sweep, frees its slot for the next one that waits.
        fill_slots(progress)
        live = progress.live()
        if not live:
            break

        # One step of every live trial: a batch of its own rows, all in the same micro-batches.
        losses, tokens = losses_and_gradients(backbone, progress.work_of(live), run.token_budget)
        for state, loss in zip(live, losses, strict=True):
            state.update(float(loss))  # by its own optimizer, schedule and clipping, as if it were alone
            if state.exploded:  # its rate was too high for its first steps
                restart(progress, state)
            elif state.ended:  # its numbers are not finite any more; no other prompt has a part in them
                progress.run_log.finished(state)
        progress.step += 1
        progress.run_log.stepped(progress.step, live, losses, tokens, backbone.traffic.gathered)

        # An evaluation that is due has a checkpoint of its own.
        if progress.step % run.checkpoint_every == 0 and not progress.due():
            progress.save()

    # Once every trial of a task has ended, the best prompt of all, and no other, is measured on the test split.
    progress.save()
    return [progress.states[trial.name] for trial in run.trials if trial.name in progress.states]
