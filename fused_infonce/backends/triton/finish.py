"""Launchers of kernels/finish.py: the last pass over a gradient, and the sums of positives that it needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.finish import finish_kernel, parts_kernel
from ..precision import accumulator
from . import tiles
from .launch import INTERPRETED, Side, acc_of, cdiv, run, temperature_arguments

PART = 64  # queries of one key that a program sums, at least: an estimate
MOST_SLOTS = 2**14  # sums of parts that are held, from which on parts are longer: an estimate


class Partners(NamedTuple):
    """The rows whose positives add to each row of one side: see `positive_part` in kernels/finish.py."""

    rows: Tensor
    inverse: Tensor | None
    v: Tensor  # of the queries, as is the temperature; or of their uses
    temperature: Tensor | None
    indices: Tensor | None = None
    starts: Tensor | None = None
    parts: Tensor | None = None
    mutual: bool = False
    uses: int | None = None
    part: int = PART


NOBODY = (None, None, None, None, None, None, None, False, None, PART)  # the fields of Partners where there are none


def partners_by_target(
    x: Side, v: Tensor, temperature: Tensor | None, target: Tensor, keys: int, uses: int | None = None
) -> Partners:
    """Return the queries x as partners of their targets among so many keys.

    They are sorted by target, in their order, so that a sum over them never depends on timing. Where one key has many
    of them it is a sum of sums: else one program would walk through all. uses: how many targets each query has, one
    query's after another's; None: one.
    """
    (size, width), n, acc = x.rows.shape, target.shape[0], accumulator(x.rows.dtype)
    ascending, order = torch.sort(target, stable=True)
    starts = torch.searchsorted(ascending, torch.arange(keys + 1, device=v.device))
    parts, part = None, max(PART, tiles.power_of_two(2 * n // MOST_SLOTS))
    if n >= part:
        parts = x.rows.new_empty((n // (part // 2), width), dtype=acc)
        block_e, block_d = tiles.parts_tile(tiles.architecture(v.device), width)
        run(
            parts_kernel, (parts.shape[0], cdiv(width, block_d)),
            Z_ptr=x.rows, B_ptr=x.inverse, V_ptr=v, ORDER_ptr=order, SORTED_ptr=ascending, STARTS_ptr=starts,
            PARTS_ptr=parts, size_x=keys, size_z=size, uses=uses, D=width, stride_zn=x.rows.stride(0),
            zero_row=x.zero_row, PART=part, ACC=acc_of(x.rows), BLOCK_E=block_e, BLOCK_D=block_d,
            **temperature_arguments(temperature),
        )  # fmt: skip
    return Partners(x.rows, x.inverse, v, temperature, order, starts, parts, uses=uses, part=part)


def finish(
    g: Tensor | None, x: Side, d: int, project: bool, partners: Partners | None, unscale: Tensor | None,
    dtype: torch.dtype, factor: Tensor | None = None, saved: bool = False,
) -> Tensor:  # fmt: skip
    """Return the gradient of the first d components of x in `dtype`, from accumulators g (slots, n, at least d), times
    a factor a row; None: zeros.

    It is written into g where that is not `saved`, of its shape and dtype, and contiguous.
    """
    n = len(x)
    if g is not None and g.shape == (1, n, d) and g.dtype == dtype and not saved and g.is_contiguous():
        dx = g[0]  # a program reads and writes rows of its own
    else:
        dx = torch.empty((n, d), dtype=dtype, device=x.rows.device)
    z, inverse, v, t, indices, starts, parts, mutual, uses, part = partners or NOBODY
    block_m, block_d, block_e, block_p = tiles.finish_tile(tiles.architecture(x.rows.device), d, starts is not None)
    run(
        finish_kernel, (cdiv(n, block_m),),
        G_ptr=g, F_ptr=factor, X_ptr=x.rows, A_ptr=x.inverse, Z_ptr=z, B_ptr=inverse, V_ptr=v, TARGET_ptr=indices,
        STARTS_ptr=starts, PARTS_ptr=parts, UNSCALE_ptr=unscale, DX_ptr=dx,
        slots=0 if g is None else g.shape[0], size_x=n, size_z=0 if z is None else z.shape[0], uses=uses, D=d,
        stride_gm=0 if g is None else g.stride(1), stride_pn=0 if parts is None else parts.stride(0),
        stride_xm=x.rows.stride(0), stride_zn=0 if z is None else z.stride(0), zero_row=x.zero_row, MUTUAL=mutual,
        PART=part, PROJECT=project,
        WHOLE=d <= block_d, EMULATE=INTERPRETED, ACC=acc_of(x.rows), BLOCK_M=block_m, BLOCK_D=block_d, BLOCK_E=block_e,
        BLOCK_P=block_p, num_warps=4, **temperature_arguments(t),  # with 8, nvidia's assembler spills some of bfloat16
    )  # fmt: skip
    return dx
