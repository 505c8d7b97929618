"""Continue a model's own training: LM adaptation of an encoder-decoder, or pre-training of a small one from scratch."""
