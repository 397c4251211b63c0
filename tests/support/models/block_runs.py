"""Runs of fused models by block operators, and by the chain whose bits they must have."""

from __future__ import annotations

import contextlib

from qops.models import blocks, decoder
from qops.testing import assert_bitwise


@contextlib.contextmanager
def counted():
    """How many halves of layers are computed by block operators: [attention, MLP]."""
    counts, before = [0, 0], [half.step for half in (blocks.AttentionHalf, blocks.MlpHalf)]
    lead = blocks.Run.lead

    def leading(self, layers, *arguments):
        y = lead(self, layers, *arguments)
        if y is not None:
            counts[:] = [count + 1 + len(self.ahead) for count in counts]
        return y

    def counting(step, index):
        def count(*arguments):
            y = step(*arguments)
            counts[index] += y is not None
            return y

        return count

    for index, half in enumerate((blocks.AttentionHalf, blocks.MlpHalf)):
        half.step = counting(before[index], index)
    blocks.Run.lead = leading
    try:
        yield counts
    finally:
        blocks.AttentionHalf.step, blocks.MlpHalf.step = before
        blocks.Run.lead = lead


def chain_of(run):
    """The results of a run without block operators."""
    known = decoder.DecoderLayer._known_halves
    decoder.DecoderLayer._known_halves = lambda self: None
    try:
        with counted() as counts:
            results = run()
    finally:
        decoder.DecoderLayer._known_halves = known
    assert counts == [0, 0]
    return results


def check(run, *, attention=True, model=None):
    """Bits of the chain; ``attention``: whether block operators compute any of it. Those of GELU have no MLP block."""
    with counted() as counts:
        got = run()
    assert (counts[0] > 0) == attention, counts
    if model is not None and attention:
        assert (counts[1] > 0) == (model.family != "gemma3"), counts
    want = chain_of(run)
    assert len(got) == len(want)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_bitwise(a, b, f"result {index}")
