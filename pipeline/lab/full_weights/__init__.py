"""All weights of a model trained over ranks, in contrast to the frozen backbone that prompts are tuned on."""
