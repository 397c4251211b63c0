"""The state_dict of a :class:`qops.nn.MergedLinear`, in which each part stands under its own name."""

from __future__ import annotations

from typing import Any

import torch

# State shared by all rows of a linear: the same in every part. Everything else has N rows.
SHARED_STATE = ("perm", "format_version", "input_scale", "input_zero_point", "pre_quant_scale")


def restore_names(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """state_dict hook of a MergedLinear: `qkv_proj.merged.weight.qweight` becomes `q_proj.weight.qweight`, ..."""
    parent = prefix[: prefix[:-1].rfind(".") + 1]
    for key in [key for key in state_dict if key.startswith(prefix)]:
        tensor = state_dict.pop(key)
        place, _, leaf = key.removeprefix(prefix).partition(".")
        if place == "separate":
            index, _, leaf = leaf.partition(".")
            state_dict[f"{parent}{module.names[int(index)]}.{leaf}"] = tensor
            continue
        # Copies, as safetensors refuses entries in one memory; parts of the rows do not overlap.
        shared = leaf.rpartition(".")[2] in SHARED_STATE
        rows = [tensor.clone() for _ in module.names] if shared else tensor.split(module.sizes)
        for name, part in zip(module.names, rows, strict=True):
            state_dict[f"{parent}{name}.{leaf}"] = part


def merge_names(module: Any, state_dict: dict[str, Any], parent: str, prefix: str, error_msgs: list[str]) -> None:
    """The way back: gathers the parts' entries under the names that `module`'s children load."""
    leaves: dict[str, list[Any]] = {}
    for index, name in enumerate(module.names):
        for key in [key for key in state_dict if key.startswith(f"{parent}{name}.")]:
            leaf = key.removeprefix(f"{parent}{name}.")
            if module.merged is None:
                state_dict[f"{prefix}separate.{index}.{leaf}"] = state_dict.pop(key)
            else:
                leaves.setdefault(leaf, []).append(state_dict.pop(key))
    for leaf, parts in leaves.items():
        described = f"{parent}{{{','.join(module.names)}}}.{leaf}"
        if len(parts) != len(module.names):
            error_msgs.append(f"{described}: present in {len(parts)} of {len(module.names)} parts")
        elif leaf.rpartition(".")[2] in SHARED_STATE:
            if any(not torch.equal(part, parts[0]) for part in parts[1:]):
                error_msgs.append(f"{described}: must be the same in every part")
            state_dict[f"{prefix}merged.{leaf}"] = parts[0]
        elif len({part.dtype for part in parts}) > 1 or [len(part) for part in parts] != module.sizes:
            found = [(list(part.shape), part.dtype) for part in parts]
            error_msgs.append(f"{described}: must have {module.sizes} rows of one dtype, got {found}")
        else:
            state_dict[f"{prefix}merged.{leaf}"] = torch.cat(parts)
