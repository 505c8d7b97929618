"""Tune many soft prompts on one frozen 8-bit model, and keep them in a versioned bank."""
