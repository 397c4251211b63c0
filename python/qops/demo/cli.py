"""Command line of ``python -m qops.demo``: fetch, answer, prove, compare."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import io
import itertools
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import qops
from qops.demo import artefact, console
from qops.demo.console import DemoError, note
from qops.formats._transformers import require_transformers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCHEMES = ("stored", "int8", "w4a8")
_ROUNDED = {
    "int8": "W8A8: the decoder's linears in int8, one scale per output channel and one per token",
    "w4a8": "W4A8: the decoder's linears in 4 bits, one scale per group, and activations in int8, one scale per token",
}
# A greedy answer should follow the weights, not the rounding: the two best first tokens of SmolLM2's answer to the
# default prompt have the logits 25.33 and 25.24, which bf16, with steps of 0.125 there, cannot tell apart.
ANSWER_DTYPE = "fp32"
TIMING_DTYPE = "bf16"

_LOGGER = logging.getLogger("qops.demo")
_DESCRIPTION = (
    "Let a real language model answer from its own quantised weights on qops operators, prove the answer with a dense "
    "float32 model of the same dequantised weights, then measure it against one. Without --model it fetches "
    "SmolLM2-135M-Instruct (93 MB, once)."
)
_EPILOG = (
    "The answer and the tables go to stdout, progress and errors to stderr. The model is cached in $QOPS_CACHE, else "
    "$XDG_CACHE_HOME/qops, else ~/.cache/qops. "
    "exit status: 0 success; 1 failure, among them an answer that is not the dense model's; 2 wrong usage; 3 the model "
    "could not be fetched, verified or cached; 130 interrupted."
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qops.demo", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument(
        "--prompt", default="What is the capital of France?", help='the question (default: "%(default)s")'
    )
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=200, metavar="N", help="longest answer (default: %(default)s)"
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads of both models (default: torch's)")
    parser.add_argument(
        "--temperature",
        type=_non_negative,
        default=0.0,
        metavar="T",
        help="0 takes the most likely token each time (default); above 0 tokens are drawn",
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of the draws (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the activations and of the dense model (default: fp32 for the answer, bf16 for the timings)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help="a GGUF file or a folder, of any kind that qops.load_model reads, instead of SmolLM2",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="where the tokenizer is (default: beside or in the model)"
    )
    parser.add_argument("--zero-add", choices=("word", "nibble", "none"), help="as load_model's zero_add, of GPTQ")
    parser.add_argument(
        "--symmetric", action="store_true", default=None, help="as load_model's symmetric, of AWQ without qzeros"
    )
    parser.add_argument(
        "--scheme",
        choices=SCHEMES,
        default=SCHEMES[0],
        help="stored: the weights as the file has them (default); int8: the decoder's linears rounded to 8 bits per "
        "output channel and run with 8-bit activations (W8A8); w4a8: to 4 bits per group, with such activations",
    )
    parser.add_argument("--no-compare", action="store_true", help="answer and prove it; do not measure")
    parser.add_argument(
        "--rounds",
        type=_positive,
        default=5,
        metavar="N",
        help="interleaved rounds of each timing (default: %(default)s)",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show log messages, and tracebacks of failures")
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _non_negative(text: str) -> float:
    if not 0 <= (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


def _seed(text: str) -> int:
    # What torch.Generator.manual_seed takes.
    if not 0 <= (value := int(text)) < 2**63:
        raise argparse.ArgumentTypeError(f"must be 0 ... 2**63 - 1, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return the process's exit code."""
    options = build_parser().parse_args(argv)
    if options.verbose:
        logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s")
        logging.getLogger("qops").setLevel(logging.DEBUG)
    try:
        run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        note("\nInterrupted.")
        return console.EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) is gone. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return console.EXIT_BROKEN_PIPE
    except DemoError as error:
        _LOGGER.debug("traceback", exc_info=True)
        note(f"qops.demo: {error}")
        return error.exit_code
    return 0


def run(options: argparse.Namespace) -> None:
    """Everything behind the command line; raises DemoError."""
    clock = Stopwatch()
    clock.lap("Python and torch")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An answer may hold characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="replace")
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    for option in ("model", "tokenizer"):
        given = getattr(options, option)
        if given is not None and not given.exists():
            raise DemoError(f"--{option} {given}: no such file or folder")
    with _no_garbage_collection():
        if options.model is None:
            title, path = artefact.SMOLLM2.title, _prepared_folder(clock)
        else:
            title, path = options.model.name, options.model
            _import_model_code()
            clock.lap("imports")
        from qops.demo import proof

        answer_dtype = options.dtype or ANSWER_DTYPE
        model, tokenizer = _load(path, answer_dtype, options), _load_tokenizer(options.tokenizer or path)
        clock.lap("loading")
        rounds_activations = proof.limits_of(model) is proof.INT8
        if options.scheme in _ROUNDED:
            model = _rounded(model, options.scheme)
            clock.lap("quantising")

    isa = qops.build_info()["isa"]
    print(f"{title}, qops {qops.__version__}, {answer_dtype}, {isa}, {torch.get_num_threads()} threads\n")
    if options.scheme in _ROUNDED:
        print(f"{_ROUNDED[options.scheme]};")
        print("the dense model it is compared with has the weights as stored.\n")
    elif rounds_activations:
        print("W8A8: activations are rounded to 8 bits, as the checkpoint says; those of the dense model are not.\n")
    prompt_ids = _answer(model, tokenizer, options, clock)
    if not options.no_compare:
        text_ids = _passage_ids(model, tokenizer)
        del model
        timing_dtype = options.dtype or TIMING_DTYPE
        half_top = _compare_speed(path, prompt_ids, text_ids, timing_dtype, options)
        _compare_accuracy(path, text_ids, half_top, timing_dtype, options)


class Stopwatch:
    """Splits the time since the process started into named laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.total = 0.0

    def lap(self, name: str) -> None:
        now = console.seconds_since_process_start()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.total
        self.total = now

    def text(self) -> str:
        return ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.laps.items())


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """The collector would run hundreds of times over objects that imports make and keep: 0.5 s of their 2.5 s."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _prepared_folder(clock: Stopwatch) -> Path:
    """The cached model folder, made if need be. The cached files' digests are computed while transformers imports."""
    from qops.formats.folder import FORMAT_VERSION

    cache = artefact.Cache()
    with ThreadPoolExecutor(max_workers=1) as pool:
        # Of another version of qops, or of folders, it is made again.
        version = f"{qops.__version__}, folders {FORMAT_VERSION}"
        is_valid = pool.submit(cache.prepared_is_valid, version)
        _import_model_code()
        clock.lap("imports")
        if not is_valid.result():
            cache.ensure_prepared(_prepare, version)
            clock.lap("fetching and preparing the model")
    return cache.prepared


def _import_model_code() -> None:
    """Import everything slow in one place, so that it is timed as imports and a missing package is one sentence."""
    # Nothing in the demo is to reach the hub: a local model answers the same with and without a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        require_transformers("qops.demo")
        for name in (
            "transformers.models.llama.modeling_llama",
            "qops.models.load",
            "qops.demo.chat",
            "qops.demo.proof",
        ):
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "qops":
            raise
        raise DemoError(f"the package {error.name!r} is missing: pip install 'qops[demo]'") from error
    except ImportError as error:
        raise DemoError(str(error)) from error


def _prepare(gguf: Path, folder: Path) -> None:
    from qops.models import load_model, load_tokenizer, save_model

    # float32 keeps the norms and the embedding's scales as the file has them, whatever dtype later starts ask for.
    save_model(load_model(gguf, dtype=torch.float32), folder)
    load_tokenizer(gguf).save_pretrained(folder)


def _load(path: Path, dtype: str, options: argparse.Namespace) -> Any:
    from qops.models import load_model

    try:
        return load_model(path, dtype=DTYPES[dtype], zero_add=options.zero_add, symmetric=options.symmetric)
    except (ValueError, RuntimeError, NotImplementedError, LookupError, OSError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise DemoError(f"cannot load {path}: {reason}") from error


def _load_tokenizer(path: Path) -> Any:
    from qops.models import load_tokenizer

    try:
        tokenizer = load_tokenizer(path)
    # A folder without one raises this or that, by the class that the config makes it look for.
    except (ValueError, LookupError, OSError, TypeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).removeprefix(f"{path}: ").split())
        raise DemoError(f"no tokenizer in {path}; --tokenizer says where it is: {reason}") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        kind = type(tokenizer).__name__
        raise DemoError(f"the tokenizer in {path} must be one of the tokenizers library, got {kind}")
    return tokenizer


def _rounded(model: Any, scheme: str) -> Any:
    """The same model with its decoder's linears in a scheme; the table of the embedding and the output layer stays."""
    from qops.models import dense_model, quantize_model

    quantised = quantize_model(dense_model(model, model.dtype), scheme)
    quantised.set_input_embeddings(model.get_input_embeddings())
    quantised.set_output_embeddings(model.get_output_embeddings())
    return quantised


def _answer(model: Any, tokenizer: Any, options: argparse.Namespace, clock: Stopwatch) -> list[int]:
    """Stream the answer to stdout, report the time to its first token and prove it. Returns the prompt's ids."""
    from qops.demo import chat, proof
    from qops.demo.compare import generate, sampler

    prompt_ids = chat.prompt_ids(tokenizer, options.prompt)
    stop_ids = chat.stop_ids(tokenizer, model)
    context = model.config.max_position_embeddings
    room = context - len(prompt_ids)
    if not prompt_ids or room < 1:
        raise DemoError(f"the prompt has {len(prompt_ids)} tokens; this model takes 1 ... {context - 1}")
    if max(prompt_ids) >= model.config.vocab_size:
        raise DemoError(
            f"the tokenizer is another model's: it has made token {max(prompt_ids)}, and this model knows "
            f"{model.config.vocab_size}"
        )
    limit = min(options.max_new_tokens, room)
    answer: list[int] = []
    rows: list[torch.Tensor] = []
    endless = generate(model, prompt_ids, proof.recorded(sampler(options.temperature, options.seed), rows))

    def tokens() -> Iterator[int]:
        for token in itertools.islice(endless, limit):
            if not answer:
                clock.lap(f"prompt of {len(prompt_ids)} tokens")
            answer.append(token)
            if token in stop_ids:
                return
            yield token

    print(f"> {options.prompt}", flush=True)
    with console.warnings_afterwards():
        for text in chat.stream(tokenizer, tokens()):
            print(text, end="", flush=True)
    spent = console.seconds_since_process_start() - clock.total
    stopped = "" if answer[-1] in stop_ids else f"\n[stopped after {len(answer)} tokens]"
    print(f"{stopped}\n")
    rate = f", then {(len(answer) - 1) / spent:.1f} tokens/s" if len(answer) > 1 else ""
    print(f"First token {clock.total:.2f} s after the process started{rate}.")
    print(f"({clock.text()} s)", flush=True)
    more = itertools.islice(endless, max(0, min(proof.LEAST_TOKENS, room) - len(answer)))
    print(proof.prove(model, tokenizer, prompt_ids, [*answer, *more], rows, options.temperature > 0), flush=True)
    return prompt_ids


def _passage_ids(model: Any, tokenizer: Any) -> list[int]:
    from qops.demo.chat import text_ids
    from qops.demo.compare import PASSAGE_TOKENS, passage

    return text_ids(tokenizer, passage())[: min(PASSAGE_TOKENS, model.config.max_position_embeddings)]


def _compare_speed(
    path: Path, prompt_ids: list[int], text_ids: list[int], dtype: str, options: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Print the speed table. Returns the most likely ids of both models over the passage; None in float32."""
    from qops.demo import compare
    from qops.models import dense_model

    rounds = options.rounds
    note(f"\nTiming against a dense {dtype} model of the same weights, {rounds} interleaved rounds ...")
    model = _load(path, dtype, options)
    dense = dense_model(model, dtype=DTYPES[dtype])
    if options.scheme in _ROUNDED:
        model = _rounded(model, options.scheme)
    context = model.config.max_position_embeddings
    prefill_ids = text_ids[: min(compare.PREFILL_TOKENS, context - 1)]
    decode_tokens = min(compare.DECODE_TOKENS, context - len(prompt_ids))
    decode = compare.interleave(
        lambda: compare.decode_rate(model, prompt_ids, decode_tokens),
        lambda: compare.decode_rate(dense, prompt_ids, decode_tokens),
        rounds,
    )
    prefill = compare.interleave(
        lambda: compare.prefill_rate(model, prefill_ids),
        lambda: compare.prefill_rate(dense, prefill_ids),
        rounds,
    )
    weight_bytes = compare.weight_bytes(model), compare.weight_bytes(dense)
    print(f"\nSpeed: batch 1, greedy, KV cache, {rounds} interleaved rounds of {decode_tokens} tokens")
    print(compare.speed_table(dtype, decode, prefill, len(prefill_ids), weight_bytes), flush=True)
    if dtype == "fp32":
        return None
    return (
        compare.passage_logits(model, text_ids).argmax(-1),
        compare.passage_logits(dense, text_ids).argmax(-1),
    )


def _compare_accuracy(
    path: Path,
    text_ids: list[int],
    half_top: tuple[torch.Tensor, torch.Tensor] | None,
    dtype: str,
    options: argparse.Namespace,
) -> None:
    """Print the accuracy table. The float32 models are loaded here, one at a time."""
    from qops.demo import compare
    from qops.models import dense_model

    note(f"\nComparing logits over {len(text_ids):,} tokens ...")

    def ours() -> Any:
        model = _load(path, "fp32", options)
        return _rounded(model, options.scheme) if options.scheme in _ROUNDED else model

    result = compare.accuracy(
        text_ids,
        ours,
        lambda: dense_model(_load(path, "fp32", options), dtype=torch.float32),
        half_top,
    )
    print(f"\nAccuracy: the first {result.tokens:,} tokens of {compare.PASSAGE_TITLE}, float32 activations")
    print(compare.accuracy_table(dtype, result), flush=True)
