"""Cosine and sine of RoPE's angles, as exact as the float32 angle allows, without local memory.

Triton's own cosine keeps a stack frame for huge arguments with some of the compilers that it ships (3.6), which every
launch would pay for. Here the angle is brought into [-pi/4, pi/4] in float64 (exact to 1e-10 up to 10^6 turns, far behind
the last position of any model), and two polynomials do the rest.
"""

import triton
import triton.language as tl


@triton.jit
def cosine_sine(angle):
    """Return cos(angle), sin(angle) for a float32 tensor; absolute error below 2e-7."""
    wide = angle.to(tl.float64)
    quarter = tl.floor(wide * 0.6366197723675814 + 0.5)  # 2 / pi
    x = (wide - quarter * 1.5707963267948966).to(tl.float32)
    turn = quarter.to(tl.int64) & 3
    square = x * x
    # Taylor series; the first term left out is below 4e-9 at pi/4.
    sine = x * (1 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880)))))
    cosine = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320))))
    swapped = (turn & 1) == 1
    c = tl.where(swapped, sine, cosine)
    s = tl.where(swapped, cosine, sine)
    c = tl.where((turn == 1) | (turn == 2), -c, c)
    s = tl.where(turn >= 2, -s, s)
    return c, s
