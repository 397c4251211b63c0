"""Who computes an operator on a device: found in the adapters' modules."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from bench.peers import MODULES
from bench.problems.shared.provider import Provider

# What torch alone has, and nothing that compiles.
EAGER_MODULES = ("bench.peers.ours",)


def all(op: str, device: str, modules: Sequence[str] = MODULES) -> list[Provider]:
    """Every provider of an operator on a kind of device, ours first, installed or not."""
    lists = [importlib.import_module(name).PROVIDERS for name in modules]
    found = [p for providers in lists for p in providers if p.op == op and device in p.devices]
    names = [provider.name for provider in found]
    assert len(set(names)) == len(names), f"{op}: providers of one name: {names}"
    return found
