"""Measurements of the claims in docs/benchmarks.md; see `python -m benchmarks --help`."""
