"""A model's own training goes on: LM adaptation of an encoder-decoder, or a small one pre-trained from nothing."""
