"""Benchmarks of the operators against what PyTorch offers: ``pytest bench --benchmark-only``."""
