"""The demo's proof: right answers pass in every dtype and scheme, planted faults and near misses do not."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import qops.models
import qops.models.proof
from qops.demo import chat, cli, compare, console, proof
from qops.demo.console import DemoError
from qops.models import dense_model, load_model, load_tokenizer
from qops.models.decoder import DecoderLayer, fused_class
from qops.nn import MLP
from tests.support.models.demo_models import byte_tokenizer, write_folder

WAYS = {
    "float32": [],
    "bfloat16": ["--dtype", "bf16"],
    "float16": ["--dtype", "fp16"],
    "int8": ["--scheme", "int8"],
    "int8 in bfloat16": ["--scheme", "int8", "--dtype", "bf16"],
    "w4a8 in bfloat16": ["--scheme", "w4a8", "--dtype", "bf16"],
    "drawn": ["--temperature", "1"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("demo") / "model", byte_tokenizer())


@pytest.fixture(scope="module")
def int8_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("demo") / "model", byte_tokenizer(), "int8")


def run(folder, *more: str) -> int:
    return cli.main(["--model", str(folder), "--no-compare", "--prompt", "he", *more])


def proven(capsys) -> str:
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Proven: "))
    return line


# What passes


@pytest.mark.parametrize("way", WAYS)
def test_a_right_answer_is_proven(folder, capsys, way):
    # An answer of 5 tokens: the proof goes on behind it.
    assert run(folder, *WAYS[way], "--max-new-tokens", "5") == 0
    line = proven(capsys)
    if way == "float32":
        assert line.startswith("Proven: 64 greedy tokens equal those of a dense float32 model of these weights (")
        assert float(re.search(r"\(logits at most (\S+) apart\)\.$", line)[1]) < 1e-4
    elif way == "drawn":
        assert line.startswith("Proven: 64 drawn tokens: the most likely one in each place equals that of a dense ")
    else:
        same = int(re.match(r"Proven: (?:64|(\d+) of 64) greedy tokens equal those ", line)[1] or 64)
        assert same > 48
        assert ("finds each of the others at least 0." in line) == (same < 64)


def test_a_folder_of_int8_is_measured_as_int8(int8_folder, capsys):
    """Not by what the command line calls it: `stored` here, with 8-bit activations all the same."""
    assert run(int8_folder) == 0
    assert float(re.search(r"logits at most (\S+) apart", proven(capsys))[1]) > proof.FLOAT32.difference


def test_all_of_a_longer_answer_is_proven(folder, capsys):
    assert run(folder, "--max-new-tokens", "80") == 0
    assert proven(capsys).startswith("Proven: 80 greedy tokens ")


def test_the_proof_ends_at_the_context_and_at_the_memory_that_it_takes(folder, capsys, monkeypatch):
    assert run(folder, "--prompt", "x" * 100) == 0
    assert proven(capsys).startswith(f"Proven: {128 - 108} greedy tokens ")
    monkeypatch.setattr(proof, "MOST_TOKENS", 9)
    assert run(folder) == 0
    assert proven(capsys).startswith("Proven: 9 greedy tokens ")


def test_what_is_proven_is_what_transformers_generates(folder):
    """One forward over the answer says the same as generating it: so it may stand for that."""
    model, prompt_ids = load_model(folder, torch.float32), chat.prompt_ids(load_tokenizer(folder), "he")
    rows: list[torch.Tensor] = []
    ours = list(itertools.islice(compare.generate(model, prompt_ids, proof.recorded(compare.greedy, rows)), 64))
    dense = dense_model(model, torch.float32)
    want = dense.generate(torch.tensor([prompt_ids]), max_new_tokens=64, do_sample=False, pad_token_id=0)[0]
    assert [*prompt_ids, *ours] == want.tolist()
    assert [int(row.argmax()) for row in rows] == ours


# Planted faults


def cache_is_forgotten(patch):
    # The class in use: Transformers may have wrapped what it inherits.
    layer = fused_class(DecoderLayer, LlamaDecoderLayer)
    whole = layer.forward

    def forward(self, *args, **kwargs):
        kept = {key: value for key, value in kwargs.items() if key not in ("cache", "past_key_values")}
        return whole(self, *args, **kept)

    patch.setattr(layer, "forward", forward)


def cached_steps_are_rotated_too_far(patch):
    whole = qops.models.rotary_tables.RotaryTables.forward

    def forward(self, x, position_ids, *more):
        return whole(self, x, position_ids + (position_ids.shape[1] == 1), *more)

    patch.setattr(qops.models.rotary_tables.RotaryTables, "forward", forward)


def residual_is_forgotten(patch):
    patch.setattr(DecoderLayer, "_known_halves", lambda self: None)  # block operators have no use for a forward
    whole = MLP.forward

    def forward(self, x, residual=None):
        return whole(self, x, None if residual is None else torch.zeros_like(residual))

    patch.setattr(MLP, "forward", forward)


@pytest.mark.parametrize(
    ("fault", "way"),
    # The last is less than what 8-bit activations do to this model.
    [
        *itertools.product((cache_is_forgotten, residual_is_forgotten), WAYS),
        (cached_steps_are_rotated_too_far, "float32"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_wrong_answer_fails(folder, capsys, monkeypatch, fault, way):
    # Loading would notice too, and not fuse these layers.
    monkeypatch.setattr(
        qops.models.proof, "prove_fusion", lambda *args: qops.models.proof.Proof("not looked at", None, {})
    )
    fault(monkeypatch)
    assert run(folder, *WAYS[way], "--max-new-tokens", "5") == console.EXIT_FAILED
    captured = capsys.readouterr()
    assert "Proven" not in captured.out
    said = "the most likely token of qops is" if way == "drawn" else "qops says"
    number = r"-?\d+\.\d{3}"
    assert re.fullmatch(
        r"qops\.demo: the answer is not that of the dense float32 model: they part at token \d+ of 64, where "
        rf"{said} '.*', logits {number} \(qops\) and {number} \(dense\), "
        rf"and the dense model '.*', logits {number} \(qops\) and {number} \(dense\)\n",
        captured.err,
    )


# Near misses: a dense model whose logits are given


@pytest.fixture
def judged(monkeypatch):
    """The verdict on logits of ours and of the dense model, [tokens, V]; greedy tokens."""

    def judge(ours: torch.Tensor, dense: torch.Tensor, dtype: torch.dtype = torch.float32, drawn: bool = False) -> str:
        def twin(input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> SimpleNamespace:
            assert input_ids.tolist() == [[7, 8, 9, *answer[:-1]]]
            return SimpleNamespace(logits=dense[None, -logits_to_keep:])

        monkeypatch.setattr(qops.models, "dense_model", lambda model, dtype: twin)
        answer = ours.argmax(-1).tolist()
        model = SimpleNamespace(dtype=dtype, modules=lambda: ())
        tokenizer = SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")
        return proof.prove(model, tokenizer, [7, 8, 9], answer, list(ours), drawn)

    return judge


def logits(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def test_where_they_part(judged):
    ours, dense = logits((2, 1, 0), (0, 2.5, 1), (1, 0, 0)), logits((2, 1, 0), (0, 1.25, 1.5), (0, 1, 0))
    with pytest.raises(DemoError) as caught:
        judged(ours, dense)
    assert caught.value.exit_code == 1
    assert str(caught.value) == (
        "the answer is not that of the dense float32 model: they part at token 2 of 3, where qops says '<1>', "
        "logits 2.500 (qops) and 1.250 (dense), and the dense model '<2>', logits 1.000 (qops) and 1.500 (dense)"
    )


@pytest.mark.parametrize("place", [0, 1, 5])
def test_each_place_counts(judged, place):
    dense = torch.eye(6)
    ours = dense.clone()
    ours[place] = ours[place].roll(1)
    with pytest.raises(DemoError, match=f"they part at token {place + 1} of 6, "):
        judged(ours, dense)


def test_ties_of_float32(judged):
    """A difference that float32 does not resolve decides nothing; one that it does resolve is an error."""
    assert judged(logits((1, 1.0001)), logits((1.0001, 1))).startswith(
        "Proven: 0 of 1 greedy tokens equal those of a dense float32 model of these weights, "
        "which finds each of the others at least 0.99 times as likely as its own (logits at most 1.0e-04 apart)."
    )
    with pytest.raises(DemoError, match="they part at token 1"):
        judged(logits((1, 1.002)), logits((1.002, 1)))


def test_half_precision_may_take_what_is_half_as_likely(judged):
    ours, behind = logits((0, 1)), math.log(2)
    said = judged(ours, logits((behind - 0.01, 0)), torch.bfloat16)
    assert "0 of 1 greedy tokens" in said and "at least 0.50 times as likely" in said
    with pytest.raises(DemoError, match="they part at token 1"):
        judged(ours, logits((behind + 0.01, 0)), torch.bfloat16)


def test_equal_tokens_with_other_logits_are_not_proven(judged):
    """In float32, where rounding does not explain it."""
    dense = logits((0, 1, 2), (3, 0, 0))
    off = dense + logits((0, 0, 0), (0, 0.02, 0))
    with pytest.raises(DemoError, match=r"not proven: its logits are 2\.00e-02 from .*, more than the 1e-02 that"):
        judged(off, dense)
    assert judged(off, dense, torch.bfloat16).endswith("(logits at most 2.0e-02 apart).")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_logits_that_are_no_numbers_are_not_proven(judged, dtype, value):
    ours, dense = logits((0, 1, 2), (3, 0, 0)), logits((0, 1, 2), (3, 0, 0))
    ours[0, 0] = value
    with pytest.raises(DemoError, match=r"not proven|they part"):
        judged(ours, dense, dtype)


def test_drawn_tokens_are_compared_by_the_most_likely(judged):
    ours = logits((0, 1, 2), (3, 0, 0))
    said = judged(ours, ours, drawn=True)
    assert said.startswith("Proven: 2 drawn tokens: the most likely one in each place equals that of a dense float32 ")


# What stands around the answer


def test_generating_warns_of_nothing(folder):
    """Whatever the installed Transformers calls the cache."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(itertools.islice(compare.generate(load_model(folder, torch.float32), [5, 6]), 3))


def test_a_model_without_a_known_cache_is_one_sentence():
    class Other:
        def forward(self, input_ids, cache_params=None): ...

    with pytest.raises(DemoError, match=r"^Other takes no KV cache by a name that the demo knows$"):
        next(compare.generate(Other(), [1]))


def test_warnings_come_behind_the_answer(folder, monkeypatch, capsys):
    generate = compare.generate

    def warns(*args):
        for token in generate(*args):
            warnings.warn("renamed", FutureWarning, stacklevel=1)
            yield token

    monkeypatch.setattr(compare, "generate", warns)
    shown: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(capsys.readouterr().out))
    assert run(folder, "--max-new-tokens", "5") == 0
    assert shown and "[stopped after" not in shown[0] and len(shown[0].partition("> he\n")[2]) >= 5


def test_warnings_are_shown_where_an_answer_fails():
    with pytest.warns(FutureWarning, match="renamed"), pytest.raises(ValueError, match="x"):  # noqa: SIM117
        with console.warnings_afterwards():
            warnings.warn("renamed", FutureWarning, stacklevel=1)
            raise ValueError("x")
