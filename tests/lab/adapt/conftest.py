from dataclasses import asdict

import pytest

from pipeline.backbone.files import save_config_and_tokenizer
from pipeline.corpus.plain_text import TextCorpus
from pipeline.corpus.rows import Recipe, tokenise_rows
from pipeline.corpus.template import parse_template
from pipeline.corpus.writing import write_rows
from pipeline.lab.adapt.rank_job import AdaptationJob
from pipeline.lab.adapt.start import open_start_model
from pipeline.lab.full_weights.rank_setup import TrainingPlace
from pipeline.settings import AdaptationSettings
from tests.lab.adapt.text import documents
from tests.tiny import make_model, make_tokenizer

CONFIG = {
    "model_type": "t5", "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4,
    "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu",
}  # fmt: skip


@pytest.fixture
def make_job(tmp_path):
    """What makes an order of a run's folder and changed settings, with its corpus tokenised without Ray."""
    make_model(tmp_path / "t5", "t5", scale=1.0)
    make_tokenizer(eos_template=True).save_pretrained(tmp_path / "tokenizer")

    def job(run, /, **changes) -> AdaptationJob:
        usual = {
            "model": {"path": str(tmp_path / "t5")}, "corpus": {"train": "unused"}, "optimizer": {"lr": 0.02},
            "tokens": 12, "batch_size": 5, "steps": 12, "save_at": [0, 8],
        }  # fmt: skip
        settings = AdaptationSettings.model_validate({**usual, **changes})
        run.mkdir(exist_ok=True)
        start = open_start_model(settings, run)
        save_config_and_tokenizer(start.config, start.tokenizer, run / "model")
        place = TrainingPlace(
            str(run), "adapted", start.path, str(run / "model"), checkpoint_every=5, tokens_per_microbatch=48
        )
        corpus = asdict(_text_corpus(run / "shards", start.tokenizer))
        return AdaptationJob(place, settings.model_dump(mode="json"), corpus, "model")

    return job


def _text_corpus(folder, tokenizer) -> TextCorpus:
    texts = documents()
    if not folder.exists():
        recipe = Recipe(parse_template("{text}", ""), None, "", 2**31 - 1, 2**31 - 1, "encoder-decoder")
        write_rows(folder, tokenise_rows(recipe, tokenizer, {"text": texts}, len(texts)))
    return TextCorpus(str(folder), {"ok": len(texts), "null": 0, "empty": 0}, "digest")
