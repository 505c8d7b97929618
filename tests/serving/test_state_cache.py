"""Prompts' states of many tasks in little memory, and what /metrics tells of it."""

from collections import OrderedDict

import numpy as np
import pytest

from pipeline.bank import PromptBank
from pipeline.serving import PromptedModel, load_backbone
from pipeline.serving.service_metrics import ServiceMetrics
from tests.serving.prompts import new_prompt
from tests.tiny import make_model

TASKS, HELD, LENGTH = 1000, 100, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thousand")
    backbone = load_backbone(str(make_model(folder / "model", "llama", seed=1, scale=2.0)))
    bank = PromptBank.open(folder / "bank", create=True)
    prompts = [new_prompt(f"task{i}", LENGTH, seed=i, like="film") for i in range(TASKS)]
    bank.publish(prompts, backbone.identity, "test", {}, "latest")
    probe = PromptedModel(backbone, bank)
    probe.classify(["good"], ["task0"])
    return PromptedModel(backbone, bank, cache_bytes=HELD * probe.states.nbytes)


def told(metrics):
    lines = [line.split() for line in metrics.text().decode().splitlines() if line.startswith("promptbank_state_cache")]
    return {name.partition("{")[0].removeprefix("promptbank_state_cache_"): float(value) for name, value in lines}


def test_a_thousand_tasks_drawn_by_zipf_stay_within_the_limit_and_are_counted(model):
    weights = 1 / np.arange(1, TASKS + 1)
    draws = np.random.default_rng(0).choice(TASKS, size=(150, 8), p=weights / weights.sum())
    held, hits = OrderedDict(), 0  # the least recently used leaves first
    metrics = ServiceMetrics("r1", model.states)
    for batch in draws:
        tasks = [f"task{i}" for i in batch]
        model.classify(["good film"] * len(tasks), tasks)
        for task in dict.fromkeys(tasks):
            hits += task in held
            held[task] = True
            held.move_to_end(task)
            while len(held) > HELD:
                held.popitem(last=False)
        assert told(metrics)["bytes"] <= told(metrics)["limit_bytes"] == model.states.limit
    found = told(metrics)
    asked = sum(len(set(batch)) for batch in draws.tolist())
    assert found["hits_total"] == hits and found["misses_total"] == asked - hits
    assert found["evictions_total"] == found["misses_total"] - len(held) > 0
    assert found["bytes"] == model.states.limit  # as many as there is room for
    assert hits / asked > 0.4


def test_answers_do_not_depend_on_what_the_cache_holds(model):
    tasks = [f"task{i}" for i in range(0, TASKS, 100)]
    texts = ["bad food"] * len(tasks)
    one, other = model.generate(texts, tasks, 5), model.generate(texts, tasks, 5)
    assert one == other == PromptedModel(model.backbone, model.bank, cache_bytes=0).generate(texts, tasks, 5)
