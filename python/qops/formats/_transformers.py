"""The one place that decides which Transformers releases the model code accepts."""

from __future__ import annotations

import functools
import importlib.metadata
import sys
import warnings

MINIMUM = (5, 17)
NEWEST_TESTED = (5, 24)


def require_transformers(caller: str) -> None:
    """Raises ImportError unless Transformers is installed and not too old.

    A release newer than any that was tested is warned about once: whether fused layers compute what its own layers do
    is proven before they are used (`qops.models.proof`).
    """
    wanted = f"transformers >= {_text(MINIMUM)}"
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{caller}: {wanted} is needed, none is installed: pip install 'qops[demo]'") from None
    release = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if release < MINIMUM:
        raise ImportError(f"{caller}: {wanted} is needed, got {found}: pip install 'qops[demo]'")
    if release > NEWEST_TESTED:
        _warn_newer(found)


def refuse_zero_init(caller: str) -> None:
    """Raises RuntimeError inside `deepspeed.zero.Init`, which takes away the parameters that a reader is to fill."""
    zero = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if getattr(zero, "zero_init_context", 0):
        raise RuntimeError(
            f"{caller}: no model can be made inside deepspeed.zero.Init; "
            "make it before, deepspeed.initialize(model=model, ...) partitions it"
        )


@functools.cache
def _warn_newer(found: str) -> None:
    warnings.warn(
        f"qops: transformers {found} is newer than {_text(NEWEST_TESTED)}, the newest that this qops was tested with; "
        "decoder layers are fused only where they are proven to compute what its own layers do",
        stacklevel=4,
    )


def _text(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
