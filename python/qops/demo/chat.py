"""Text to token ids under the model's chat template, and ids back to a stream of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers.decoders import DecodeStream


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Ids of one user message under the chat template, ready for the answer; plain text where there is no template."""
    if tokenizer.chat_template is None:
        return text_ids(tokenizer, prompt)
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of running text, with the BOS the model was trained with, if any."""
    return tokenizer(text, verbose=False)["input_ids"]


def stop_ids(tokenizer: Any, model: Any) -> frozenset[int]:
    """The ids that end an answer: what the tokenizer, the config and the generation config each call end of text."""
    found = [tokenizer.eos_token_id]
    for config in (model.config, model.generation_config):
        ids = getattr(config, "eos_token_id", None)
        found += ids if isinstance(ids, list) else [ids]
    return frozenset(index for index in found if index is not None)


def stream(tokenizer: Any, ids: Iterable[int]) -> Iterator[str]:
    """Text of the ids as they come, special tokens left out. A character of several ids appears with its last one."""
    decoder = DecodeStream(skip_special_tokens=True)
    for index in ids:
        yield decoder.step(tokenizer.backend_tokenizer, index) or ""
