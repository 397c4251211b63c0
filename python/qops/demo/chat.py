"""The tokenizer of the demo: text to ids under the model's chat template, and ids back to a stream of text.

Built from a model folder (`tokenizer.json`, `tokenizer_config.json`) or from the metadata of a GGUF, on the
`tokenizers` package alone: importing the tokenizer classes of transformers would delay the first token.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from qops.demo.console import DemoError

# The text split of Llama 3's byte-level tokenizer, as in its tokenizer.json.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GGUF_CONTROL, _GGUF_USER_DEFINED = 3, 4
_SPECIAL_TOKENS = ("bos_token", "eos_token", "eot_token", "unk_token")


@dataclass
class ChatTokenizer:
    """A tokenizer, its chat template (None for a base model) and the ids that end an answer."""

    tokenizer: Tokenizer
    chat_template: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)
    stop_ids: frozenset[int] = frozenset()

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTokenizer:
        """Read a Hugging Face model folder. Raises DemoError without a `tokenizer.json`."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise DemoError(f"{folder} has no tokenizer.json; the demo needs one beside the weights")
        tokenizer = Tokenizer.from_file(str(path))
        config = _read_json(folder / "tokenizer_config.json")
        special = {name: _token_text(config[name]) for name in _SPECIAL_TOKENS if config.get(name)}
        template = config.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        with contextlib.suppress(FileNotFoundError):
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        stops = {tokenizer.token_to_id(special[name]) for name in ("eos_token", "eot_token") if name in special}
        for name in ("config.json", "generation_config.json"):
            ids = _read_json(folder / name).get("eos_token_id")
            stops.update(ids if isinstance(ids, list) else [ids])
        return cls(tokenizer, template, special, frozenset(index for index in stops if index is not None))

    @classmethod
    def from_gguf(cls, path: Path) -> ChatTokenizer:
        """Build the tokenizer a GGUF describes: byte-level BPE (GPT-2, SmolLM, Llama 3) or SentencePiece BPE (Llama 2).

        Raises DemoError when the file has none, or one whose text split is not known: a wrong split gives wrong ids
        in silence.
        """
        from gguf import GGUFReader

        fields = GGUFReader(str(path)).fields
        return cls.from_gguf_metadata(
            {name: item.contents() for name, item in fields.items() if name.startswith("tokenizer.")}
        )

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, Any]) -> ChatTokenizer:
        """`from_gguf` on the file's `tokenizer.*` keys."""
        entry = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
        model, tokens = entry.get("model"), entry.get("tokens")
        if not tokens:
            raise DemoError("this GGUF holds no tokenizer; pass a model folder with a tokenizer.json instead")
        if model == "gpt2":
            tokenizer = _byte_level_tokenizer(tokens, entry["merges"], entry.get("pre", "default"))
        elif model == "llama":
            tokenizer = _sentencepiece_tokenizer(
                tokens, entry["scores"], entry.get("unknown_token_id", 0), entry.get("add_space_prefix", True)
            )
        else:
            raise DemoError(f"this GGUF's tokenizer is of kind {model!r}; the demo reads 'gpt2' and 'llama'")
        kinds = entry.get("token_type", ())
        for kind, special in ((_GGUF_CONTROL, True), (_GGUF_USER_DEFINED, False)):
            texts = [token for token, token_kind in zip(tokens, kinds, strict=False) if token_kind == kind]
            tokenizer.add_tokens([AddedToken(text, normalized=False, special=special) for text in texts])
        ids = {name: entry.get(f"{name[:3]}_token_id") for name in ("bos_token", "eos_token", "eot_token")}
        special_tokens = {name: tokens[index] for name, index in ids.items() if index is not None}
        # llama.cpp puts BOS before a SentencePiece vocabulary that does not say otherwise.
        if entry.get("add_bos_token", model == "llama") and "bos_token" in special_tokens:
            bos = special_tokens["bos_token"]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, ids["bos_token"])]
            )
        stops = (ids["eos_token"], ids["eot_token"])
        return cls(
            tokenizer,
            metadata.get("tokenizer.chat_template"),
            special_tokens,
            frozenset(index for index in stops if index is not None),
        )

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, such that `from_folder` gives this tokenizer back."""
        self.tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of one user message under the chat template, ready for the answer; plain text without a template."""
        if self.chat_template is None:
            return self.text_ids(prompt)
        text = _compile_template(self.chat_template).render(
            messages=[{"role": "user", "content": prompt}], add_generation_prompt=True, **self.special_tokens
        )
        # The template writes BOS itself where the model wants one.
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def text_ids(self, text: str) -> list[int]:
        """Ids of running text, with the BOS the model was trained with, if any."""
        return self.tokenizer.encode(text).ids

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text of the ids as they come. A character spread over several ids appears with its last one."""
        decoder = decoders.DecodeStream(skip_special_tokens=True)
        for index in ids:
            yield decoder.step(self.tokenizer, index) or ""


def _byte_level_tokenizer(tokens: Sequence[str], merges: Sequence[str], split: str) -> Tokenizer:
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        pairs.append((left, right))
    byte_level = functools.partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
    splits: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
        "default": lambda: byte_level(use_regex=True),
        "gpt-2": lambda: byte_level(use_regex=True),
        "smollm": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level(use_regex=True)]
        ),
        "llama-bpe": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated"), byte_level(use_regex=False)]
        ),
    }
    splits["llama3"] = splits["llama-v3"] = splits["llama-bpe"]
    if split not in splits:
        raise DemoError(f"this GGUF's tokenizer splits text as {split!r}; the demo knows {', '.join(sorted(splits))}")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # Llama 3 takes a word that is itself in the vocabulary whole, before any merge.
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=splits[split] is splits["llama-bpe"]))
    tokenizer.pre_tokenizer = splits[split]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_tokenizer(
    tokens: Sequence[str], scores: Sequence[float], unknown: int, add_space_prefix: bool
) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # SentencePiece joins the pair whose result has the best score: every split of a token into two tokens is a merge,
    # in the order of the whole token's score.
    ranked = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-score, vocabulary[left], vocabulary[right], left, right))
    ranked.sort()
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for *_, left, right in ranked],
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend("▁")] if add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if add_space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


@functools.lru_cache(maxsize=1)
def _compile_template(template: str) -> Any:
    # The environment that chat templates are written for: sandboxed (a template is untrusted input), blocks trimmed.
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DemoError(f"{path} is not JSON: {error}") from error


def _token_text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]
