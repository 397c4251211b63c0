"""The demo from its command line, on a tiny model: arguments, messages, exit codes, answer, tables."""

from __future__ import annotations

import gc
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from qops.demo import artefact, chat, cli, compare, console
from qops.demo.console import DemoError, Progress
from qops.models import dense_model, load_model
from qops.models.replacement import is_replaced
from tests.support.formats import folders
from tests.support.formats.folders import write_as
from tests.support.models.demo_models import byte_tokenizer, write_folder
from tests.support.models.gguf_files import HIDDEN, llama_file

# Terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_rewrites_one_line():
    terminal = Terminal()
    with Progress("Fetching", 1_000_000, terminal) as progress:
        progress._last_drawn = float("-inf")
        progress.update(500_000)
    drawn = terminal.getvalue()
    assert drawn.count("\n") == 1
    assert "\r\033[KFetching, 1.0 MB: 50 %" in drawn
    assert drawn.endswith("\r\033[KFetching, 1.0 MB: done\n")


def test_progress_in_a_log_is_ten_dots_and_never_goes_back():
    log = io.StringIO()
    with Progress("Fetching", 1000, log) as progress:
        for done in (0, 99, 100, 550, 0, 560, 5000):
            progress.update(done)
    assert log.getvalue() == "Fetching .......... done\n"


def test_progress_of_a_failure_ends_its_line_without_done():
    log = io.StringIO()
    with pytest.raises(ValueError, match="x"), Progress("Fetching", 1000, log):
        raise ValueError("x")
    assert log.getvalue() == "Fetching \n"


def test_process_age_counts_the_interpreter_start():
    code = "import time; time.sleep(0.3); import qops.demo.console as c; print(c.seconds_since_process_start())"
    start = time.monotonic()
    shown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.3 <= shown <= time.monotonic() - start + 0.05


# Command line


def test_defaults():
    options = cli.build_parser().parse_args([])
    assert options.prompt == "What is the capital of France?"
    assert (options.dtype, options.temperature, options.rounds, options.model) == (None, 0.0, 5, None)
    assert not options.no_compare


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-new-tokens", "0"],
        ["--threads", "0"],
        ["--threads", "two"],
        ["--rounds", "-1"],
        ["--seed", "-1"],
        ["--seed", str(2**63)],
        ["--temperature", "-0.1"],
        ["--temperature", "inf"],
        ["--temperature", "nan"],
        ["--dtype", "int8"],
        ["--unknown"],
        ["stray"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m qops.demo" in capsys.readouterr().err


def test_help_names_every_option_and_exit_code(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "--prompt",
        "--max-new-tokens",
        "--threads",
        "--seed",
        "--dtype",
        "--model",
        "--no-compare",
        "--rounds",
    ):
        assert option in text
    assert "exit status" in text


def test_a_missing_model_is_one_sentence(capsys, tmp_path):
    assert cli.main(["--model", str(tmp_path / "none.gguf")]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"qops.demo: --model {tmp_path / 'none.gguf'}: no such file or folder\n"
    assert captured.out == ""


def test_a_file_that_is_no_model_is_one_sentence(capsys, tmp_path):
    path = tmp_path / "text.gguf"
    path.write_text("not a model")
    assert cli.main(["--model", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"qops.demo: cannot load {path}: ")
    assert error.count(str(path)) == 1
    assert "Traceback" not in error


def test_a_missing_package_is_one_sentence(capsys, monkeypatch, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("")

    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers.models")

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    assert cli.main(["--model", str(path)]) == 1
    assert "package 'tokenizers.models' is missing: pip install 'qops[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (DemoError("no model", 3), 3), (DemoError("failed"), 1)],
)
def test_exit_codes(monkeypatch, capsys, error, code):
    def fail(options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "run", fail)
    assert cli.main([]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    def fail(options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "run", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main([])


def test_a_closed_pipe_is_silent():
    code = (
        "import sys, qops.demo.cli as cli\n"
        "cli.run = lambda options: [print('line') for _ in range(100000)]\n"
        "sys.exit(cli.main([]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == console.EXIT_BROKEN_PIPE


def test_interrupting_a_download_ends_pip_and_leaves_nothing(tmp_path):
    # pip waits for a server that accepts and never answers; SIGINT goes to the demo alone, not to its process group.
    import socket

    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(120)
    code = (
        "import sys, pathlib, qops.demo.cli as cli, qops.demo.artefact as artefact\n"
        "cli.run = lambda options: artefact.Cache(artefact.SMOLLM2, pathlib.Path(sys.argv[1])).ensure_gguf()\n"
        "sys.exit(cli.main([]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment["PIP_CONFIG_FILE"] = os.devnull
    environment["PIP_INDEX_URL"] = f"http://127.0.0.1:{server.getsockname()[1]}/simple"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True, env=environment
    )
    connection, _ = server.accept()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == console.EXIT_INTERRUPTED
    assert "Traceback" not in error and "Interrupted." in error
    assert sorted(path.name for path in (tmp_path / artefact.SMOLLM2.slug).iterdir()) == [".lock"]
    # The far end of pip's connection is closed, so pip is gone.
    connection.settimeout(10)
    while connection.recv(4096):
        pass
    connection.close()
    server.close()


# Tokenizer


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def test_the_prompt_goes_through_the_chat_template(tokenizer):
    ids = chat.prompt_ids(tokenizer, "he?")
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<|im_start|>", "u", "s", "e", "r", "Ġ", "he", "?", "<|im_end|>", "<|im_start|>"
    ]  # fmt: skip


def test_without_a_template_the_prompt_is_plain_text(tokenizer):
    tokenizer.chat_template = None
    assert tokenizer.convert_ids_to_tokens(chat.prompt_ids(tokenizer, "he?")) == ["he", "?"]


def test_stream_holds_a_character_back_until_it_is_whole(tokenizer):
    ids = chat.text_ids(tokenizer, "é<|im_start|>🙂")
    assert list(chat.stream(tokenizer, ids)) == ["", "é", "", "", "", "", "🙂"]


def test_every_declared_end_of_text_stops(tokenizer):
    model = SimpleNamespace(
        config=SimpleNamespace(eos_token_id=7), generation_config=SimpleNamespace(eos_token_id=[0, 8])
    )
    assert chat.stop_ids(tokenizer, model) == {2, 7, 0, 8}
    bare = SimpleNamespace(config=SimpleNamespace(eos_token_id=None), generation_config=None)
    assert chat.stop_ids(tokenizer, bare) == {2}


# The whole run


@pytest.fixture
def folder(tmp_path, tokenizer):
    return write_folder(tmp_path / "model", tokenizer)


@pytest.mark.parametrize("dtype", [None, "fp16", "fp32"])
def test_a_model_folder_answers_and_is_compared(folder, capsys, monkeypatch, dtype):
    monkeypatch.setattr(compare, "DECODE_TOKENS", 3)
    monkeypatch.setattr(compare, "PREFILL_TOKENS", 10)
    arguments = ["--model", str(folder), "--rounds", "1", "--max-new-tokens", "4", "--prompt", "he"]
    assert cli.main([*arguments, "--dtype", dtype] if dtype else arguments) == 0
    captured = capsys.readouterr()
    assert "\n> he\n" in captured.out
    assert f" {dtype or 'fp32'}, " in captured.out.splitlines()[0]
    assert f"dense {dtype or 'bf16'} " in captured.out
    assert "First token" in captured.out and "prefill of 10, tokens/s" in captured.out
    assert "1 interleaved rounds of 3 tokens" in captured.out
    assert "Accuracy: the first 128 tokens of the United States Declaration of Independence (1776)" in captured.out
    assert ("flips the top-1 token" in captured.out) == (dtype != "fp32")
    # Both models hold the same weights in float32: any real difference between them would show here.
    agreeing = next(line for line in captured.out.splitlines() if line.startswith("same top-1"))
    assert "128 of 128 (100.00 %)" in agreeing
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(("scheme", "name", "least", "most"), [("int8", "W8A8", 100, 1), ("w4a8", "W4A8", 64, 8)])
def test_rounding_schemes_answer_and_are_compared(folder, capsys, monkeypatch, scheme, name, least, most):
    monkeypatch.setattr(compare, "DECODE_TOKENS", 3)
    monkeypatch.setattr(compare, "PREFILL_TOKENS", 10)
    arguments = ["--model", str(folder), "--rounds", "1", "--max-new-tokens", "4", "--prompt", "he"]
    assert cli.main([*arguments, "--scheme", scheme]) == 0
    captured = capsys.readouterr()
    assert f"{name}: the decoder's linears in" in captured.out and "quantising" in captured.out
    # Rounding shows, and breaks nothing.
    agreeing = next(line for line in captured.out.splitlines() if line.startswith("same top-1"))
    assert least <= int(re.search(r"(\d+) of 128", agreeing).group(1)) <= 128
    difference = next(line for line in captured.out.splitlines() if line.startswith("max logit difference"))
    assert 1e-3 < float(difference.split()[3]) < most


W8A8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
CHECKPOINTS = {
    "gptq act-order": folders.gptq(act_order=True),
    "awq": folders.awq(),
    "int8 weights": folders.compressed_tensors(bits=8, group_size=-1),
    "W8A8": folders.compressed_tensors(bits=8, group_size=-1, packed=False, inputs=W8A8),
}


@pytest.mark.parametrize("name", [*CHECKPOINTS, "GGUF"])
def test_checkpoints_of_base_models_answer_and_are_compared(tmp_path, tokenizer, capsys, monkeypatch, name):
    """Without a chat template, and with a tokenizer that lies elsewhere."""
    monkeypatch.setattr(compare, "DECODE_TOKENS", 3)
    monkeypatch.setattr(compare, "PREFILL_TOKENS", 10)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    if name == "GGUF":
        file = llama_file(weights="Q5_0")
        table = np.random.default_rng(0).standard_normal((len(tokenizer), HIDDEN)).astype(np.float32)
        file.tensors["token_embd.weight"] = ("Q8_0", table, 0)
        path = file.write(tmp_path / "model.gguf")
    else:
        path = write_as(*CHECKPOINTS[name], vocab_size=len(tokenizer)).write(tmp_path / "model")
    arguments = ["--model", str(path), "--rounds", "1", "--max-new-tokens", "4", "--prompt", "he"]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("qops.demo: ") and error.count("\n") == 1 and "tokenizer" in error
    assert cli.main([*arguments, "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and ("\nW8A8: " in captured.out) == (name == "W8A8")
    proven = next(line for line in captured.out.splitlines() if line.startswith("Proven: "))
    agreeing = next(line for line in captured.out.splitlines() if line.startswith("same top-1"))
    if name == "W8A8":
        assert 100 <= int(re.search(r"(\d+) of 128", agreeing).group(1)) <= 128
    else:
        assert "64 greedy tokens equal" in proven and "128 of 128 (100.00 %)" in agreeing


def test_what_load_model_is_told_the_demo_is_told(tmp_path, tokenizer, capsys):
    written = write_as(*folders.awq(symmetric=True), vocab_size=len(tokenizer))
    arguments = ["--model", str(written.write(tmp_path / "model")), "--no-compare", "--max-new-tokens", "2"]
    tokenizer.save_pretrained(tmp_path / "model")
    assert cli.main(arguments) == 1 and "symmetric=True says so" in capsys.readouterr().err
    assert cli.main([*arguments, "--symmetric"]) == 0
    assert cli.main([*arguments, "--symmetric", "--zero-add", "word"]) == 1
    assert "zero_add has no meaning for checkpoints of AWQ" in capsys.readouterr().err
    assert cli.main([*arguments, "--tokenizer", str(tmp_path / "none")]) == 1
    assert "--tokenizer " in capsys.readouterr().err


def test_a_tokenizer_of_another_library_is_refused(folder, capsys, monkeypatch):
    monkeypatch.setattr("qops.models.load_tokenizer", lambda path: SimpleNamespace())
    assert cli.main(["--model", str(folder), "--no-compare"]) == 1
    assert "must be one of the tokenizers library, got SimpleNamespace" in capsys.readouterr().err


def test_answer_only(folder, capsys):
    assert cli.main(["--model", str(folder), "--no-compare", "--max-new-tokens", "3"]) == 0
    captured = capsys.readouterr()
    assert "[stopped after 3 tokens]" in captured.out
    assert "tokens/s " not in captured.out and captured.err == ""


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_each_model_is_measured_under_its_own_name(folder, capsys, monkeypatch, dtype):
    """Speed and bytes of the quantised model stand in its column, those of the dense one in the other."""

    def rate(of_ours: float, of_dense: float):
        return lambda model, *_: of_ours if is_replaced(model) else of_dense

    monkeypatch.setattr(compare, "decode_rate", rate(30, 10))
    monkeypatch.setattr(compare, "prefill_rate", rate(500, 400))
    assert cli.main(["--model", str(folder), "--rounds", "2", "--max-new-tokens", "1", "--dtype", dtype]) == 0
    lines = capsys.readouterr().out.splitlines()
    decode, prefill, megabytes = (
        next(line for line in lines if line.startswith(name)) for name in ("decode", "prefill", "weights")
    )
    assert decode.split()[2::2] == ["30.0", "10.0", "3.00x"]
    assert prefill.split()[4::2] == ["500.0", "400.0", "1.25x"]
    ours = load_model(folder, cli.DTYPES[dtype])
    want = []
    for model in (ours, dense_model(ours, cli.DTYPES[dtype])):
        once = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
        want.append(sum(once.values()) / 1e6)
    assert megabytes.split()[2:] == [f"{want[0]:.1f}", f"{want[1]:.1f}", f"{want[0] / want[1]:.2f}x"]


@pytest.mark.parametrize("holder", ["config", "generation_config"])
def test_an_answer_ends_at_a_stop_token(folder, tokenizer, capsys, holder):
    """The token is not shown, and the proof goes on behind it."""
    model = load_model(folder, torch.float32)
    ids = list(itertools.islice(compare.generate(model, chat.prompt_ids(tokenizer, "he")), 20))
    end = next(index for index in range(5, 20) if ids[index] not in ids[:index])
    path = folder / f"{holder}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ids[end]}))
    assert cli.main(["--model", str(folder), "--no-compare", "--prompt", "he"]) == 0
    text = capsys.readouterr().out.partition("> he\n")[2]
    assert text.startswith("".join(chat.stream(tokenizer, ids[:end])) + "\n\nFirst token ")
    assert "\nProven: 64 greedy tokens " in text


def test_drawn_answers_follow_the_seed(folder, capsys):
    def answer(seed: int) -> str:
        arguments = ["--model", str(folder), "--no-compare", "--max-new-tokens", "20", "--prompt", "he"]
        assert cli.main([*arguments, "--temperature", "1.5", "--seed", str(seed)]) == 0
        return capsys.readouterr().out.partition("> he\n")[2].partition("First token")[0]

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_threads_are_set(folder, threads):
    threads(2)
    assert cli.main(["--model", str(folder), "--no-compare", "--max-new-tokens", "1", "--threads", "1"]) == 0
    assert torch.get_num_threads() == 1


def test_an_answer_ends_at_the_context(folder, capsys):
    assert cli.main(["--model", str(folder), "--no-compare", "--prompt", "x" * 100, "--max-new-tokens", "500"]) == 0
    prompt_tokens = 100 + 7  # six of "user " and the markers, see the template above
    assert f"[stopped after {128 - prompt_tokens - 1} tokens]" in capsys.readouterr().out
    assert cli.main(["--model", str(folder), "--no-compare", "--prompt", "x" * 200]) == 1
    assert "this model takes 1 ... 127" in capsys.readouterr().err


def test_the_collector_is_on_again(folder):
    assert cli.main(["--model", str(folder), "--no-compare", "--max-new-tokens", "1"]) == 0
    assert gc.isenabled()
