"""Benchmarks: times of training steps and of kernels, and the battery of all that needs a GPU."""
