from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qops
from qops.__main__ import main


def test_info(capsys):
    assert main(["info"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    build = qops.build_info()
    assert lines["qops"] == build["version"]
    assert lines["torch"] == f"{torch.__version__} (built with {build['built_with_torch']})"
    assert lines["isa"] == f"{build['isa']} (available: {build['isa_available']})"
    assert lines["python"].startswith(sys.version.split()[0])
    assert lines["build"].startswith("CPU kernels only, ")
    assert lines["cpu"].endswith(" threads")
    assert len([name for name in lines if name.startswith("cuda")]) == torch.cuda.device_count()


def test_info_as_a_command():
    command = [sys.executable, "-m", "qops", "info"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(qops.__file__).parent.parent)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("qops: ")


@pytest.mark.parametrize("arguments", ([], ["explain"], ["info", "more"]), ids=str)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("usage: python -m qops")


def test_unknown_isa_level_is_an_import_error():
    code = f"import sys; sys.path.insert(0, {str(Path(qops.__file__).parent.parent)!r}); import qops"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "QOPS_ISA": "sse9"},
    )
    assert result.returncode == 1
    assert "ImportError: qops: QOPS_ISA must be one of: scalar" in result.stderr
    assert result.stderr.rstrip().endswith("got sse9")
