"""The table of checkpoints in README.md is that of the recorded results, and its tests exist."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support import compatibility
from tests.support.compatibility import README, RECORD, ROOT, ROWS


def test_the_table_is_what_was_recorded():
    text, record = README.read_text(), json.loads(RECORD.read_text())
    assert compatibility.written(text, record) == text, "python -m tests.support.compatibility --render"
    assert [*record] == [row.name for row in ROWS]
    for row in ROWS:
        assert record[row.name]["exact"] and record[row.name]["model"], row.name
        assert ("package" in record[row.name]) == bool(row.package), row.name


def test_every_claim_has_tests():
    """Those that CI runs: a claim whose tests were renamed is no claim."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    done = subprocess.run([*command, "tests/formats", "tests/integrations"], cwd=ROOT, capture_output=True, text=True)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    assert done.returncode == 0 and len(names) > 500, done.stdout[-2000:] + done.stderr[-2000:]
    compatibility.shown(dict.fromkeys(names, "skipped"))
    with pytest.raises(ValueError, match="no test is named"):
        compatibility.shown({name: "skipped" for name in names if "test_gptq_of_8_bits" not in name})
    with pytest.raises(ValueError, match=r"GPTQ, 8 bits: a test of .* failed"):
        compatibility.shown({name: "failed" if "test_gptq_of_8_bits" in name else "skipped" for name in names})
