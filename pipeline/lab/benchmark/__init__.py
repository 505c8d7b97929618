"""Benchmarks against what a user would pick instead: both sides in turn, on one machine, on the same rows."""
