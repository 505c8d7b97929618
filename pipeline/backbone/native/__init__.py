"""Kernels in C for float32 on a CPU: compiled at first use, and done without where there is no compiler."""
