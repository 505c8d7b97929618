"""The whole job: check everything, prepare corpora, tune, publish."""
