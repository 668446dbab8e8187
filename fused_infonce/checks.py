"""Every check on user input. One style: what was expected, then what came. Nothing here launches device work
except the checks of CPU values, which cost nothing there."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")
NEGATIVE_MODES = ("unpaired", "paired")
CONTRAST_MODES = ("all", "one")
BACKENDS = ("auto", "triton", "torch", "reference")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SMALLEST = 1e-30
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def embeddings(name: str, value: object, dims: int, shape: str) -> None:
    """A floating tensor with `dims` dimensions; `shape` says it in words."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(value).__name__}")
    if value.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions {shape}, got shape {tuple(value.shape)}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")


def ids(name: str, value: object, shape: tuple[int, ...], device: torch.device, like: str = "query") -> Tensor:
    """An integer tensor of exactly this shape, as int64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be an integer tensor of shape {shape}, got {type(value).__name__}")
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name} must be an integer tensor, got {value.dtype}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device} as {like} is, got {value.device}")
    return value.long()


def alike(query: Any, key: Any) -> bool:
    """Whether these are what a call most often has, so that there is nothing to say about them."""
    if type(query) is not Tensor or type(key) is not Tensor or query.dtype not in FLOATS:
        return False
    return query.dim() == 2 and query.shape == key.shape and query.dtype == key.dtype and query.device == key.device


def same_kind(tensors: dict[str, Tensor]) -> None:
    """One device; one dtype, except under autocast, where only float64 must not be mixed with others."""
    (first_name, first), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on {first.device} as {first_name} is, got {tensor.device}")
        castable = torch.is_autocast_enabled(first.device.type) and torch.float64 not in (tensor.dtype, first.dtype)
        if tensor.dtype != first.dtype and not castable:
            raise TypeError(
                f"{name} must be {first.dtype} as {first_name} is, got {tensor.dtype} "
                "(under autocast 16-bit and 32-bit inputs may mix)"
            )


def real(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return value if torch.compiler.is_compiling() else float(value)  # type: ignore[return-value]  # symbolic there


def finite(name: str, value: Any) -> float:
    try:
        number = real(name, value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got {value}") from None
    if not torch.compiler.is_compiling() and not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value}")
    return number


def positive_float(name: str, value: Any) -> float:
    number = value if type(value) is float else real(name, value)
    if not SMALLEST < number < 1 / SMALLEST:
        raise ValueError(f"{name} must be positive and finite, also in float32, got {value}")
    return number


def values_are_free(tensor: Tensor) -> bool:
    """Whether reading values costs no synchronisation; elsewhere a bad value gives NaN, not an error."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def temperature(value: Any, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A positive number, a one-element tensor, or one value per row, as a (1,) or (rows,) tensor of `dtype`.

    Differentiable in `value`. Where values cannot be read for free, those that are not positive become NaN.
    """
    if not isinstance(value, Tensor):
        return torch.full((1,), positive_float("temperature", value), dtype=dtype, device=device)
    if value.dtype not in FLOATS:
        raise TypeError(f"temperature must be a number or a floating tensor, got {value.dtype}")
    if value.numel() != 1 and tuple(value.shape) not in ((rows,), (rows, 1)):
        raise ValueError(
            f"temperature must be a number, a one-element tensor or one value per row, shape ({rows},) or ({rows}, 1), "
            f"got shape {tuple(value.shape)}"
        )
    if value.device != device and not (value.numel() == 1 and value.device.type == "cpu"):
        raise ValueError(f"temperature must be on {device} as query is, or one element on the CPU, got {value.device}")
    if values_are_free(value):
        if value.numel() == 1:
            positive_float("temperature", value.item())
        elif not (good := (value > 0) & value.isfinite()).all():
            raise ValueError(f"temperature must be positive and finite, got {value[~good].flatten()[0].item()}")
    flat = value.reshape(-1).to(dtype).contiguous()
    if value.device != device:  # one element: multiplying by a 0-d CPU tensor passes it as a kernel argument
        return torch.ones(1, dtype=dtype, device=device) * flat[0]
    return flat if values_are_free(value) else torch.where((flat > 0) & flat.isfinite(), flat, torch.nan)


def row_weight(value: Any, temperature: Tensor, query: Tensor) -> Tensor | None:
    """None, or (N,) that are not negative, in the dtype of the statistics; elsewhere than on a CPU bad ones are NaN."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"weight must be a floating tensor of shape ({query.shape[0]},), got {kind}")
    if value.shape != query.shape[:1]:
        raise ValueError(f"weight must have shape ({query.shape[0]},), got {tuple(value.shape)}")
    if value.device != query.device:
        raise ValueError(f"weight must be on {query.device} as query is, got {value.device}")
    good = (value >= 0) & value.isfinite()
    if values_are_free(value):
        if not good.all():
            raise ValueError(f"weight must not be negative, and finite, got {value[~good][0].item()}")
        return value.to(temperature.dtype)
    return torch.where(good, value, torch.nan).to(temperature.dtype)


def fraction(name: str, value: Any) -> float:
    number = real(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return number


def lowest_temperature(value: Any) -> float | None:
    """Of one that has been checked; None where reading it is not free."""
    if not isinstance(value, Tensor):
        return float(value)
    if not values_are_free(value) or not value.numel():
        return None
    return value.item() if value.numel() == 1 else value.min().item()


def target(value: object, rows: int, columns: int, ignore_index: int, device: torch.device) -> Tensor:
    """(rows,) indices below `columns`, with `ignore_index` as -1. Out of range: an error where values are free;
    elsewhere the index `columns`, which no backend reads and whose logit is NaN."""
    index = ids("target", value, (rows,), device)
    ignored = index == ignore_index
    bad = ~ignored & ((index < 0) | (index >= columns))
    if values_are_free(index) and bad.any():
        raise ValueError(
            f"target must be in [0, {columns}) or ignore_index ({ignore_index}), got {index[bad][0].item()}"
        )
    return torch.where(ignored, -1, torch.where(bad, columns, index))


def workspace_limit(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"workspace_limit must be a number of bytes or None, got {type(value).__name__}")
    if not 0 < value < 2**63:
        raise ValueError(f"workspace_limit must be positive and below 2**63, got {value}")
    return value


def info_nce(
    query: Any,
    positive_key: Any,
    negative_keys: Any,
    reduction: str,
    negative_mode: str,
    symmetric: bool,
    in_batch_negatives: bool | None,
    target: Any,
    backend: str,
) -> bool:
    """Everything about the modes and embeddings of `functional.info_nce`; returns whether in-batch negatives count."""
    one_of("reduction", reduction, REDUCTIONS)
    one_of("negative_mode", negative_mode, NEGATIVE_MODES)
    one_of("backend", backend, BACKENDS)
    if negative_keys is None and target is None and in_batch_negatives is None and alike(query, positive_key):
        return True
    embeddings("query", query, 2, "(N, D)")
    embeddings("positive_key", positive_key, 2, "(N, D)")
    tensors = {"query": query, "positive_key": positive_key}
    if negative_keys is not None:
        paired = negative_mode == "paired"
        embeddings("negative_keys", negative_keys, 3 if paired else 2, "(N, H, D)" if paired else "(M, D)")
        if paired and len(negative_keys) != len(query):
            raise ValueError(f"paired negative_keys must have {len(query)} rows as query has, got {len(negative_keys)}")
        tensors["negative_keys"] = negative_keys
    if target is None and positive_key.shape[0] != query.shape[0]:
        raise ValueError(
            f"positive_key must have {len(query)} rows as query has (or pass target), got {len(positive_key)}"
        )
    for name, tensor in tensors.items():
        if tensor.shape[-1] != query.shape[-1]:
            raise ValueError(f"{name} must have {query.shape[-1]} components as query has, got {tensor.shape[-1]}")
    same_kind(tensors)
    if symmetric and target is not None:
        raise ValueError("symmetric=True pairs query i with key i: it cannot be used with target")
    if in_batch_negatives is False and negative_keys is None:
        raise ValueError("in_batch_negatives=False leaves no negatives: pass negative_keys")
    return negative_keys is None if in_batch_negatives is None else bool(in_batch_negatives)


def all_ids(
    query_ids: Any,
    key_ids: Any,
    negative_ids: Any,
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None,
    keys_are_negatives: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if query_ids is None and key_ids is None and negative_ids is None:
        return None, None, None
    if query_ids is not None and key_ids is None and negative_ids is None:
        raise ValueError("query_ids alone compare with nothing: pass key_ids or negative_ids too")
    if negative_ids is not None and negative_keys is None:
        raise ValueError("negative_ids are the ids of negative_keys, which were not given")
    if negative_ids is not None and query_ids is None and key_ids is None:
        raise ValueError("negative_ids alone compare with nothing: pass key_ids or query_ids too")
    if key_ids is not None and negative_ids is None and not keys_are_negatives:
        raise ValueError(
            "key_ids have no effect where negative_keys replace the in-batch negatives without negative_ids"
        )
    return (
        None if query_ids is None else ids("query_ids", query_ids, (len(query),), query.device),
        None if key_ids is None else ids("key_ids", key_ids, (len(positive_key),), query.device),
        None if negative_ids is None or negative_keys is None
        else ids("negative_ids", negative_ids, tuple(negative_keys.shape[:-1]), query.device),
    )  # fmt: skip


def whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, got {value}")
    return value


def views(view_a: Any, view_b: Any, more_views: Any) -> list[Tensor]:
    """All views of `functional.nt_xent`, alike."""
    if more_views == () and alike(view_a, view_b):
        return [view_a, view_b]
    if isinstance(more_views, Tensor) or not isinstance(more_views, Sequence):
        raise TypeError(f"more_views must be a sequence of tensors of shape (N, D), got {type(more_views).__name__}")
    named = {"view_a": view_a, "view_b": view_b} | {f"more_views[{i}]": view for i, view in enumerate(more_views)}
    if not all(alike(view_a, view) for view in named.values()):
        for name, view in named.items():
            embeddings(name, view, 2, "(N, D)")
        same_kind(named)
        for name, view in named.items():
            if view.shape != view_a.shape:
                raise ValueError(f"{name} must have shape {tuple(view_a.shape)} as view_a has, got {tuple(view.shape)}")
    return list(named.values())


def sup_con(
    features: Any,
    labels: Any,
    mask: Any,
    temperature: Any,
    contrast_mode: str,
    base_temperature: Any,
    reduction: str,
    backend: str,
) -> float:
    """Everything about the arguments of `functional.sup_con` but values of tensors; returns the base temperature."""
    one_of("contrast_mode", contrast_mode, CONTRAST_MODES)
    one_of("reduction", reduction, REDUCTIONS)
    one_of("backend", backend, BACKENDS)
    if isinstance(features, Tensor) and features.dim() < 3:
        raise ValueError(f"features must have at least 3 dimensions (N, V, D), got shape {tuple(features.shape)}")
    embeddings("features", features, features.dim() if isinstance(features, Tensor) else 3, "(N, V, D)")
    n, views = features.shape[:2]
    if views == 0:
        raise ValueError(f"features must have at least one view, got shape {tuple(features.shape)}")
    if labels is not None and mask is not None:
        raise ValueError("labels and mask both say what the positives are: pass one of them")
    if labels is not None:
        column = isinstance(labels, Tensor) and labels.dim() == 2
        ids("labels", labels, (n, 1) if column else (n,), features.device, "features")
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor of shape ({n}, {n}), got {type(mask).__name__}")
        if mask.dtype not in (torch.bool, *INTEGERS, *FLOATS):
            raise TypeError(f"mask must be bool, integers or floats, got {mask.dtype}")
        if mask.shape != (n, n):
            raise ValueError(f"mask must have shape ({n}, {n}), got {tuple(mask.shape)}")
        if mask.device != features.device:
            raise ValueError(f"mask must be on {features.device} as features is, got {mask.device}")
        if mask.requires_grad:
            raise ValueError("mask must not require a gradient: it has none")
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        raise ValueError(f"temperature must be a number or a one-element tensor, got shape {tuple(temperature.shape)}")
    return positive_float("base_temperature", base_temperature)


def mask_weights(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`, not negative; elsewhere than on a CPU bad ones are NaN."""
    if mask.dtype in (torch.bool, torch.uint8):
        return mask.to(dtype)
    good = (mask >= 0) & mask.isfinite()
    if not values_are_free(mask):
        return torch.where(good, mask, torch.nan).to(dtype)
    if not good.all():
        raise ValueError(f"mask must not be negative, and finite, got {mask[~good][0].item()}")
    return mask.to(dtype)
