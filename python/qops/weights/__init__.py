"""Quantised weights: modules that hold one copy of a weight matrix, packed for the kernels.

They hold buffers only and have no forward. A weight is in one of two forms, never in both:

* *canonical*: ``qweight`` and ``scales`` (and ``zeros``, ``perm``) in plain row-major order. This is what state_dict
  and pickle store, with a format version, and what ``split`` returns.
* *packed*: the layout the kernels read, in strips of 16 output rows. Construction, loading and moving to another
  type of device end here.

Packing is a bijection, so nothing is lost by keeping the packed form alone.
"""

from qops.weights.int4 import Int4Weight
from qops.weights.int8 import Int8Weight

__all__ = ["Int4Weight", "Int8Weight"]
