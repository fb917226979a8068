"""Benchmarks: `python -m benchmark.run` for ops, `python -m benchmark.model` for whole training steps."""
