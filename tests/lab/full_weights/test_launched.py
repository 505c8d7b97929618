"""A fine-tuning sent to the ranks of a real Ray, as a comparison of methods sends it."""

import pytest
import ray

from pipeline.backbone.files import find_model, read_config, read_tokenizer, save_description
from pipeline.lab.full_weights.fine_tuning import FineTuningJob, read_result
from pipeline.lab.full_weights.on_rank import TrainingPlace
from pipeline.reporting.events import EventLog
from pipeline.settings import ClusterSettings, RunSettings
from pipeline.tuning.launch import launch
from tests.corpora import make_corpus, make_task
from tests.tiny import make_model


@pytest.fixture(scope="module", autouse=True)
def running_ray():
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.slow
def test_two_ranks_of_ray_train_carry_an_order_out_and_leave_its_result(family, tmp_path):
    files = find_model(str(make_model(tmp_path / "model", family, scale=1.0)))
    config, tokenizer = read_config(files), read_tokenizer(files)
    save_description(config, tokenizer, tmp_path / "description")
    architecture = "encoder-decoder" if config.is_encoder_decoder else "decoder-only"
    corpus = make_corpus(tmp_path / "corpora", tokenizer, architecture, "film")
    run = tmp_path / "run"
    run.mkdir()
    place = TrainingPlace(str(run), "film", str(tmp_path / "model"), str(tmp_path / "description"))
    settings = make_task(optimizer={"lr": 0.02}, max_steps=10, eval_every=5).model_dump(mode="json")
    order = FineTuningJob(place, "film", settings, corpus.to_dict(), seed=0)
    with EventLog(run / "events.jsonl") as log:
        launch(
            order.carry_out, run, ClusterSettings(num_workers=2), RunSettings(name="run", storage=str(tmp_path)), log
        )
    result = read_result(run)
    assert result is not None and result.steps == 10 and result.test is not None
    assert not (run / "hangs").exists() and not (run / "ray").exists() and not list(run.rglob(".*"))
