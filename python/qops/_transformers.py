"""The one place that decides which Transformers releases the model code accepts."""

from __future__ import annotations

import importlib.metadata

MINIMUM = (5, 17)
BELOW = (6,)


def require_transformers(caller: str) -> None:
    """Raises ImportError unless a supported Transformers is installed.

    The replaced parts rely on how this range of releases calls decoder layers, masks and caches; another release
    would fail late or, worse, run wrong.
    """
    wanted = f"transformers >= {_text(MINIMUM)}, < {_text(BELOW)}"
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{caller}: {wanted} is needed, none is installed: pip install 'qops[demo]'") from None
    release = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if not MINIMUM <= release < BELOW:
        raise ImportError(f"{caller}: {wanted} is needed, got {found}: pip install 'qops[demo]'")


def _text(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
