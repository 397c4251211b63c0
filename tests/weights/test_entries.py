"""Modules and tensors of a Noticed by their names: each way to write them counts, and no way to read them does."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import qops
from qops.nn import Int4Linear, RMSNorm
from qops.weights.noticed import Noticed, tell_of_change


@pytest.fixture(autouse=True)
def no_grad():
    """Weights that are none of inference mode's may be packed again."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def linear():
    return Int4Linear(qops.Int4Weight.quantize(torch.randn(32, 32), 16), torch.randn(32))


# A module with at least two entries, one of them by its name, and another one to put there.
MODULES = {
    "_parameters": lambda: (linear(), "bias", nn.Parameter(torch.zeros(32), requires_grad=False)),
    "_buffers": lambda: (linear().weight, "scales", torch.zeros(4)),
    "_modules": lambda: (linear(), "weight", linear().weight),
}
WRITES = {
    "a key": lambda entries, name, other: entries.__setitem__(name, other),
    "del": lambda entries, name, other: entries.__delitem__(name),
    "|=": lambda entries, name, other: entries.__ior__({name: other}),
    "clear": lambda entries, name, other: entries.clear(),
    "pop": lambda entries, name, other: entries.pop(name),
    "popitem": lambda entries, name, other: entries.popitem(),
    "setdefault": lambda entries, name, other: entries.setdefault("another", other),
    "update": lambda entries, name, other: entries.update({name: other}),
    "update by keywords": lambda entries, name, other: entries.update(**{name: other}),
}


class Plan:
    """What is told of changes."""

    def __init__(self):
        self.told = 0
        tell_of_change(self)

    def let_go(self):
        self.told += 1


def check_counts(write):
    """`write` counts, and tells a plan once, however often it does."""
    plan, before = Plan(), Noticed.changes
    write()
    assert Noticed.changes > before
    assert plan.told == 1


def as_it_is(module):
    return module


def unpickled(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("made", [as_it_is, copy.copy, copy.deepcopy, unpickled])
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("way", WRITES)
def test_every_way_to_write_an_entry(kind, way, made):
    """Of copies as well; and what it does to a dict it does."""
    module, name, other = MODULES[kind]()
    entries = vars(made(module))[kind]
    expected = dict(entries)
    WRITES[way](expected, name, other)
    check_counts(lambda: WRITES[way](entries, name, other))
    assert entries == expected


@pytest.mark.parametrize("kind", MODULES)
def test_entries_that_are_all_replaced(kind):
    """That counts, and so does what is written into the new ones."""
    module, name, other = MODULES[kind]()
    entries = dict(vars(module)[kind])
    check_counts(lambda: setattr(module, kind, entries))
    assert getattr(module, kind) == entries
    check_counts(lambda: vars(module)[kind].__setitem__(name, other))
    assert getattr(module, kind)[name] is other


@pytest.mark.parametrize("kind", MODULES)
def test_reading_counts_nothing(kind):
    module, name, _ = MODULES[kind]()
    entries, before = vars(module)[kind], Noticed.changes
    assert entries[name] is entries.get(name) is getattr(module, name)
    assert name in entries
    assert list(entries) == list(entries.keys()) == [key for key, _ in entries.items()]
    assert len(entries) == len(entries.values()) == len(entries.copy()) == len(entries | {})
    module.state_dict()
    assert Noticed.changes == before


def test_attributes():
    """That are set, deleted, registered or loaded."""
    norm = RMSNorm(torch.ones(8), 1e-6)
    for change in (
        lambda: setattr(norm, "eps", 1.0),
        lambda: delattr(norm, "eps"),
        lambda: setattr(norm, "weight", nn.Parameter(torch.zeros(8), requires_grad=False)),
        lambda: norm.register_parameter("other", None),
        lambda: norm.register_buffer("another", torch.zeros(1)),
        lambda: norm.add_module("child", nn.Identity()),
        lambda: delattr(norm, "child"),
        lambda: setattr(norm, "__class__", type("Another", (RMSNorm,), {})),
    ):
        check_counts(change)
    norm = RMSNorm(torch.ones(8), 1e-6)
    check_counts(lambda: norm.load_state_dict({"weight": torch.zeros(8)}, assign=True))


def test_who_is_told_sees_what_was_written():
    """What is found between a count and a write would stand, and be of what was there before."""
    module, seen = nn.Module.__new__(Noticed), []
    Noticed.__init__(module)

    class Looks(Plan):
        def let_go(self):
            seen.append(module._buffers.get("here"))

    keeper, other = Looks(), torch.ones(1)
    module._buffers["here"] = other
    assert len(seen) == 1 and seen[0] is other, keeper
