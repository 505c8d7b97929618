"""Nights made up for the tests: any number of tasks, every decision among them."""

import math
import random
from dataclasses import replace

from pipeline.reporting.html import (
    Condition,
    Curve,
    Decision,
    Fault,
    NightReport,
    PastVersion,
    Stage,
    TaskNight,
)

STARTED = 1_795_564_800.0
WHY: dict[Decision, str] = {
    "failed": "the loss was nan at step 31; lower optimizer.lr or set optimizer.clip_norm",
    "pending": "its corpus changed: 6,920 train rows where there were 6,412",
    "removed": "no longer in the settings; its prompt leaves the bank with this version",
    "kept": "its dev accuracy is worse on the same 500 rows; a paired randomisation test finds it worse (p = 0.012)",
    "cold": "new in the settings",
    "warm": "its corpus changed: 6,920 train rows where there were 6,412",
    "carried": "corpus, template, settings and backbone are those of version 11",
}


def curve(trial: str, steps: int = 120, seed: int = 0, best: bool = True, floor: float = 0.4) -> Curve:
    noise = random.Random(seed)
    losses = [(step, floor + 2.2 * math.exp(-step / 25) + noise.uniform(-0.15, 0.15)) for step in range(1, steps + 1)]
    every = max(1, steps // 8)
    evaluations = [
        (step, 0.9 - 0.4 * math.exp(-step / 40) + noise.uniform(-0.01, 0.01)) for step in range(0, steps + 1, every)
    ]
    return Curve(trial, losses, evaluations, best, "tuned" if best else "halved")


def task(name: str, decision: Decision, seed: int = 0, **changes: object) -> TaskNight:
    noise = random.Random(seed)
    incumbent = None if decision == "cold" else 0.8 + noise.uniform(-0.1, 0.1)
    gain = noise.uniform(-0.02, 0) if decision == "kept" else noise.uniform(0.003, 0.06)
    trained = decision in ("kept", "cold", "warm")
    tuned = (incumbent or 0.8) + gain if trained else None
    past = [] if decision == "cold" else [(7 + i, 0.7 + 0.02 * i + noise.uniform(-0.02, 0.02)) for i in range(5)]
    history = [PastVersion(n, v, noise.choice(("tuned", "carried_forward"))) for n, v in past]
    if decision != "removed":
        history.append(PastVersion(12, tuned if decision in ("cold", "warm") else incumbent, "tuned"))
    night = TaskNight(
        name=name,
        decision=decision,
        why=WHY[decision],
        metric="accuracy",
        incumbent=incumbent,
        tuned=tuned,
        p_value=0.012 if decision == "kept" else 0.981 if decision == "warm" else None,
        start=0.5 if decision == "cold" else incumbent if decision == "warm" else None,
        warm=tuned if decision == "warm" else None,
        cold=0.79 if decision == "warm" else None,
        steps=120 if trained else 31 if decision == "failed" else 0,
        history=history,
        curves=[curve(name, 120 if trained else 31, seed)] if trained or decision == "failed" else [],
        rows={}
        if decision == "removed"
        else {
            "train": {"ok": 6920 + seed, "null": seed % 3, "empty": 0, "input_long": seed % 7, "target_long": 0},
            "dev": {"ok": 872, "null": 0, "empty": 0, "input_long": 0, "target_long": 0},
        },
    )
    return replace(night, **changes)  # type: ignore[arg-type]


def night(tasks: int = 3, **changes: object) -> NightReport:
    few: list[Decision] = ["warm", "kept", "carried"]
    many: list[Decision] = ["carried"] * 14 + ["warm"] * 9 + ["kept"] * 3 + ["cold"] * 2 + ["failed", "removed"]
    decisions = few if tasks <= 3 else many
    found = [
        task(["sentiment", "language", "punctuation"][i] if tasks <= 3 else f"team-{i % 7}.task-{i:03}",
             decisions[i % len(decisions)], seed=i)
        for i in range(tasks)
    ]  # fmt: skip
    report = NightReport(
        title="Night of 2026-11-25",
        run="nightly-2026-11-25",
        verdict="good" if tasks <= 3 else "partial",
        outcome="Version 12 is published, and alias prod moved from 11 to 12.",
        started=STARTED,
        ended=STARTED + 1933,
        tasks=found,
        bank="s3://prompts/bank",
        alias="prod",
        version=12,
        parent=11,
        alias_before=11,
        alias_after=12,
        exit_code=0,
        conditions=[
            Condition("share of tasks refreshed", True, "at least 90 % asked for, 97 % found"),
            Condition("no canary worse", tasks <= 3, "sentiment is 0.004 better; nothing below −0.010 is allowed"),
        ],
        faults=[Fault(STARTED + 700, "rank 1 was lost at step 60 and started again from the checkpoint of step 50")],
        stages=[
            Stage("corpus", 41.2),
            Stage("backbone", 12.9, 812 * 2**20),
            Stage("tuning", 1804.0, 2_900_000_000),
            Stage("publish", 0.4),
        ],
        ranks=2,
        rank_seconds=3634,
        price_per_rank_hour=2.10,
        facts={
            "model": "smollm2-135m, int8",
            "backbone": "2cb5d5be" * 8,
            "settings": "refresh.yaml",
            "libraries": "torch 2.13.0, transformers 5.23.0, deepspeed 0.19.8, ray 2.60.0",
        },
    )
    return replace(report, **changes)  # type: ignore[arg-type]
