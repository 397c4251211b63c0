from qops.ops.rms_norm import add_rms_norm, rms_norm
from qops.ops.rotary import rotary, rotary_
from qops.ops.silu_mul import silu_mul

__all__ = ["add_rms_norm", "rms_norm", "rotary", "rotary_", "silu_mul"]
