"""Multiple negatives ranking as a module: it holds options, and calls `functional`."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from . import functional
from .functional.ranking import check_options
from .losses import WithTemperature


class MultipleNegativesLoss(WithTemperature):
    """InfoNCE with hard negatives, in up to four directions; see `functional.multiple_negatives`.

    Args:
        temperature, directions, partition, hardness, hardness_strength, normalize, reduction, backend, workspace_limit:
            as in `functional.multiple_negatives`.

    Example:
        >>> loss = MultipleNegativesLoss(hardness="hard_negatives", hardness_strength=5.0)
        >>> query, positive, hard = (torch.randn(32, 128, requires_grad=True) for _ in range(3))
        >>> loss(query, [positive, hard]).backward()
    """

    shown = ("temperature", "directions", "partition", "hardness", "hardness_strength", "reduction")

    def __init__(
        self,
        temperature: float | Tensor = 0.05,
        *,
        directions: Collection[str] = ("query_to_doc",),
        partition: str = "joint",
        hardness: str | None = None,
        hardness_strength: float = 0.0,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_limit: int | None = None,
    ):
        super().__init__(temperature, reduction, normalize, backend, workspace_limit)
        check_options(directions, partition, hardness, hardness_strength)
        self.directions = tuple(directions)
        self.partition = partition
        self.hardness = hardness
        self.hardness_strength = hardness_strength

    def forward(
        self,
        query: Tensor,
        documents: Sequence[Tensor] | Tensor,
        *,
        offset: int = 0,
        all_queries: Tensor | None = None,
    ) -> Tensor:
        return functional.multiple_negatives(
            query,
            documents,
            self.temperature,
            directions=self.directions,
            partition=self.partition,
            hardness=self.hardness,
            hardness_strength=self.hardness_strength,
            offset=offset,
            all_queries=all_queries,
            **self.options,
        )
