"""Weights that other packages quantised: the package's own dequantisation is the oracle.

Where a package rounds on the way, its bits are asked for where that rounding is none, and elsewhere what it may be off.
"""

import json

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import qops
from qops.formats import hqq, int8_rows, modelopt, quanto, torchao
from tests.support.package_weights import GOLDEN, PRODUCERS, SHAPE, random_weight

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def read(kind: str, t: dict[str, Tensor], shape: tuple[int, int]) -> qops.Int4Weight | qops.Int8Weight:
    match kind:
        case "hqq_int4":
            return hqq.int4_weight(t["W_q"], t["scale"], t["zero"], shape=shape, axis=1)
        case "hqq_int8":
            return hqq.int8_weight(t["W_q"], t["scale"], t["zero"], shape=shape, axis=1)
        case "quanto_int4":
            return quanto.int4_weight(t["data"], t["scale"], t["shift"], shape=shape)
        case "quanto_int8":
            return quanto.int8_weight(t["data"], t["scale"])
        case "bitsandbytes_int8":
            return int8_rows.from_bitsandbytes(t["weight"], t["SCB"])
        case "torchao_int8":
            return torchao.int8_weight(t["qdata"], t["scale"], t["zero_point"])
        case "torchao_intx":
            return torchao.intx_weight(t["qdata"], t["scale"], t["zero_point"])
        case "lmdeploy_int8":
            return int8_rows.from_lmdeploy(t["weight"], t["scale"])
        case "modelopt_int4":
            return modelopt.int4_weight(t["weight"], t["weight_scale"])
        case "modelopt_int8":
            return modelopt.int8_weight(t["weight"], t["weight_scale"])
    raise KeyError(kind)


def nibbles(weight: qops.Int4Weight) -> Tensor:
    qweight = weight.canonical()["qweight"]
    return torch.stack([qweight & 15, qweight >> 4], dim=-1).flatten(1)


def groups(tensor: Tensor, codes: Tensor) -> Tensor:
    """Scales [R, 1] for each code."""
    return tensor.view(codes.shape[0], -1, 1).expand(-1, -1, codes.numel() // tensor.numel()).reshape(codes.shape)


def require_equal_where_exact(found: Tensor, t: dict[str, Tensor], step: Tensor, exact: Tensor, factor: Tensor) -> None:
    """A package's result that rounds `step`, whose exact value is known, on the way to one multiplied with `factor`."""
    theirs, same = t["dequantized"], step.double() == exact
    assert same.any()
    assert torch.equal(found[same], theirs[same])
    unit = torch.finfo(theirs.dtype).eps / 2
    bound = unit * (exact.abs() * factor.double().abs() + 2 * theirs.double().abs())
    assert ((found.double() - theirs.double()).abs() <= bound * (1 + unit)).all()


def check(kind: str, t: dict[str, Tensor], shape: tuple[int, int]) -> None:
    weight = read(kind, t, shape)
    canonical = weight.canonical()
    theirs = t["dequantized"]
    found = weight.dequantize(theirs.dtype)
    if kind.startswith("hqq"):
        codes, scale, zero = t["codes"], groups(t["scale"], t["codes"]), groups(t["zero"], t["codes"])
        if kind == "hqq_int4":
            assert weight.kind == "float_zero"
            assert torch.equal(nibbles(weight), codes)
            assert torch.equal(canonical["scales"].flatten(), t["scale"].flatten())
            assert torch.equal(canonical["zeros"].flatten(), t["zero"].flatten().float())
        else:
            assert torch.equal(weight.dequantize(), ((codes.double() - zero.double()) * scale.double()).float())
        difference = codes.to(zero.dtype) - zero
        require_equal_where_exact(found, t, difference, codes.double() - zero.double(), scale)
    elif kind == "quanto_int4":
        codes, scale = t["codes"], groups(t["scale"], t["codes"])
        assert weight.kind == "offset"
        assert torch.equal(nibbles(weight), codes)
        assert torch.equal(canonical["scales"].flatten(), t["scale"].flatten())
        assert torch.equal(canonical["zeros"].flatten(), -t["shift"].flatten().float())
        require_equal_where_exact(found, t, codes * scale, codes.double() * scale.double(), torch.ones(1))
    elif kind == "bitsandbytes_int8":
        assert torch.equal(canonical["qweight"], t["weight"])
        assert (found.view(torch.int32) - theirs.view(torch.int32)).abs().max() <= 1
    else:
        assert torch.equal(found, theirs)


def golden() -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    kinds: dict[str, dict[str, Tensor]] = {}
    with safe_open(GOLDEN, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            kind, _, key = name.partition(".")
            kinds.setdefault(kind, {})[key] = file.get_tensor(name)
        return kinds, json.loads(file.metadata()["versions"])


@pytest.mark.parametrize("kind", PRODUCERS)
def test_stored_weights(kind):
    kinds, versions = golden()
    assert PRODUCERS[kind][0] in versions
    check(kind, kinds[kind], SHAPE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", PRODUCERS)
def test_package(kind, dtype):
    package, produce = PRODUCERS[kind]
    pytest.importorskip({"optimum-quanto": "optimum.quanto", "nvidia-modelopt": "modelopt"}.get(package, package))
    shape = (80, 384)
    t = produce(random_weight(shape, dtype, seed=3))
    if kind == "hqq_int8" and dtype == torch.float32:
        with pytest.raises(ValueError, match=r"hqq.int8_weight: offsets must fit in float32"):
            read(kind, t, shape)
    else:
        check(kind, t, shape)


# What no package can make on a CPU: torchao's Int4Tensor, by the definition of mslk ---------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchao_int4_tensor(dtype):
    random = torch.Generator().manual_seed(5)
    signed = torch.randint(-8, 8, (24, 96), generator=random, dtype=torch.int8)
    scale = (torch.rand(3, 24, generator=random) + 0.5).mul(0.01).to(dtype)
    zero = (torch.randn(3, 24, generator=random) * 0.01).to(dtype)
    if dtype == torch.float32:  # its offsets need bits that a float32 has not
        scale, zero = scale.bfloat16().float(), zero.bfloat16().float()
    qdata = (signed[:, 0::2] & 15) | (signed[:, 1::2] << 4)
    weight = torchao.int4_weight(qdata, scale, zero)
    each = [tensor.t().double().repeat_interleave(32, dim=1) for tensor in (scale, zero)]
    assert weight.kind == "offset"
    assert torch.equal(weight.dequantize(dtype), (signed.double() * each[0] + each[1]).float().to(dtype))


def test_torchao_int4_tensor_whose_offset_no_float32_holds():
    scale, zero = torch.full((1, 8), 0.1), torch.full((1, 8), 1e-6)
    with pytest.raises(ValueError, match=r"torchao.int4_weight: zero_point - 8 \* scale must fit in float32.*row 0"):
        torchao.int4_weight(torch.zeros(8, 16, dtype=torch.int8), scale, zero)


def live(subclass: str, **attributes: object) -> Tensor:
    """A tensor of a class of that name."""
    tensor = torch.Tensor._make_subclass(type(subclass, (torch.Tensor,), {}), torch.zeros(8, 32))
    for key, value in attributes.items():
        setattr(tensor, key, value)
    return tensor


CODES, SCALES, ZEROS = torch.ones(8, 32, dtype=torch.int8), torch.ones(8, 1), torch.zeros(8, 1, dtype=torch.int8)
INT8 = {"tensor_data_names": ("qdata", "scale"), "qdata": CODES, "scale": SCALES}
ACTIVATIONS = ("act_quant_scale", "act_quant_zero_point", "act_pre_scale")


def test_torchao_live_tensors():
    optional = {"optional_tensor_data_names": ("zero_point", *ACTIVATIONS), "zero_point": ZEROS}
    weight = qops.Int8Weight.from_torchao(live("Int8Tensor", **INT8, **optional, **dict.fromkeys(ACTIVATIONS)))
    assert torch.equal(weight.dequantize(), CODES.float())
    intx = {"tensor_data_names": ("qdata", "scale", "zero_point"), "qdata": CODES, "scale": SCALES, "zero_point": ZEROS}
    found = torchao.weight(live("IntxUnpackedToInt8Tensor", target_dtype=torch.int4, **intx), pack=False)
    assert torch.equal(found.dequantize(), CODES.float()) and not found.is_packed
    with pytest.raises(RuntimeError, match=r"target_dtype must be int4, got int3"):
        torchao.weight(live("IntxUnpackedToInt8Tensor", target_dtype=torch.int3, **intx))
    with pytest.raises(RuntimeError, match=r"Int8Weight.from_torchao: tensor must be of 8 bits, got IntxUnpacked"):
        qops.Int8Weight.from_torchao(live("IntxUnpackedToInt8Tensor", target_dtype=torch.int4, **intx))


@pytest.mark.parametrize("key", ACTIVATIONS)
def test_torchao_static_activations_are_refused(key):
    tensor = live("Int8Tensor", **INT8, optional_tensor_data_names=(key,), **{key: torch.ones(1)})
    with pytest.raises(ValueError, match=f"Int8Tensor must have no {key}"):
        torchao.weight(tensor)


@pytest.mark.parametrize("subclass", [*torchao.OTHERS, "Float8Tensor", "Tensor"])
def test_torchao_other_classes_are_refused(subclass):
    with pytest.raises(RuntimeError, match=f"tensor must be one of Int8Tensor, .*, got {subclass}"):
        torchao.weight(live(subclass))


# Calls that are wrong -------------------------------------------------------------------------------------------------


def u8(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def i8(*shape: int, value: int = 0) -> Tensor:
    return torch.full(shape, value, dtype=torch.int8)


one = torch.ones
NAN = torch.tensor([[1.0], [float("nan")]]).expand(2, 8).reshape(16, 1)
REFUSED = {
    "hqq axis": (
        hqq.int4_weight,
        (u8(8, 32), one(16, 1), one(16, 1)),
        {"shape": (16, 32), "axis": 0},
        "axis must be 1",
    ),
    "hqq shape": (hqq.int4_weight, (u8(8, 32), one(16, 1), one(16, 1)), {"shape": (16,), "axis": 1}, "shape must be"),
    "hqq 0": (hqq.int4_weight, (u8(0, 32), one(0, 1), one(0, 1)), {"shape": (0, 32), "axis": 1}, "both positive"),
    "hqq rows": (
        hqq.int4_weight,
        (u8(8, 32), one(16, 1), one(16, 1)),
        {"shape": (8, 32), "axis": 1},
        "W_q must hold 2",
    ),
    "hqq group": (
        hqq.int4_weight,
        (u8(8, 48), one(16, 1), one(16, 1)),
        {"shape": (24, 32), "axis": 1},
        "W_q must hold",
    ),
    "hqq scale": (
        hqq.int4_weight,
        (u8(8, 32), one(8, 1), one(16, 1)),
        {"shape": (16, 32), "axis": 1},
        "scale must have",
    ),
    "hqq zero": (
        hqq.int8_weight,
        (u8(16, 32), one(16, 1), one(1, 16)),
        {"shape": (16, 32), "axis": 1},
        "zero must have",
    ),
    "hqq dtype": (
        hqq.int8_weight,
        (i8(16, 32), one(16, 1), one(16, 1)),
        {"shape": (16, 32), "axis": 1},
        "W_q must have",
    ),
    "hqq nan": (hqq.int4_weight, (u8(8, 32), NAN, one(16, 1)), {"shape": (16, 32), "axis": 1}, "scales must be finite"),
    "hqq nan zero": (
        hqq.int8_weight,
        (u8(16, 32), one(16, 1), NAN),
        {"shape": (16, 32), "axis": 1},
        "must fit in float32",
    ),
    "quanto axis": (quanto.int4_weight, (u8(8, 32), one(1, 16), one(1, 16)), {"shape": (16, 32)}, "as along axis 0"),
    "quanto shift": (quanto.int4_weight, (u8(8, 32), one(16, 1), one(8, 1)), {"shape": (16, 32)}, "shift must have"),
    "quanto data": (
        quanto.int4_weight,
        (u8(16, 32), one(16, 1), one(16, 1)),
        {"shape": (16, 32)},
        r"data must have two",
    ),
    "quanto zeros": (quanto.int4_weight, (u8(8, 32), one(16, 1), i8(16, 1, value=-1)), {"shape": (16, 32)}, "0 ... 15"),
    "quanto int8": (quanto.int8_weight, (i8(8, 32), one(1, 32)), {}, "as along axis 0"),
    "bitsandbytes 4 bit": (int8_rows.from_bitsandbytes, (u8(8, 32), one(8)), {}, "4-bit layers"),
    "bitsandbytes SCB": (int8_rows.from_bitsandbytes, (i8(8, 32), one(8, 1)), {}, "SCB must have shape"),
    "bitsandbytes dtype": (int8_rows.from_bitsandbytes, (i8(8, 32), one(8).half()), {}, "SCB must have dtype float32"),
    "lmdeploy scale": (int8_rows.from_lmdeploy, (i8(8, 32), one(1, 8)), {}, "scale must have shape"),
    "lmdeploy float8": (int8_rows.from_lmdeploy, (one(8, 32).to(torch.float8_e4m3fn), one(8, 1)), {}, "int8"),
    "torchao zero point": (torchao.int8_weight, (i8(8, 32), one(8, 1), i8(8, 1, value=3)), {}, "zero_point must be 0"),
    "torchao intx": (torchao.intx_weight, (i8(8, 32, value=8), one(8, 1), i8(8, 1)), {}, "qdata must be -8 ... 7"),
    "torchao intx zero": (torchao.intx_weight, (i8(8, 32), one(8, 1), i8(8, 1, value=-9)), {}, "zero_point must be -8"),
    "torchao int4": (torchao.int4_weight, (i8(8, 32), one(8, 2), one(8, 2)), {}, r"must have shape \[K/G, N\]"),
    "modelopt int4": (modelopt.int4_weight, (u8(8, 32), one(8, 1)), {}, "weight_scale must have shape"),
    "modelopt int8": (modelopt.int8_weight, (i8(8, 32), one(8, 1)), {}, "weight_scale must have shape"),
}


@pytest.mark.parametrize("call", REFUSED)
def test_refused(call):
    function, tensors, options, said = REFUSED[call]
    with pytest.raises(
        (ValueError, RuntimeError), match=rf"^qops\.(formats\.\w+\.{function.__name__}|Int.Weight.*): .*{said}"
    ):
        function(*tensors, **options)


def test_something_else_than_a_tensor():
    calls = [
        (hqq.int4_weight, (u8(8, 32), one(16, 1), one(16, 1)), {"shape": (16, 32), "axis": 1}),
        (hqq.int8_weight, (u8(16, 32), one(16, 1), one(16, 1)), {"shape": (16, 32), "axis": 1}),
        (quanto.int4_weight, (u8(8, 32), one(16, 1), one(16, 1)), {"shape": (16, 32)}),
        (quanto.int8_weight, (i8(8, 32), one(8, 1)), {}),
        (int8_rows.from_bitsandbytes, (i8(8, 32), one(8)), {}),
        (int8_rows.from_lmdeploy, (i8(8, 32), one(8, 1)), {}),
        (torchao.int8_weight, (i8(8, 32), one(8, 1)), {}),
        (torchao.intx_weight, (i8(8, 32), one(8, 1), i8(8, 1)), {}),
        (torchao.int4_weight, (i8(16, 16), one(1, 16), one(1, 16)), {}),
        (modelopt.int4_weight, (u8(8, 32), one(16, 1)), {}),
        (modelopt.int8_weight, (i8(8, 32), one(8)), {}),
    ]
    for function, tensors, options in calls:
        function(*tensors, **options)
        for position in range(len(tensors)):
            given: list[object] = [*tensors]
            given[position] = "W"
            with pytest.raises(TypeError, match=r"must be a tensor, got str"):
                function(*given, **options)


def test_quanto_integer_shifts():
    codes = torch.randint(0, 16, (16, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    shift = torch.arange(16, dtype=torch.int8).view(16, 1)
    scale = torch.rand(16, 1, generator=torch.Generator().manual_seed(2)).half()
    weight = quanto.int4_weight(codes[:8] | codes[8:] << 4, scale, shift, shape=(16, 64))
    assert weight.kind == "zero_point"
    assert torch.equal(weight.dequantize(torch.float16), scale * (codes.int() - shift.int()))


def test_quanto_one_scale():
    codes = torch.arange(-128, 128, dtype=torch.int8).view(8, 32)
    weight = quanto.int8_weight(codes, torch.tensor(0.03))
    assert torch.equal(weight.dequantize(), codes * torch.tensor(0.03))


def test_bitsandbytes_differs_by_one_unit_at_most_for_every_code():
    codes = torch.arange(-127, 129).clamp(max=127).to(torch.int8).expand(64, 256).contiguous()
    absmax = torch.rand(64, generator=torch.Generator().manual_seed(4)).half().float()
    theirs = codes * absmax.view(-1, 1) * 7.874015718698502e-3
    found = int8_rows.from_bitsandbytes(codes, absmax).dequantize()
    assert (found.view(torch.int32) - theirs.view(torch.int32)).abs().max() == 1
