"""Kernels compiled for the processor that serves.

What they save is calls: a layer's element-wise part is one of them instead of a dozen, and a lone
session's product has no library's set-up before it. Each works row by row and unit by unit, so what
a row gives does not depend on the others.

A multiply and an add may be contracted to one operation with one rounding, as the compiler sees
fit; it sees the same code for every row. Nothing else is reordered.
"""

# numba has no types that pyright could read.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false
# pyright: reportMissingParameterType=false, reportCallIssue=false

from collections.abc import Callable
from typing import Any, Final, ParamSpec, TypeVar

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# Not to be confused with the tensors of the other rooms: these are views of their memory.
P = ParamSpec("P")
R = TypeVar("R")
Vector = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float32]
Blocks = npt.NDArray[np.float32]

BLOCK: Final = 64
"""Columns that a product computes together: four of the widest vectors, enough to hide the latency
of the additions that follow one another."""
_VECTOR: Final = "float32[::1]"
_MATRIX: Final = "float32[:,::1]"


def _compiled(signature: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Compiles at import for one signature; a later process finds the result on disk."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        options: dict[str, Any] = {
            "fastmath": {"contract"},
            "error_model": "numpy",
            "nogil": True,
            "boundscheck": False,
        }
        try:
            return numba.njit(signature, cache=True, **options)(function)
        except Exception:  # noqa: BLE001  no folder for results, a full one, a damaged file in it
            return numba.njit(signature, **options)(function)

    return decorate


@intrinsic
def _as_float(_typing, number):
    """The float32 that has the bits of an int32."""

    def cast(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), cast


@intrinsic
def _as_int(_typing, number):
    """The bits of a float32 as an int32."""

    def cast(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), cast


# The constants of exp: x = n ln 2 + r, ln 2 in two parts so that r is exact, and a polynomial of r.
# The coefficients are those of Cephes' expf (S. L. Moshier), good to a unit in the last place.
_EXP_MAX = np.float32(87.0)
_LOG2_E = np.float32(1.4426950408889634)
_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding it leaves the nearest whole number in the bits
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_P0 = np.float32(1.9875691500e-4)
_P1 = np.float32(1.3981999507e-3)
_P2 = np.float32(8.3334519073e-3)
_P3 = np.float32(4.1665795894e-2)
_P4 = np.float32(1.6666665459e-1)
_P5 = np.float32(5.0000001201e-1)
_ONE = np.float32(1)
_TWO = np.float32(2)
_EXPONENT_BIAS = np.int32(127)
_MANTISSA_BITS = np.int32(23)


@numba.njit(inline="always")
def _s(x):
    """The logistic function 1 / (1 + exp(-x)); NaN stays NaN."""
    y = -x
    y = _EXP_MAX if y > _EXP_MAX else y
    y = -_EXP_MAX if y < -_EXP_MAX else y
    shifted = y * _LOG2_E + _ROUND
    n = shifted - _ROUND
    r = y - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = _P0 * r + _P1
    p = p * r + _P2
    p = p * r + _P3
    p = p * r + _P4
    p = p * r + _P5
    p = p * r * r + r + _ONE
    scale = _as_float(types.int32((_as_int(shifted) + _EXPONENT_BIAS) << _MANTISSA_BITS))
    return _ONE / (_ONE + p * scale)


@_compiled(
    f"void({', '.join([_MATRIX] * 2)}, {', '.join([_VECTOR] * 3)}, {_MATRIX}, {_MATRIX}, b1)"
)
def lstm(
    sums: Matrix,
    c: Matrix,
    peephole_input: Vector,
    peephole_forget: Vector,
    peephole_output: Vector,
    h_new: Matrix,
    c_new: Matrix,
    keep: bool,
) -> None:
    """i, f, g, o sums [rows, 4 width] and c [rows, width] -> h', c'.

    Those of g are doubled. A gate without a peephole has one of zeros. With `keep` the sums become
    the gates.
    """
    width = c.shape[1]
    for row in range(c.shape[0]):
        of_i, of_f = sums[row, :width], sums[row, width : 2 * width]
        of_g, of_o = sums[row, 2 * width : 3 * width], sums[row, 3 * width :]
        before, after, shown = c[row], c_new[row], h_new[row]
        for k in range(width):
            i = _s(of_i[k] + peephole_input[k] * before[k])
            f = _s(of_f[k] + peephole_forget[k] * before[k])
            g = _TWO * _s(of_g[k]) - _ONE
            now = f * before[k] + i * g
            o = _s(of_o[k] + peephole_output[k] * now)
            after[k] = now
            shown[k] = o * (_TWO * _s(now + now) - _ONE)
            if keep:
                of_i[k], of_f[k], of_g[k], of_o[k] = i, f, g, o


@_compiled(f"void({_MATRIX}, {_MATRIX}, {_VECTOR}, {_VECTOR}, {_MATRIX}, {_MATRIX}, b1)")
def lstm_coupled(
    sums: Matrix,
    c: Matrix,
    peephole_forget: Vector,
    peephole_output: Vector,
    h_new: Matrix,
    c_new: Matrix,
    keep: bool,
) -> None:
    """`lstm` of f, g, o sums [rows, 3 width], the input gate being 1 - f."""
    width = c.shape[1]
    for row in range(c.shape[0]):
        of_f, of_g = sums[row, :width], sums[row, width : 2 * width]
        of_o = sums[row, 2 * width :]
        before, after, shown = c[row], c_new[row], h_new[row]
        for k in range(width):
            f = _s(of_f[k] + peephole_forget[k] * before[k])
            g = _TWO * _s(of_g[k]) - _ONE
            now = f * (before[k] - g) + g
            o = _s(of_o[k] + peephole_output[k] * now)
            after[k] = now
            shown[k] = o * (_TWO * _s(now + now) - _ONE)
            if keep:
                of_f[k], of_g[k], of_o[k] = f, g, o


@_compiled(f"void({_MATRIX}, {_MATRIX}, {_MATRIX})")
def gru_gates(sums: Matrix, h: Matrix, seen: Matrix) -> None:
    """r, z sums [rows, 2 width] become the gates; r * h [rows, width] is what a candidate sees."""
    width = h.shape[1]
    for row in range(h.shape[0]):
        of_r, of_z = sums[row, :width], sums[row, width:]
        for k in range(width):
            r = _s(of_r[k])
            of_r[k] = r
            of_z[k] = _s(of_z[k])
            seen[row, k] = r * h[row, k]


@_compiled(f"void({', '.join([_MATRIX] * 4)})")
def gru_before(gates: Matrix, sums: Matrix, h: Matrix, h_new: Matrix) -> None:
    """r, z [rows, 2 width] and doubled sums of n [rows, width] -> h'. The sums become n."""
    width = h.shape[1]
    for row in range(h.shape[0]):
        z, of_n = gates[row, width:], sums[row]
        for k in range(width):
            n = _TWO * _s(of_n[k]) - _ONE
            of_n[k] = n
            h_new[row, k] = z[k] * (h[row, k] - n) + n


@_compiled(f"void({', '.join([_MATRIX] * 5)})")
def gru_after(gates: Matrix, read: Matrix, sums: Matrix, h: Matrix, h_new: Matrix) -> None:
    """r, z sums, doubled Wx x + b [rows, width] and doubled Wh h + b of n -> h'.

    The first become the gates, the last n.
    """
    width = h.shape[1]
    for row in range(h.shape[0]):
        of_r, of_z = gates[row, :width], gates[row, width:]
        of_n, of_x = sums[row], read[row]
        for k in range(width):
            r, z = _s(of_r[k]), _s(of_z[k])
            n = _TWO * _s(r * of_n[k] + of_x[k]) - _ONE
            of_r[k], of_z[k], of_n[k] = r, z, n
            h_new[row, k] = z * (h[row, k] - n) + n


@_compiled(f"void({_MATRIX})")
def tanh(sums: Matrix) -> None:
    """Doubled sums become the hyperbolic tangent of the sums."""
    for row in range(sums.shape[0]):
        values = sums[row]
        for k in range(values.shape[0]):
            values[k] = _TWO * _s(values[k]) - _ONE


@_compiled(f"void({_VECTOR}, float32[:,:,::1], int64, {_VECTOR}, {_VECTOR})")
def lone_product(x: Vector, weight: Blocks, chain: int, added: Vector, y: Vector) -> None:
    """W x + b for one row.

    Args:
        x: [in]
        weight: W by blocks of columns of its transpose, [blocks, in, BLOCK].
        chain: So many terms are added one after another; the sums of such chains are then added in
            order. It makes this the very sum that a library computes which takes its input in
            panels of that length.
        added: b, [blocks * BLOCK], added last.
        y: Where the result goes, [blocks * BLOCK].
    """
    size = x.shape[0]
    partial = np.empty(BLOCK, np.float32)
    for block in range(weight.shape[0]):
        w, out = weight[block], y[block * BLOCK : (block + 1) * BLOCK]
        for begin in range(0, size, chain):
            end = min(begin + chain, size)
            for n in range(BLOCK):
                partial[n] = 0
            whole = begin + (end - begin) // 4 * 4
            for k in range(begin, whole, 4):
                x0, x1, x2, x3 = x[k], x[k + 1], x[k + 2], x[k + 3]
                for n in range(BLOCK):
                    total = partial[n] + x0 * w[k, n]
                    total = total + x1 * w[k + 1, n]
                    total = total + x2 * w[k + 2, n]
                    partial[n] = total + x3 * w[k + 3, n]
            for k in range(whole, end):
                for n in range(BLOCK):
                    partial[n] = partial[n] + x[k] * w[k, n]
            for n in range(BLOCK):
                out[n] = partial[n] if begin == 0 else out[n] + partial[n]
        for n in range(BLOCK):
            out[n] = out[n] + added[block * BLOCK + n]
