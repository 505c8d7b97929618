"""One thread a process: tests run beside each other's ranks on two cores."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# No example is timed: on a busy machine, a slow one is no defect.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
