"""Runs of fused models by block operators, and by the chain whose bits they must have."""

from __future__ import annotations

import contextlib

import torch
from transformers import DynamicCache

from qops.models import blocks
from qops.nn import RMSNorm
from qops.testing import assert_bitwise
from tests.support.models.families import VOCAB

LAYERS = 5
IDS = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))


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
    blocks._FUNCTIONS.append((RMSNorm, "forward", None))  # a function that the class does not have any more
    try:
        with counted() as counts:
            results = run()
    finally:
        blocks._FUNCTIONS.pop()
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


# Loops over layers -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def leads():
    """The numbers of layers that were computed by one operator, call by call."""
    found, lead = [], blocks.Run.lead

    def leading(self, *arguments):
        y = lead(self, *arguments)
        if y is not None:
            found.append(1 + len(self.ahead))
        return y

    blocks.Run.lead = leading
    try:
        yield found
    finally:
        blocks.Run.lead = lead


def nothing(index, x, layer):
    return x


def token(model, cache, t, before=nothing, layers=None, mask=None):
    """Hidden states after a loop over layers such as people write."""
    decoder = model.model
    ids = IDS[:, t : t + 1]
    x = decoder.embed_tokens(ids)
    positions = torch.full_like(ids, cache.get_seq_length())
    tables = decoder.rotary_emb(x, positions)
    for index, layer in enumerate(decoder.layers if layers is None else layers):
        x = before(index, x, layer)
        x = layer(
            x,
            attention_mask=mask(index) if mask else None,
            position_ids=positions,
            position_embeddings=tables,
            use_cache=True,
            **{layer.cache_keyword: cache},
        )
    return decoder.norm(x)


def begun(model, tokens=6, prompt=9):
    """A cache after a prompt and so many steps: the layers that follow one another are known."""
    cache = DynamicCache(config=model.config)
    logits = model(IDS[:, :prompt], past_key_values=cache, use_cache=True).logits
    return cache, [logits, *(token(model, cache, prompt + t) for t in range(tokens))]


def contents(cache):
    held = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    return [tensor.clone() for tensor in held if tensor is not None]


def run_with(model, *tokens):
    """Steps with keywords of token() each, and what the cache holds in the end."""

    def run():
        cache, results = begun(model)
        for t, how in enumerate(tokens):
            results.append(token(model, cache, 15 + t, **how))
        return results + contents(cache)

    return run
