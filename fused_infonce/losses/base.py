"""The losses as modules: they hold options and parameters, and call `functional`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import checks

NEGATIVES = ("views", "keys")


class ContrastiveLoss(nn.Module):
    """What every loss holds: the options that all functions take under these names."""

    shown: tuple[str, ...] = ("normalize", "reduction")  # in the representation

    def __init__(self, reduction: str, normalize: bool, backend: str, workspace_limit: int | None):
        super().__init__()
        checks.one_of("reduction", reduction, checks.REDUCTIONS)
        checks.one_of("backend", backend, checks.BACKENDS)
        self.reduction = reduction
        self.normalize = normalize
        self.backend = backend
        self.workspace_limit = checks.workspace_limit(workspace_limit)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "reduction": self.reduction,
            "normalize": self.normalize,
            "backend": self.backend,
            "workspace_limit": self.workspace_limit,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.shown)


class WithTemperature(ContrastiveLoss):
    """One whose `temperature`, a number or a tensor, may be assigned at any time."""

    shown: tuple[str, ...] = ("temperature", "reduction")
    temperature: float | Tensor

    def __init__(
        self, temperature: float | Tensor, reduction: str, normalize: bool, backend: str, workspace_limit: int | None
    ):
        super().__init__(reduction, normalize, backend, workspace_limit)
        self.temperature = temperature

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "temperature":
            value = value if isinstance(value, Tensor) else checks.positive_float(name, value)
            self._parameters.pop(name, None)  # a Parameter of the user's gives way to what is assigned
        super().__setattr__(name, value)


class PairLoss(WithTemperature):
    """What DCLLoss and DebiasedLoss share.

    Args:
        negatives: "views" (the two inputs are views of a batch, and the rows of both views of other samples are the
            negatives) or "keys" (queries against keys, as in `functional.info_nce`).
        symmetric, negative_mode, in_batch_negatives: as in `functional.info_nce`, with negatives="keys".
    """

    def __init__(
        self, temperature: float | Tensor, reduction: str, negatives: str, symmetric: bool, negative_mode: str,
        in_batch_negatives: bool | None, normalize: bool, backend: str, workspace_limit: int | None,
    ):  # fmt: skip
        super().__init__(temperature, reduction, normalize, backend, workspace_limit)
        checks.one_of("negatives", negatives, NEGATIVES)
        checks.one_of("negative_mode", negative_mode, checks.NEGATIVE_MODES)
        if negatives == "views" and (symmetric or negative_mode != "unpaired" or in_batch_negatives is not None):
            raise ValueError("symmetric, negative_mode and in_batch_negatives are options of negatives='keys'")
        self.negatives = negatives
        self.symmetric = symmetric
        self.negative_mode = negative_mode
        self.in_batch_negatives = in_batch_negatives

    def between(
        self, views: Callable[..., Tensor], keys: Callable[..., Tensor], query: Tensor, positive_key: Tensor,
        negative_keys: Tensor | None, rows: dict[str, Tensor | None], **own: Any,
    ) -> Tensor:  # fmt: skip
        """The one or the other function of these inputs; `rows` are those that only `keys` takes."""
        if self.negatives == "keys":
            return keys(
                query, positive_key, negative_keys, self.temperature, symmetric=self.symmetric,
                negative_mode=self.negative_mode, in_batch_negatives=self.in_batch_negatives, **rows, **own,
                **self.options,
            )  # fmt: skip
        for name, value in {"negative_keys": negative_keys, **rows}.items():
            if value is not None:
                raise ValueError(f"{name} needs negatives='keys': those of two views are their other rows")
        return views(query, positive_key, self.temperature, **own, **self.options)
