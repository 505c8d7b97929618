"""Train all weights of a model over ranks, in contrast to the frozen backbone that prompts are tuned on."""
