"""`run_ranks` with processes forked from one that has imported everything: importing takes longer than most tests."""

from functools import partial
from multiprocessing import get_context

from pipeline.lab.benchmark import ranks

get_context("forkserver").set_forkserver_preload(
    [
        "deepspeed",
        "transformers.models.auto.modeling_auto",
        "pipeline.tuning.loop",
        "pipeline.lab.full_weights.training",
    ]
)

run_ranks = partial(ranks.run_ranks, start="forkserver")
