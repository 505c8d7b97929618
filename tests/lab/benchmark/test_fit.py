"""The benchmark of large models, on a tiny one."""

import json
import mmap

import numpy as np
import pytest

from pipeline.lab.benchmark.fit import FitOptions, measure_fit, save_fits, size_of
from pipeline.lab.benchmark.resident import MemoryWatch
from pipeline.lab.benchmark.synthetic import write_checkpoint
from pipeline.lab.benchmark.tables import fit_table
from tests.lab.benchmark.test_synthetic import tiny_config


@pytest.mark.slow
@pytest.mark.processes
def test_two_ranks_load_and_train_a_shape_and_its_checkpoint_is_deleted(tmp_path):
    config = tmp_path / "small.json"
    config.write_text(tiny_config("t5").to_json_string(use_diff=False))
    fit = measure_fit(str(config), 1, tmp_path / "large", FitOptions(prompts=2, length=3, steps=2), keep=False)
    assert not (tmp_path / "large" / "small-1-layers").exists()
    assert [rank.held["int8"] * 2 for rank in fit.ranks] == [fit.size.int8_bytes] * 2
    assert fit.ranks_agree and np.isfinite(fit.ranks[0].losses).all() and len(fit.ranks[0].losses) == 2
    assert all(rank.before.total <= rank.loading.total <= fit.bound for rank in fit.ranks)
    for _ in range(2):  # the same shape again takes the place of the first
        save_fits(tmp_path / "fit.json", [fit])
    (saved,) = json.loads((tmp_path / "fit.json").read_text())
    assert saved["holds"] == fit.holds and saved["bound"] == fit.bound
    assert fit_table(fit).row_count == 2


def test_the_bound_counts_the_largest_layer_and_an_output_layer_of_its_own(tmp_path):
    write_checkpoint(tiny_config("t5", d_ff=256), tmp_path)
    hidden, inner, table = 32, 256, 300 * 32
    attention, feed_forward = 4 * hidden * hidden, 3 * hidden * inner
    size = size_of(tmp_path)
    assert size.layer_bytes == 2 * attention + feed_forward
    assert size.int8_bytes == 2 * table + 2 * (attention + feed_forward) + 2 * (2 * attention + feed_forward)


def test_memory_that_came_and_went_is_seen():
    size = 2**28
    with MemoryWatch() as watch:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for at in range(0, size, mmap.PAGESIZE):
            pages[at] = 1
        pages.close()
    with MemoryWatch() as later:
        pass
    assert watch.peak.total > later.peak.total + size * 3 // 4, "the system's own peak starts anew"
    assert watch.peak.anonymous > later.peak.anonymous + size // 2, "sampled while it was there"
