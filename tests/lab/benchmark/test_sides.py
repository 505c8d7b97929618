"""The benchmark's sides do the same work: same rows, same prompts, same losses step by step."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.backbone import prompted
from pipeline.backbone.files import architecture_of, find_model, read_config, read_tokenizer
from pipeline.backbone.host import host_backbone
from pipeline.errors import CorpusError
from pipeline.lab.benchmark import ablation
from pipeline.lab.benchmark.evaluation import evaluated_by_transformers, evaluated_here
from pipeline.lab.benchmark.ours import tune_together
from pipeline.lab.benchmark.peft_trainer import PeerOptions, load_peer_model, tune_one_by_one
from pipeline.lab.benchmark.side_by_side import Side, compare_sides
from pipeline.lab.benchmark.work import WorkOptions, load_work
from tests.corpora import reviews
from tests.tiny import make_model

STEPS = 4


def make_work(tmp_path, family):
    folder = make_model(tmp_path / "model", family, scale=1.0)
    for seed, name in enumerate(("film", "book")):
        folder_of_task = tmp_path / "data" / name
        folder_of_task.mkdir(parents=True)
        texts, labels = zip(*reviews(30, seed), strict=True)
        for split in ("train", "dev"):
            pq.write_table(pa.table({"text": texts, "label": labels}), folder_of_task / f"{split}.parquet")
    tokenizer = read_tokenizer(find_model(str(folder)))
    architecture = architecture_of(read_config(find_model(str(folder))))
    tasks = load_work(tmp_path / "data", ["film", "book"], tokenizer, architecture, WorkOptions(5, 6, dev_rows=20))
    rng = np.random.default_rng(0)
    return folder, tasks, [rng.normal(size=(5, 32)).astype(np.float32) for _ in tasks]


@pytest.fixture
def work(tmp_path):
    return make_work(tmp_path, "llama")


@pytest.mark.parametrize("family", ["llama", "t5_tied"])
def test_prompts_tuned_together_have_the_losses_of_peft_and_trainer_one_by_one(tmp_path, family):
    folder, tasks, prompts = make_work(tmp_path, family)
    files = find_model(str(folder))
    backbone = host_backbone(
        files, read_config(files), int8=False, dtype=torch.float32, device=torch.device("cpu"), sharded=False
    )
    ours = tune_together(backbone, tasks, prompts, STEPS, token_budget=64)
    options = PeerOptions()
    theirs = tune_one_by_one(load_peer_model(folder, options), tasks, prompts, STEPS, options, tmp_path / "peer")
    assert ours.tokens == theirs.tokens
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-3)  # Trainer rounds what it logs


@pytest.mark.parametrize("without", [ablation.prompt_per_row, ablation.padded_rows, ablation.all_logits])
def test_taking_a_part_out_changes_how_a_loss_is_computed_and_not_the_loss(work, without):
    folder, tasks, prompts = work
    files = find_model(str(folder))
    backbone = host_backbone(
        files, read_config(files), int8=False, dtype=torch.float32, device=torch.device("cpu"), sharded=False
    )
    ours, other = (
        tune_together(backbone, tasks, prompts, STEPS, token_budget=64, nll=nll)
        for nll in (prompted.target_nll, without)
    )
    np.testing.assert_allclose(other.losses, ours.losses, rtol=1e-4)
    np.testing.assert_allclose(other.prompts, ours.prompts, rtol=1e-4, atol=1e-5)


def test_both_sides_of_the_evaluation_choose_the_same_labels_and_give_the_same_answers(work):
    folder, tasks, prompts = work
    files = find_model(str(folder))
    backbone = host_backbone(
        files, read_config(files), int8=False, dtype=torch.float32, device=torch.device("cpu"), sharded=False
    )
    of_both = (read_tokenizer(files), tasks, prompts, 6, 14)
    ours = evaluated_here(backbone, *of_both)
    theirs = evaluated_by_transformers(load_peer_model(folder, PeerOptions()).eval(), *of_both)
    assert [len(rows) for rows in ours.chosen] == [20, 20] and ours.chosen == theirs.chosen
    assert [len(rows) for rows in ours.decoded] == [7, 7] and ours.decoded == theirs.decoded
    assert len({label for rows in ours.chosen for label in rows}) > 1 and len(set(ours.decoded[0])) > 1


def test_ratios_leave_the_settling_steps_out_and_tell_their_spread():
    seconds = iter([1.0, 2.0])
    result = compare_sides(
        "test",
        {
            "fast": lambda: Side([10] * 4, [99.0, 99.0, 1.0, 1.0], [[1.0]] * 4),
            "slow": lambda: Side([10] * 4, [0.1, 0.1, *[next(seconds)] * 2], [[1.0]] * 3 + [[1.25]]),
        },
        rounds=2,
    )
    assert result.rates == {"fast": [10.0, 10.0], "slow": [10.0, 5.0]}
    assert result.ratios == {"slow": (1.0, 1.5, 2.0)}
    assert result.loss_difference == {"slow": pytest.approx(0.2)}


def test_a_task_that_is_not_there_gets_one_sentence(tmp_path):
    with pytest.raises(CorpusError, match=r"nothing/train\.parquet cannot be read"):
        load_work(tmp_path, ["nothing"], None, "decoder-only", WorkOptions(5, 6))
