"""qops, what its fused operators replace, and eager PyTorch, which stand with each problem."""

from bench.problems import OPERATORS

PROVIDERS = [provider for operator in OPERATORS.values() for provider in operator.providers()]
