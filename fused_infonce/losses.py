"""The losses as modules: they hold options and parameters, and call `functional`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import functional, validation


class ContrastiveLoss(nn.Module):
    """What every loss holds: the options that all functions take under these names."""

    shown: tuple[str, ...] = ("normalize", "reduction")  # in the representation

    def __init__(self, reduction: str, normalize: bool, backend: str, workspace_limit: int | None):
        super().__init__()
        validation.one_of("reduction", reduction, validation.REDUCTIONS)
        validation.one_of("backend", backend, validation.BACKENDS)
        self.reduction = reduction
        self.normalize = normalize
        self.backend = backend
        self.workspace_limit = validation.workspace_limit(workspace_limit)

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
            value = value if isinstance(value, Tensor) else validation.positive_float(name, value)
            self._parameters.pop(name, None)  # a Parameter of the user's gives way to what is assigned
        super().__setattr__(name, value)


class FusedInfoNCELoss(ContrastiveLoss):
    """InfoNCE without the N x M logits; a drop-in for `InfoNCE` of info-nce-pytorch. See `functional.info_nce`.

    Args:
        temperature, reduction, negative_mode, symmetric, normalize, in_batch_negatives, ignore_index,
            label_smoothing, backend, workspace_limit: as in `functional.info_nce`.
        learnable_temperature: hold the 0-d float32 parameter `logit_scale = log(1 / temperature)`, as CLIP does
            (Radford et al. 2021, arXiv:2103.00020). Give `loss.parameters()` to the optimizer, without weight decay.
        max_logit_scale: with it, `clamp_logit_scale_()` keeps `1 / temperature` at or under this value (CLIP: 100).

    Example:
        >>> loss = FusedInfoNCELoss(temperature=0.02)
        >>> query, key = torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)
        >>> loss(query, key).backward()
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        negative_mode: str = "unpaired",
        *,
        symmetric: bool = False,
        normalize: bool = True,
        in_batch_negatives: bool | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        learnable_temperature: bool = False,
        max_logit_scale: float | None = None,
        backend: str = "auto",
        workspace_limit: int | None = None,
    ):
        super().__init__(reduction, normalize, backend, workspace_limit)
        validation.one_of("negative_mode", negative_mode, validation.NEGATIVE_MODES)
        if max_logit_scale is not None:
            validation.positive_float("max_logit_scale", max_logit_scale)
            if not learnable_temperature:
                raise ValueError("max_logit_scale bounds a learnable temperature: pass learnable_temperature=True")
        self.negative_mode = negative_mode
        self.symmetric = symmetric
        self.in_batch_negatives = in_batch_negatives
        self.ignore_index = ignore_index
        self.label_smoothing = validation.fraction("label_smoothing", label_smoothing)
        self.max_logit_scale = max_logit_scale
        self.logit_scale = nn.Parameter(torch.zeros((), dtype=torch.float32)) if learnable_temperature else None
        self.temperature = temperature

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "temperature":  # nn.Module would register a Parameter under the property's name
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use: what was assigned, or `exp(-logit_scale)` where it is learnable. Assignable."""
        return self._temperature if self.logit_scale is None else torch.exp(-self.logit_scale)

    @temperature.setter
    def temperature(self, value: float | Tensor) -> None:
        if self.logit_scale is None:
            value = value if isinstance(value, Tensor) else validation.positive_float("temperature", value)
            self._parameters.pop("_temperature", None)  # a Parameter of the user's gives way to what is assigned
            self._temperature = value
            return
        scalar = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        scale = -math.log(validation.positive_float("temperature", scalar))
        with torch.no_grad():
            self.logit_scale.fill_(scale)

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Keep `1 / temperature` at or under `max_logit_scale`. Call it after the optimizer's step: a clamp inside the
        forward would stop the gradient at the bound."""
        if self.logit_scale is None or self.max_logit_scale is None:
            raise RuntimeError("clamp_logit_scale_ needs learnable_temperature=True and a max_logit_scale")
        self.logit_scale.clamp_(max=math.log(self.max_logit_scale))

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | None = None,
        *,
        target: Tensor | None = None,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        weight: Tensor | None = None,
        temperature: float | Tensor | None = None,
    ) -> Tensor:
        """The loss; `temperature` replaces the module's for this call."""
        return functional.info_nce(
            query,
            positive_key,
            negative_keys,
            temperature=self.temperature if temperature is None else temperature,
            negative_mode=self.negative_mode,
            symmetric=self.symmetric,
            in_batch_negatives=self.in_batch_negatives,
            ignore_index=self.ignore_index,
            target=target,
            query_ids=query_ids,
            key_ids=key_ids,
            negative_ids=negative_ids,
            weight=weight,
            label_smoothing=self.label_smoothing,
            **self.options,
        )

    def extra_repr(self) -> str:
        options: dict[str, Any] = {
            "temperature": self._temperature
            if self.logit_scale is None
            else float(f"{torch.exp(-self.logit_scale).item():.6g}"),
            "reduction": self.reduction,
            "negative_mode": self.negative_mode,
        }
        defaults: dict[str, Any] = {
            "symmetric": False, "normalize": True, "in_batch_negatives": None, "ignore_index": -100,
            "label_smoothing": 0.0,
            "max_logit_scale": None, "backend": "auto", "workspace_limit": None,
        }  # fmt: skip
        options.update({name: getattr(self, name) for name, value in defaults.items() if getattr(self, name) != value})
        if self.logit_scale is not None:
            options["learnable_temperature"] = True
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


class NTXentLoss(WithTemperature):
    """NT-Xent, SimCLR's loss, from two or more views of a batch; see `functional.nt_xent`.

    Example:
        >>> loss = NTXentLoss(temperature=0.1)
        >>> loss(torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)).backward()
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        *,
        normalize: bool = True,
        backend: str = "auto",
        workspace_limit: int | None = None,
    ):
        super().__init__(temperature, reduction, normalize, backend, workspace_limit)

    def forward(self, view_a: Tensor, view_b: Tensor, *more_views: Tensor) -> Tensor:
        return functional.nt_xent(
            view_a,
            view_b,
            self.temperature,
            more_views=more_views,
            **self.options,
        )


class SupConLoss(WithTemperature):
    """Supervised contrastive loss; a drop-in for `SupConLoss` of SupContrast. See `functional.sup_con`.

    Example:
        >>> loss = SupConLoss(temperature=0.07)
        >>> loss(torch.randn(32, 2, 128, requires_grad=True), labels=torch.arange(32) % 10).backward()
    """

    shown = ("temperature", "contrast_mode", "base_temperature", "reduction")

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
        reduction: str = "mean",
        *,
        normalize: bool = True,
        backend: str = "auto",
        workspace_limit: int | None = None,
    ):
        super().__init__(temperature, reduction, normalize, backend, workspace_limit)
        validation.one_of("contrast_mode", contrast_mode, validation.CONTRAST_MODES)
        self.contrast_mode = contrast_mode
        self.base_temperature = validation.positive_float("base_temperature", base_temperature)

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return functional.sup_con(
            features,
            labels,
            mask,
            self.temperature,
            self.contrast_mode,
            self.base_temperature,
            **self.options,
        )
