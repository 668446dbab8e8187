"""The launcher of kernels/finish.py: the last pass over a gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.finish import finish_kernel
from . import tiles
from .launch import INTERPRETED, Side, acc_of, cdiv, run, temperature_arguments


class Partners(NamedTuple):
    """The rows whose positives add to each row of one side: see `positive_part` in kernels/finish.py."""

    rows: Tensor
    inverse: Tensor | None
    v: Tensor  # of the queries, as is the temperature
    temperature: Tensor
    indices: Tensor | None = None
    starts: Tensor | None = None
    mutual: bool = False


def finish(
    g: Tensor | None, x: Side, d: int, project: bool, partners: Partners | None, unscale: Tensor | None,
    dtype: torch.dtype, factor: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the gradient of the first d components of x in `dtype`, from accumulators g (slots, n, width of x), times
    a factor a row; None: zeros."""
    n, width = x.rows.shape
    in_place = g is not None and len(g) == 1 and g.dtype == dtype and width == d  # a program's rows are its own
    dx = g[0] if in_place and g is not None else torch.empty((n, d), dtype=dtype, device=x.rows.device)
    z, inverse, v, t, indices, starts, mutual = partners or (None, None, None, None, None, None, False)
    block_m, block_d, block_e = tiles.finish_tile(tiles.architecture(x.rows.device), d, gather=starts is not None)
    warps = 8 if starts is None else 4  # with which nothing spills in the default cases of tests/aot.py
    run(
        finish_kernel, (cdiv(n, block_m),),
        G_ptr=g, F_ptr=factor, X_ptr=x.rows, A_ptr=x.inverse, Z_ptr=z, B_ptr=inverse, V_ptr=v, TARGET_ptr=indices,
        STARTS_ptr=starts, UNSCALE_ptr=unscale, DX_ptr=dx, slots=0 if g is None else g.shape[0], size_x=n,
        size_z=0 if z is None else z.shape[0], D=d, stride_gm=width, stride_xm=x.rows.stride(0),
        stride_zn=0 if z is None else z.stride(0), zero_row=x.zero_row, MUTUAL=mutual, PROJECT=project,
        EMULATE=INTERPRETED, ACC=acc_of(x.rows), BLOCK_M=block_m, BLOCK_D=block_d, BLOCK_E=block_e,
        num_warps=warps, **temperature_arguments(t),
    )  # fmt: skip
    return dx
