"""The table of checkpoints in README.md, from results of tests: ``python -m tests.support.compatibility``

Runs the tests of formats and integrations here, and writes what passed to ``tests/data/compatibility.json`` and to
README.md, between its markers. Tests that need a package or real checkpoints which are not here are skipped, and what
they had shown before stays; one that fails ends it. ``--render`` runs nothing and writes the table of what is recorded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests/data/compatibility.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- checkpoints: python -m tests.support.compatibility -->", "<!-- end of checkpoints -->"


@dataclass(frozen=True)
class Row:
    """A kind of checkpoint, and the tests, by patterns of their names, that show what is said of it.

    Attributes:
        name: as its users call it.
        operator: what multiplies.
        exact: every weight has the bits of the written definition.
        model: a whole model has the logits of its exact weights, or of its producer's runtime.
        package: that agrees, with its name on PyPI; or whose real checkpoints agree.
        agrees: shows that.
    """

    name: str
    operator: str
    exact: str
    model: str
    package: str = ""
    agrees: str = ""


_REAL = r"test_real_checkpoints_are_read_to_the_bit\[{}"
_FOLDER = r"test_a_model_of_each_format_has_the_logits_of_its_exact_weights\[\d-{}\]"
_EVERY = r"test_package_folders.*test_every_weight_is_exact\[\d-{}"
_EACH = r"test_package_folders.*test_a_model_of_each\[{}"
_SAVED = r"test_a_saved_model\[{}"
_INT4_BLOCKS, _INT8_BLOCKS = "(Q4_0|Q4_1|Q4_K|Q2_K|Q3_K)", "(Q8_0|Q5_0|Q5_1|Q5_K|Q6_K)"

ROWS = (
    Row(
        "GPTQ version 1, 4 bits",
        "int4_gemm",
        r"test_gptq_of_4_bits\[False-.*-1\]|test_gptq_zero_points_of_0",
        _FOLDER.format("gptq"),
        "gptqmodel 7.6.0",
        _REAL.format("gptq_v1_sym_g128"),
    ),
    Row(
        "GPTQ version 2, 4 bits",
        "int4_gemm",
        r"test_gptq_of_4_bits\[False-.*-2\]",
        _FOLDER.format("gptq version 2"),
        "gptqmodel 7.6.0",
        _REAL.format("gptq_v2_asym_g32"),
    ),
    Row(
        "GPTQ in act-order",
        "int4_gemm",
        r"test_gptq_of_4_bits\[True-",
        _FOLDER.format("gptq act-order"),
        "gptqmodel 7.6.0",
        _REAL.format("gptq_v1_sym_g64_desc_act"),
    ),
    Row("GPTQ, 8 bits", "int8_weight_only_gemm", r"test_gptq_of_8_bits", _FOLDER.format("gptq 8 bits.*")),
    Row(
        "AWQ gemm",
        "int4_gemm",
        r"test_awq\[.*gemm\]",
        _FOLDER.format("awq gemm"),
        "auto-round 0.16.1",
        _REAL.format("awq_gemm_asym"),
    ),
    Row("AWQ gemv", "int4_gemm", r"test_awq\[.*gemv\]", _FOLDER.format("awq gemv")),
    Row(
        "AWQ gemv_fast",
        "int4_gemm",
        r"test_awq\[.*gemv_fast\]",
        _FOLDER.format("awq gemv_fast"),
        "autoawq",
        r"test_awq_as_its_own_package_packs",
    ),
    Row(
        "compressed-tensors, 4 bits",
        "int4_gemm",
        r"test_compressed_tensors_packed\[.*-4\]",
        _FOLDER.format("compressed-tensors( asymmetric| channel)?"),
        "compressed-tensors",
        r"test_the_package_finds_every_weight|" + _REAL.format("ct_w4a16"),
    ),
    Row(
        "compressed-tensors, 8-bit weights",
        "int8_weight_only_gemm",
        r"test_compressed_tensors_packed\[.*-8\]|test_compressed_tensors_of_integers",
        _FOLDER.format("compressed-tensors (8 bits|integers)"),
        "compressed-tensors",
        r"test_the_package_finds_every_weight\[.*8 bits",
    ),
    Row(
        "compressed-tensors, W8A8",
        "int8_gemm",
        r"test_compressed_tensors_of_integers",
        r"test_w8a8_keeps_weights_and_static_scales",
        "llmcompressor 0.14.0.1",
        _REAL.format("ct_w8a8") + r"|test_the_layers_of_a_real_w8a8_checkpoint",
    ),
    Row(
        "GGUF Q4_0, Q4_1, Q2_K, Q3_K, Q4_K",
        "int4_gemm",
        rf"test_blocks_of_the_fixture_are_exact\[{_INT4_BLOCKS}\]",
        r"test_logits_are_those_of_llama_cpp|test_gguf_architectures",
        "ik-llama-cpp-python",
        rf"test_random_blocks_are_what_libggml_makes_of_them\[{_INT4_BLOCKS}\]|test_files_of_llama_quantize",
    ),
    Row(
        "GGUF Q5_0, Q5_1, Q8_0, Q5_K, Q6_K",
        "int8_weight_only_gemm",
        rf"test_blocks_of_the_fixture_are_exact\[{_INT8_BLOCKS}\]",
        r"test_logits_are_those_of_llama_cpp|test_gguf_architectures",
        "ik-llama-cpp-python",
        rf"test_random_blocks_are_what_libggml_makes_of_them\[{_INT8_BLOCKS}\]|test_files_of_llama_quantize",
    ),
    Row("HQQ, 4 bits", "int4_gemm", _EVERY.format("hqq 4"), _EACH.format("hqq 4"), "hqq", _SAVED.format("hqq")),
    Row(
        "HQQ, 8 bits",
        "int8_weight_only_gemm",
        _EVERY.format("hqq 8"),
        _EACH.format("hqq 8"),
        "hqq",
        r"test_package\[hqq_int8",
    ),
    Row(
        "quanto qint4",
        "int4_gemm",
        _EVERY.format("quanto qint4"),
        _EACH.format("quanto qint4"),
        "optimum-quanto",
        _SAVED.format("quanto_qint4"),
    ),
    Row(
        "quanto qint8",
        "int8_weight_only_gemm",
        _EVERY.format("quanto qint8"),
        _EACH.format("quanto qint8"),
        "optimum-quanto",
        _SAVED.format("quanto_qint8"),
    ),
    Row(
        "bitsandbytes, 8 bits",
        "int8_weight_only_gemm",
        _EVERY.format("bitsandbytes"),
        _EACH.format("bitsandbytes"),
        "bitsandbytes",
        _SAVED.format("bitsandbytes"),
    ),
    Row(
        "torchao Int8Tensor, weights alone",
        "int8_weight_only_gemm",
        _EVERY.format(r"torchao Int8Tensor\]"),
        _EACH.format(r"torchao Int8Tensor\]"),
        "torchao",
        _SAVED.format("torchao_weight_only"),
    ),
    Row(
        "torchao Int8Tensor, W8A8",
        "int8_gemm",
        _EVERY.format("torchao Int8Tensor dynamic"),
        _EACH.format("torchao Int8Tensor dynamic"),
        "torchao",
        _SAVED.format("torchao_dynamic"),
    ),
    Row(
        "torchao Intx of 4 bits",
        "int4_gemm",
        _EVERY.format("torchao IntxUnpacked"),
        _EACH.format("torchao IntxUnpacked"),
        "torchao",
        r"test_package\[torchao_intx",
    ),
    Row("torchao Int4Tensor", "int4_gemm", _EVERY.format("torchao Int4Tensor"), _EACH.format("torchao Int4Tensor")),
    Row(
        "lmdeploy smooth_quant",
        "int8_gemm",
        _EVERY.format("smooth_quant"),
        _EACH.format("smooth_quant"),
        "lmdeploy",
        _SAVED.format("lmdeploy"),
    ),
    Row(
        "ModelOpt W4A16_AWQ",
        "int4_gemm",
        _EVERY.format("modelopt (W4A16_AWQ|smoothed)"),
        _EACH.format("modelopt (W4A16_AWQ|smoothed)"),
        "nvidia-modelopt",
        _SAVED.format("modelopt_(int4|awq)"),
    ),
    Row(
        "ModelOpt W8A16",
        "int8_weight_only_gemm",
        _EVERY.format("modelopt W8A16"),
        _EACH.format("modelopt W8A16"),
        "nvidia-modelopt",
        _SAVED.format("modelopt_int8"),
    ),
    Row(
        "ModelOpt W8A8_SQ_PER_CHANNEL",
        "int8_gemm",
        _EVERY.format("modelopt W8A8"),
        _EACH.format("modelopt W8A8"),
        "nvidia-modelopt",
        _SAVED.format("modelopt_s"),
    ),
)


class Outcomes:
    """A plugin of pytest: how each test ended."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.of[report.nodeid] = report.outcome


def shown(outcomes: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What passed of each row; a claim of which nothing ran is left out."""
    found: dict[str, dict[str, Any]] = {}
    for row in ROWS:
        said: dict[str, Any] = {}
        for claim, pattern in (("exact", row.exact), ("model", row.model), ("agrees", row.agrees)):
            ended = [outcome for name, outcome in outcomes.items() if pattern and re.search(pattern, name)]
            if pattern and not ended:
                raise ValueError(f"{row.name}: no test is named {pattern}")
            if "failed" in ended:
                raise ValueError(f"{row.name}: a test of {pattern} failed")
            if "passed" in ended:
                said[claim] = ended.count("passed")
                if claim == "agrees":
                    said["package"] = _version(row.package)
        found[row.name] = said
    return found


def _version(package: str) -> str:
    """With the version that is installed, where it does not have one already."""
    return package if " " in package else f"{package} {importlib.metadata.version(package)}"


def table(record: Mapping[str, Mapping[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| checkpoint | operator | weights to the bit | whole model | agrees with |", "|---|---|---|---|---|"]
    for row in ROWS:
        said = record[row.name]
        cells = ["yes" if said.get(claim) else "no" for claim in ("exact", "model")]
        lines.append(f"| {row.name} | `{row.operator}` | {' | '.join(cells)} | {said.get('package', '(definition)')} |")
    return "\n".join(lines)


def written(readme: str, record: Mapping[str, Mapping[str, Any]]) -> str:
    """README.md with the table of a record."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(record)}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--render", action="store_true", help="the table of what is recorded")
    arguments = parser.parse_args()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if not arguments.render:
        outcomes = Outcomes()
        tests = ["tests/formats", "tests/integrations"]
        code = pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not slow", *tests], plugins=[outcomes])
        if code != pytest.ExitCode.OK:
            return int(code)
        record = {name: record.get(name, {}) | said for name, said in shown(outcomes.of).items()}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    README.write_text(written(README.read_text(), record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
