"""`NTXentLoss` and `MACLLoss` of lightly 1.6.0 without the logits.

They are subclasses: arguments, memory bank, state and gathering are lightly's. A call that the fused loss refuses, such
as one with views of different shapes, is passed to lightly, whose value or error is returned. Known differences:

- The loss is differentiable once: `create_graph=True` in the backward raises RuntimeError.
- The logits are never rounded to 16 bits, so losses of 16-bit views are nearer to the exact value than there.
- Without a memory bank a row of zeros gets no gradient; the original's is 1e12 times that of a unit row.
- Both views are gathered at once, as they come and never in 16 bits; the original gathers normalised ones.
- `MACLLoss` weighs a row by 1 / (1 - P), as the paper does; the original adds 1e-8 to 1 - P, which in float32 is itself
  a multiple of 6e-8, and so departs for rows that are told apart nearly for sure.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from lightly.loss import macl_loss
from lightly.loss import ntx_ent_loss as original
from lightly.utils import dist
from torch import Tensor

from ..backends.precision import wide, without_autocast
from ..compose.arguments import views
from ..distributed import DistributedLike
from ..functional import info_nce, model_aware_nt_xent, nt_xent
from .common import fused_or, loss_dtype, one_number

__all__ = ["MACLLoss", "NTXentLoss"]


class NTXentLoss(original.NTXentLoss):
    """NT-Xent, SimCLR's loss, of two views of a batch; with a memory bank, MoCo's.

        loss_i = -log( exp(s_ip) / sum_{j != i} exp(s_ij) ),    s_ij = cos(z_i, z_j) / t

    over the rows z of both views, p being i's row in the other view, and with `gather_distributed` j over the rows of
    all processes. With a memory bank, over the rows of `out0` only, against their `out1` and the rows of the bank.

    Args:
        temperature: t, a number of at least 1e-8 in size. A negative one turns every logit's sign, those of a row with
            others of its own view too, as in the original: it pairs what is unlike. Such a call, and one with a tensor,
            makes twice the products of one with a positive number.
        memory_bank_size: 0 for none, or (rows, D).
        gather_distributed: negatives from all processes, with gradients; with a memory bank, its rows.

    Example:
        >>> loss = NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128))
        >>> loss(torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)).backward()
    """

    distributed: DistributedLike = False
    """The processes whose rows make one batch, exactly, in place of the original's gathering; see docs/distributed.md.

    It is assigned, `loss.distributed = True`, since the constructor is the original's. Nothing is then passed to the
    original: what the fused loss refuses is an error.
    """

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Return the 0-d loss of two (N, D) views, in their dtype, float32 under autocast, and fill the memory bank.

        Where `out0` requires a gradient, the rows of `out1` take the place of the oldest in the bank after the loss.
        """
        fused = partial(self._fused, out0, out1)
        return fused_or(partial(super().forward, out0, out1), "NTXentLoss", fused, distributed=self.distributed)

    def _fused(self, out0: Tensor, out1: Tensor, distributed: DistributedLike = False) -> Tensor:
        views(out0, out1, ())
        one_number("temperature", self.temperature)
        if distributed and self.memory_bank.size[0]:
            raise ValueError("a memory bank is each process's own: distributed needs memory_bank_size=0")
        if distributed:
            loss = nt_xent(out0, out1, self.temperature, distributed=distributed)
        else:
            loss = self._against_bank(out0, out1) if self.memory_bank.size[0] else self._in_batch(out0, out1)
        return loss.to(loss_dtype(out0, self.temperature))

    def _against_bank(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Return the loss against `out1` and the rows of the memory bank, which are not normalised again."""
        query, key = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        _, negatives = self.memory_bank(key)  # (D, K), a copy
        signed, t = self._signed(query)
        loss = info_nce(signed, key, negatives.T.to(query.device), temperature=t, normalize=False)
        if query.requires_grad:  # not so under no_grad, where the original leaves the bank alone
            self.memory_bank(key, update=True)
        return loss

    def _in_batch(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Return the loss of two views, with negatives from their batch, or from the batches of all processes."""
        if not len(out0):
            raise ValueError("out0 must have rows, got none")
        gathered = self.gather_distributed and dist.world_size() > 1
        if not gathered and not isinstance(self.temperature, Tensor) and self.temperature > 0:
            return nt_xent(out0, out1, self.temperature)
        with without_autocast(out0.device.type):  # autocast refuses rows of another 16-bit dtype than its own
            rows, products = wide(torch.cat([out0, out1]))
        n = len(rows)  # 2 N; with W processes the keys are (W 2 N, D), and this process's begin at rank * 2 N
        keys = torch.cat(dist.gather(rows.contiguous())) if gathered else rows
        own = torch.arange(n, device=rows.device) + (dist.rank() * n if gathered else 0)
        query, t = self._signed(rows)
        with products:
            return info_nce(
                query, keys, temperature=t, target=own.roll(n // 2), query_ids=own,
                key_ids=torch.arange(len(keys), device=rows.device),
            )  # fmt: skip

    def _signed(self, rows: Tensor) -> tuple[Tensor, float | Tensor]:
        """Return queries with the sign of the temperature, and its size: cos / t = (sign cos) / |t|."""
        t = self.temperature
        sign = torch.sign(t.detach()).to(rows) if isinstance(t, Tensor) else math.copysign(1, t)
        return sign * rows, abs(t)


class MACLLoss(macl_loss.MACLLoss):
    """MACL, the model-aware contrastive loss, of two views of a batch.

        loss_i = -log(P_i) / (1 - P_i),    P_i = exp(s_ip) / sum_{j != i} exp(s_ij),    s_ij = cos(z_i, z_j) / t
        t = temperature (1 + alpha (A - A_0)),    A = mean_i cos(z_i, z_p)

    over the rows z of both views, p being i's row in the other view. Neither 1 - P_i nor A has a gradient.

    Args:
        temperature: a number of at least 1e-8, the temperature at an alignment of `A_0`.
        alpha: in [0, 1], how far the temperature follows the alignment A.
        A_0: in [0, 1], the alignment that leaves it as it is.

    Example:
        >>> loss = MACLLoss(temperature=0.1, alpha=0.5)
        >>> loss(torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)).backward()
    """

    distributed: DistributedLike = False
    """The processes whose rows make one batch, which is assigned; the original has none. See docs/distributed.md."""

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """Return the 0-d loss of two (N, D) views, in their dtype, float32 under autocast."""
        fused = partial(self._fused, z0, z1)
        return fused_or(partial(super().forward, z0, z1), "MACLLoss", fused, distributed=self.distributed)

    def _fused(self, z0: Tensor, z1: Tensor, distributed: DistributedLike = False) -> Tensor:
        views(z0, z1, ())
        one_number("temperature", self.temperature)
        if not len(z0):
            raise ValueError("z0 must have rows, got none")
        loss = model_aware_nt_xent(
            z0, z1, self.temperature, alpha=self.alpha, threshold=self.A_0, distributed=distributed
        )
        return loss.to(loss_dtype(z0, self.temperature))
