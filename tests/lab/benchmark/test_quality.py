"""Int8 products, forward and backward, cost prompts no more than another seed would."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.lab.benchmark.bench import OurOptions, open_bench
from pipeline.lab.benchmark.quality import tune_and_score
from pipeline.lab.benchmark.work import WorkOptions

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


@pytest.mark.slow  # six trials on SmolLM2, twice
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not there")
def test_dev_accuracy_with_int8_products_is_within_a_point_of_exact_ones_or_within_the_noise_of_seeds():
    work = WorkOptions(20, 8, rate=0.01, seeds=3, rows=100_000, dev_rows=200)
    bench = open_bench("smollm2-135m", DATA, ["sst2", "subj"], work, steps=30, ranks=1, threads=1)
    int8, exact = (tune_and_score(bench, OurOptions(products=products)) for products in ("int8", "exact"))
    differences = np.concatenate([np.subtract(int8.after[task], exact.after[task]) for task in exact.after])
    noise = differences.std(ddof=1) / np.sqrt(len(differences))
    assert len(differences) == 6
    assert differences.mean() >= -max(0.01, 2 * noise)
    more = np.concatenate([np.subtract(int8.losses[task], exact.losses[task]) for task in exact.losses])
    assert more.mean() <= max(0.05 * exact.mean_loss, 2 * more.std(ddof=1) / np.sqrt(len(more)))
