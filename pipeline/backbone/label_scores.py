"""How labels are compared: by log-likelihood, of the whole label or a token, less each label's offset.

An evaluation and a service both score by these functions, so a served label is the one that was measured.
Shapes: N rows, L labels.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.bank import LabelScore


def label_scores(
    log_likelihoods: np.ndarray, tokens: Sequence[int], by: LabelScore, offsets: Sequence[float] | None
) -> np.ndarray:
    """Scores `[..., L]` of log P(label | prompt, input) `[..., L]`, in nats (with `mean`, in nats a token).

    tokens: `[L]` tokens of each label, the end of the answer included. offsets: `[L]` what is taken off.
    """
    scores = log_likelihoods / np.array(tokens) if by == "mean" else log_likelihoods
    return scores if offsets is None else scores - np.array(offsets)


def label_offsets(scores: np.ndarray) -> tuple[float, ...]:
    """The prior of each label behind a prompt, `[L]` nats: the log of its mean probability over rows `[N, L]`.

    Probabilities sum to 1 over the labels. Taken off every score, this is the contextual calibration of Zhao et al.
    2021 ("Calibrate Before Use", their diagonal W), over inputs of the task in place of content-free ones, as in
    Zhou et al. 2023 ("Batch Calibration"). A row whose scores are not all finite is left out.
    """
    rows = scores[np.isfinite(scores).all(axis=1)].astype(np.float64)
    if not len(rows):
        return (0.0,) * scores.shape[1]
    logs = rows - np.logaddexp.reduce(rows, axis=1, keepdims=True)
    # In logs throughout: a label that no row comes near has a mean probability that would be 0.
    return tuple((np.logaddexp.reduce(logs, axis=0) - np.log(len(rows))).tolist())
