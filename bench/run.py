"""``python -m bench.run OP ... | all``: times operators against every peer that is installed, and the machine's limit.

    python -m bench.run int4_gemm --out r.json            # ours, oneDNN, peers, the limit; 1 thread, then all
    python -m bench.run all --quick                        # two minutes
    python -m bench.run int4_gemm --layers "llama3-70b o" --rows 1,16 --threads all
    python -m bench.run all --device cuda --out bench/results/cuda.json
    python -m bench.run all --list                         # cases and providers; nothing runs

Ctrl-C keeps what was measured; the same command with the same ``--out`` goes on from there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import cases, document, problems, providers, timing
from bench.cases import Case, Selection
from bench.document import Document, OtherRun
from bench.providers import DEFAULT_MODULES, LIMIT, OURS, Provider
from bench.session import Failure, Session
from bench.stats import quantile
