"""What holds of whole models on several ranks, each of which has had the model on its own first."""

from __future__ import annotations

import copy
import importlib.util
import logging
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM

import qops
from qops.integrations.tensor_parallel import ColumnParallel, RowParallel, parallelize
from qops.integrations.tensor_parallel.linears import ColumnShard, RowShard
from qops.integrations.transformers import QopsConfig, config_for
from qops.models import dense_model
from qops.models.replacement import is_fused
from qops.nn import MLP, QuantizedLinear
from qops.testing import assert_bitwise
from tests.support.formats import folders
from tests.support.models.families import FAMILIES, IDS, random_model

CALLER = r"qops\.integrations\.tensor_parallel\.parallelize: "
SCHEMES = {
    "int4": qops.Int4(group_size=32),
    "w4a8": qops.W4A8(group_size=32),
    "int8": qops.Int8(),
    "int8_weight_only": "int8_weight_only",
}


def small(family: str, mesh: Any, **changes: Any) -> Any:
    """Whose heads, rows and columns two and four ranks can split."""
    sizes = {"num_key_value_heads": max(2, mesh.size()), "intermediate_size": 128, "num_hidden_layers": 2}
    return random_model(family, **(sizes | changes))


def generated(model: Any) -> torch.Tensor:
    """By greedy search with a cache, the second sequence padded on the left."""
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    return model.generate(IDS, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)


def resident(model: Any) -> int:
    """Bytes of the quantised linears of the layers."""
    linears = {id(part): part for part in model.model.modules() if isinstance(part, QuantizedLinear)}
    return sum(t.numel() * t.element_size() for part in linears.values() for t in (*part.buffers(), *part.parameters()))


def assert_shared_out(model: Any, mesh: Any, exact: bool, what: str, tolerance: float = 2e-5) -> Any:
    """Splits a model, and compares logits, and the tokens of cached generation, with those of one rank."""
    wanted, tokens = model(IDS).logits, generated(model)
    assert parallelize(model, mesh) is model
    found = model(IDS).logits
    assert (wanted - wanted.flip(-1)).abs().max() > 0.1 * wanted.abs().max(), what
    if exact:
        assert_bitwise(found, wanted, what)
    else:
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max(), what
    assert torch.equal(generated(model), tokens), what
    return model


def each_scheme_and_both_kinds_of_layers(mesh: Any, folder: Path) -> None:
    for name, scheme in SCHEMES.items():
        for fuse in (True, False) if mesh.size() == 2 else (True,):
            model = qops.quantize_model(small("llama", mesh), scheme, fuse=fuse, prove=False)
            before = resident(model)
            # A rounded activation goes to the other side of a half.
            tolerance = 2e-2 if name == "w4a8" else 2e-5
            assert_shared_out(model, mesh, name == "int8", f"{name} fuse={fuse}", tolerance)
            assert is_fused(model) == fuse
            # Biases of o and down are whole.
            assert resident(model) <= 1.1 * before / mesh.size(), f"{name} fuse={fuse}"


def each_family(mesh: Any, folder: Path) -> None:
    for family in FAMILIES if mesh.size() == 2 else ("qwen3", "phi3", "gemma2"):
        model = assert_shared_out(qops.quantize_model(small(family, mesh), "int8", prove=False), mesh, True, family)
        assert any(isinstance(part, RowShard) for part in model.modules())
        mlps = [part for part in model.modules() if isinstance(part, MLP)]
        if family not in ("mixtral", "qwen3_moe", "glm"):
            assert len(mlps) == 2
        assert all(isinstance(mlp.down_proj, RowShard) and mlp.activates_in_gemm == (mlp.act is None) for mlp in mlps)


def layers_of_transformers(mesh: Any, folder: Path) -> None:
    """By its plan: norms of heads are whole, norms of all of q and k keep their attention whole."""
    for family, has_attention in (("qwen3", True), ("gemma3", True), ("olmo2", False)):
        model = qops.quantize_model(small(family, mesh), "int8", fuse=False, prove=False)
        assert_shared_out(model, mesh, True, f"{family} of Transformers")
        layer = model.model.layers[1]
        assert isinstance(layer.self_attn.o_proj, RowShard) == has_attention
        assert isinstance(layer.mlp.down_proj, RowShard)


def a_block_with_more_than_linears_stays_whole(mesh: Any, folder: Path) -> None:
    model = qops.quantize_model(small("llama", mesh), "int8", fuse=False, prove=False)
    attention = model.model.layers[0].self_attn
    attention.register_parameter("sinks", torch.nn.Parameter(torch.zeros(4), requires_grad=False))
    assert_shared_out(model, mesh, True, "sinks")
    assert not isinstance(attention.o_proj, RowShard)
    assert isinstance(model.model.layers[1].self_attn.o_proj, RowShard)


def caches_of_a_fixed_size_and_compiled_models(mesh: Any, folder: Path) -> None:
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "disable_compile": True}
    model = qops.quantize_model(small("llama", mesh), "int8", prove=False)
    wanted, logits = model.generate(IDS, cache_implementation="static", **settings), model(IDS).logits
    parallelize(model, mesh)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **settings), wanted)
    compiled: Any = torch.compile(model, backend="aot_eager")
    assert_bitwise(compiled(IDS).logits, logits)


def other_dtypes_and_mixtures(mesh: Any, folder: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = qops.quantize_model(small("qwen3", mesh, head_dim=32).to(dtype), SCHEMES["int4"], prove=False)
        wanted = model(IDS).logits
        found = parallelize(model, mesh)(IDS).logits
        assert found.dtype == wanted.dtype
        assert (found - wanted).abs().max() <= 5e-2 * wanted.abs().max()
    mixed = {"*k_proj": None, "*1.mlp.up_proj": None, "*down_proj": SCHEMES["int8"], "*": SCHEMES["int4"]}
    for fuse in (True, False):
        model = qops.quantize_model(small("llama", mesh), mixed, fuse=fuse, prove=False)
        assert_shared_out(model, mesh, False, f"mixed fuse={fuse}", 2e-2)


def act_order_is_followed(mesh: Any, folder: Path) -> None:
    if mesh.get_local_rank() == 0:
        settings, encode = folders.gptq(act_order=True)
        changes = {"num_key_value_heads": 4, "intermediate_size": 128, "num_hidden_layers": 2}
        folders.write_as(settings, encode, **changes).write(folder / "act_order")
    dist.barrier()
    model = qops.load_model(folder / "act_order", torch.float32, prove=False)
    assert model.model.layers[0].mlp.reordered and model.model.layers[0].self_attn.o_proj.weight.act_order
    assert_shared_out(model, mesh, False, "act-order")
    down, o = model.model.layers[0].mlp.down_proj, model.model.layers[0].self_attn.o_proj
    assert down.read is None and o.read.numel() == 64 // mesh.size()


def output_layers(mesh: Any, folder: Path) -> None:
    size = mesh.size()
    changes = {"vocab_size": 8 * size * 3}
    model = qops.quantize_model(small("llama", mesh, **changes), SCHEMES["int4"], skip_default=False, prove=False)
    wanted = model(IDS % 24).logits
    parallelize(model, mesh)
    found = model(IDS % 24).logits
    assert isinstance(model.lm_head, ColumnShard) and model.lm_head.out_features == 24
    assert found.shape == wanted.shape and (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    tied = small("llama", mesh, tie_word_embeddings=True, **changes)
    tied = qops.quantize_model(tied, "int8_weight_only", skip_default=False, prove=False)
    wanted = tied(IDS % 24).logits
    found = parallelize(tied, mesh)(IDS % 24).logits
    assert not isinstance(tied.lm_head, ColumnShard) and (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def hooks_and_copies(mesh: Any, folder: Path) -> None:
    model, seen = qops.quantize_model(small("llama", mesh), SCHEMES["int4"], prove=False), []
    layer = model.model.layers[0]
    for name in ("self_attn.o_proj", "self_attn.qkv_proj", "mlp", "mlp.gate_up_proj", "mlp.down_proj"):
        layer.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.append((name, output.shape[-1]))
        )
    parallelize(model, mesh)
    del seen[:]
    found, size = model(IDS).logits, mesh.size()
    shapes = dict(seen)
    assert shapes["self_attn.o_proj"] == shapes["mlp"] == shapes["mlp.down_proj"] == 64
    assert shapes["self_attn.qkv_proj"] == (64 + 32 * max(2, size)) // size
    assert_bitwise(copy.deepcopy(model)(IDS).logits, found)


def a_sharded_model_is_refused_by_who_needs_it_whole(mesh: Any, folder: Path) -> None:
    model = parallelize(qops.quantize_model(small("llama", mesh), "int8", prove=False), mesh)
    rank = rf"model must be whole, model\.layers\.0\.self_attn\.o_proj has the shard of rank {mesh.get_local_rank()} of"
    for use in (
        lambda: qops.save_model(model, folder / "never"),
        lambda: model.save_pretrained(folder / "never"),
        lambda: dense_model(model),
        lambda: parallelize(model, mesh),
    ):
        with pytest.raises(ValueError, match=rank):
            use()
    assert not (folder / "never").exists()
    with pytest.raises((TypeError, pickle.PicklingError)):
        pickle.dumps(model)
    # A column shard alone has no mark of its model.
    part = qops.quantize_model(small("llama", mesh), "int8", fuse=False, prove=False)
    ColumnParallel()._apply(part.model.layers[1].mlp.up_proj, mesh)
    with pytest.raises(ValueError, match=r"model must be whole, model\.layers\.1\.mlp\.up_proj has the shard"):
        qops.save_model(part, folder / "never")


def what_cannot_be_split_is_refused_and_unchanged(mesh: Any, folder: Path) -> None:
    size = mesh.size()

    def refused(model: Any, message: str, on: Any = mesh) -> None:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=CALLER + message):
            parallelize(model, on)
        after = model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    def made(scheme: Any = "int8", family: str = "llama", fuse: bool = True, **changes: Any) -> Any:
        return qops.quantize_model(small(family, mesh, **changes), scheme, fuse=fuse, prove=False)

    few = {"num_key_value_heads": 1}
    refused(made(**few), rf"model\.layers\.0\.self_attn: key/value heads must be a multiple of tp = {size}, got 1")
    said = rf"model\.layers\.0\.self_attn\.k_proj: its heads must be a multiple of tp = {size}, got 1"
    refused(made(fuse=False, **few), said)
    # One group of 120 columns over each shard leaves none of 16.
    wide = {"intermediate_size": 240 * size // 2}
    scheme = {"*down_proj": qops.Int4(group_size=48), "*": qops.Int8()}
    k = 240 * size // 2
    said = rf"model\.layers\.0\.mlp\.down_proj: K = {k} columns in groups of G = 48 cannot be split for tp = {size}"
    for fuse in (True, False):
        refused(made(scheme, fuse=fuse, **wide), said)
    said = rf"model\.layers\.0\.mlp\.gate_proj: N = 72 outputs must be a multiple of 8 \* tp = {8 * size}"
    for fuse in (True, False):
        refused(made(fuse=fuse, intermediate_size=72), said)
    refused(made(family="phi3", fuse=False), "model must have attention or MLPs of which a plan is known, got Phi3For")
    refused(random_model("llama"), "model must come from qops")
    plane = dist.init_device_mesh("cpu", (size, 1), mesh_dim_names=("tp", "dp"))
    refused(made(), r"mesh must have one dimension, such as mesh\['dp'\]", plane)
    refused(made(), "mesh must be a torch.distributed DeviceMesh, got int", size)
    model = made()
    model.model.layers[1].mlp.down_proj.__class__ = type("Mine", (qops.nn.Int8Linear,), {})
    refused(model, r"model\.layers\.1\.mlp\.down_proj must be a linear of qops.nn or an nn.Linear, got Mine")
    for place in ("self_attn", "mlp", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj", "self_attn.o_proj"):
        model = made()
        part = model.model.layers[1].get_submodule(place)
        part.forward = part.forward
        refused(model, rf"model\.layers\.1\.{re.escape(place)} must have no forward of its owner's")
    model = made()
    model.model.layers[0].self_attn.qkv_proj.merged.register_forward_hook(lambda *_: None)
    refused(model, r"model\.layers\.0\.self_attn\.qkv_proj must have no hooks on what it was merged of")
    if importlib.util.find_spec("peft") is not None:
        from qops.integrations.peft import prepare_for_adapters

        refused(prepare_for_adapters(made()), r".*q_proj must be a linear of qops.nn .*, got AdaptableInt8Linear")


def ranks_with_other_models_are_found(mesh: Any, folder: Path) -> None:
    model = qops.quantize_model(small("llama", mesh, seed=mesh.get_local_rank() % 2), "int8", prove=False)
    with pytest.raises(RuntimeError, match=r"gives something else on tp = .* all ranks must hold the same model"):
        parallelize(model, mesh)
    model = qops.quantize_model(small("llama", mesh, seed=mesh.get_local_rank() % 2), "int8", prove=False)
    parallelize(model, mesh, prove=False)


def what_stays_whole_is_said(mesh: Any, folder: Path) -> None:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("qops").addHandler(handler)
    for family, name in (("llama", None), ("olmo2", "model.layers.0.self_attn.q_proj")):
        del records[:]
        parallelize(qops.quantize_model(small(family, mesh), "int8", prove=False), mesh)
        whole = [record for record in records if "whole on each rank" in record]
        assert bool(whole) == (name is not None)
        assert name is None or (name in whole[0] and "down_proj" not in whole[0])
    logging.getLogger("qops").removeHandler(handler)


def torch_parallelizes_layers_of_transformers(mesh: Any, folder: Path) -> None:
    model = qops.quantize_model(small("llama", mesh), "int8", fuse=False, prove=False)
    wanted = model(IDS).logits
    plan: dict[str, Any] = {f"self_attn.{name}_proj": ColumnParallel() for name in "qkv"}
    plan |= {"self_attn.o_proj": RowParallel(), "mlp.down_proj": RowParallel()}
    plan |= {"mlp.gate_proj": ColumnParallel(), "mlp.up_proj": ColumnParallel()}
    plan = {f"model.layers.*.{name}": style for name, style in plan.items()}
    torch.distributed.tensor.parallel.parallelize_module(model, mesh, plan)
    assert_bitwise(model(IDS).logits, wanted)


def transformers_loads_with_its_plan(mesh: Any, folder: Path) -> None:
    dense, quantised = folder / "dense", folder / "quantised"
    source = small("llama", mesh)
    if mesh.get_local_rank() == 0:
        source.save_pretrained(dense)
        settings, encode = folders.gptq()
        changes = {"num_key_value_heads": 4, "intermediate_size": 128, "num_hidden_layers": 2}
        folders.write_as(settings, encode, **changes).write(quantised)
    dist.barrier()
    warnings.simplefilter("ignore", FutureWarning)  # of `tp_plan`, for which newer releases have another word
    logs: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logs.append(record.getMessage())  # type: ignore[method-assign]
    transformers.utils.logging.get_logger("transformers").addHandler(handler)
    own = qops.load_model(quantised, torch.float32)
    found = AutoModelForCausalLM.from_pretrained(
        quantised, config=config_for(quantised), dtype=torch.float32, tp_plan="auto"
    )
    wanted = own(IDS).logits
    assert found.model.layers[0].self_attn.heads == 4 // mesh.size() and is_fused(found)
    assert found.tp_plan["model.layers.*.mlp.down_proj"] == "rowwise"
    assert (found(IDS).logits - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    assert torch.equal(generated(found), generated(own))
    own = qops.quantize_model(source, "int8")
    config = QopsConfig("int8")
    found = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=config, dtype=torch.float32, tp_plan="auto", tp_size=mesh.size()
    )
    assert found.model.layers[0].self_attn.heads == 4 // mesh.size()
    assert_bitwise(found(IDS).logits, own(IDS).logits)
    assert [name for name, _ in found.named_children()] == [name for name, _ in own.named_children()]
    assert not [line for line in logs if "rules" in line or "not sharded" in line], logs
    with pytest.raises(ValueError, match="must be whole"):
        found.save_pretrained(folder / "never")


CHECKS = (
    each_scheme_and_both_kinds_of_layers,
    each_family,
    layers_of_transformers,
    a_block_with_more_than_linears_stays_whole,
    caches_of_a_fixed_size_and_compiled_models,
    other_dtypes_and_mixtures,
    act_order_is_followed,
    output_layers,
    hooks_and_copies,
    a_sharded_model_is_refused_by_who_needs_it_whole,
    what_cannot_be_split_is_refused_and_unchanged,
    ranks_with_other_models_are_found,
    what_stays_whole_is_said,
    torch_parallelizes_layers_of_transformers,
    transformers_loads_with_its_plan,
)
ON_FOUR = (
    each_scheme_and_both_kinds_of_layers,
    each_family,
    act_order_is_followed,
    output_layers,
    what_cannot_be_split_is_refused_and_unchanged,
    transformers_loads_with_its_plan,
)
