"""Benchmarks of stiefelopt beside its peers, each one command: `python -m benchmarks.NAME --help`."""
