"""The checks of user input that losses share, in one style: what was expected, then what came.

Nothing here launches device work except the checks of CPU values, which cost nothing there. Where reading a tensor's
values is not free, on a GPU or while `torch.compile` records or `torch.func` transforms, a bad value becomes NaN in
place of an error.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, get_args

import torch
from torch import Tensor

from .backends import BackendName, Reduction
from .backends.contract import Temperature
from .backends.plan import checked_limit
from .backends.precision import statistics_dtype

REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
SMALLEST = 1e-30


def one_of(name: str, value: object, allowed: tuple[str | bool | None, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def embeddings(name: str, value: object, dims: int, shape: str) -> None:
    """Check that `value` is a dense floating tensor with `dims` dimensions; `shape` says it in words."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(value).__name__}")
    dense(name, value)
    if value.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions {shape}, got shape {tuple(value.shape)}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")


def dense(name: str, value: Tensor) -> None:
    """Check that a tensor is neither sparse nor nested: PyTorch's own error would name an operator that it lacks."""
    if value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested tensor")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor (use .to_dense()), got {value.layout}")


def with_values(name: str, value: Tensor) -> None:
    """Check that a tensor is not on the meta device, as those of a model are that was made without its weights."""
    if value.is_meta:
        raise TypeError(f"{name} must hold values, got a tensor on the meta device")


def ids(
    name: str, value: object, shape: tuple[int, ...], device: torch.device, like: str = "query", several: bool = False
) -> Tensor:
    """Return an integer tensor of exactly this shape as int64; with `several`, it may have one dimension more."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be an integer tensor of shape {shape}, got {type(value).__name__}")
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name} must be an integer tensor, got {value.dtype}")
    dense(name, value)
    found = tuple(value.shape)
    if found != shape and not (several and found[:-1] == shape and found[-1] > 0):
        more = f" or {str(shape).removesuffix(',)').removesuffix(')')}, I)" if several else ""
        raise ValueError(f"{name} must have shape {shape}{more}, got {found}")
    on(name, value, device, like)
    return value.long()


def mask(name: str, value: object, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a tensor of booleans of exactly this shape."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a bool tensor of shape {shape}, got {kind}")
    dense(name, value)
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    on(name, value, device)
    return value


def on(name: str, value: Tensor, device: torch.device, like: str = "query") -> None:
    if value.device != device:
        raise ValueError(f"{name} must be on {device} as {like} is, got {value.device}")


def alike(query: Any, key: Any) -> bool:
    """Return whether these are what a call most often has, so that there is nothing to say about them."""
    if type(query) is not Tensor or type(key) is not Tensor or query.dtype not in FLOATS:
        return False
    if query.layout is not torch.strided or key.layout is not torch.strided or query.is_meta:
        return False
    if query.is_nested or key.is_nested:  # which have no shape
        return False
    return query.dim() == 2 and query.shape == key.shape and query.dtype == key.dtype and query.device == key.device


def same_kind(tensors: dict[str, Tensor]) -> None:
    """Check for one device and one dtype; under autocast only float64 must not be mixed with others."""
    (first_name, first), *rest = tensors.items()
    with_values(first_name, first)
    for name, tensor in rest:
        on(name, tensor, first.device, first_name)
        castable = torch.is_autocast_enabled(first.device.type) and torch.float64 not in (tensor.dtype, first.dtype)
        if tensor.dtype != first.dtype and not castable:
            raise TypeError(
                f"{name} must be {first.dtype} as {first_name} is, got {tensor.dtype} "
                "(under autocast 16-bit and 32-bit inputs may mix)"
            )


def real(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if torch.compiler.is_compiling():
        return value  # type: ignore[return-value]  # which may be symbolic
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got {value}") from None


def finite(name: str, value: Any) -> float:
    number = real(name, value)
    if not torch.compiler.is_compiling() and not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value}")
    return number


def positive_float(name: str, value: Any) -> float:
    number = value if type(value) is float else real(name, value)
    if not SMALLEST < number < 1 / SMALLEST:
        raise ValueError(f"{name} must be positive and finite, also in float32, got {value}")
    return number


def one_temperature(name: str, value: Any) -> float:
    """Return a temperature as a number, from one or from a tensor of one element such as a loss holds."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number for all rows, got shape {tuple(value.shape)}")
        value = value.item()
    return positive_float(name, value)


def not_negative(name: str, value: Any) -> float:
    number = real(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must not be negative, and finite, got {value}")
    return number


def flags(**values: object) -> None:
    """Check options that are True or False."""
    for name, value in values.items():
        one_of(name, value, (True, False))


def text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")


def fraction(name: str, value: Any) -> float:
    number = real(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return number


def whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, got {value}")
    return int(value)


def values_are_free(tensor: Tensor) -> bool:
    """Return whether values can be read without a synchronisation; a transform of `torch.func` has none to read."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return tensor.is_cpu


def only(name: str, value: Tensor, good: Tensor, must: str) -> Tensor:
    """Return a floating tensor whose elements are all `good`: an error that says what they `must`, or NaN elsewhere."""
    if not values_are_free(value):
        return torch.where(good, value, torch.nan)
    if not good.all():
        raise ValueError(f"{name} must {must}, got {value[~good].flatten()[0].item()}")
    return value


def per_row(name: str, value: Any, like: Tensor, *, number: bool = False, column: bool = False) -> None:
    """Check for one float a row of `like`, (N,); also for (N, 1) with `column`; `number` only widens the message."""
    n = like.shape[0]
    shape = f"({n},) or ({n}, 1)" if column else f"({n},)"
    expected = f"a number or a floating tensor of shape {shape}" if number else f"a floating tensor of shape {shape}"
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be {expected}, got {kind}")
    dense(name, value)
    if tuple(value.shape) not in ((n,), *([(n, 1)] if column else [])):
        raise ValueError(f"{name} must be {expected}, got shape {tuple(value.shape)}")
    on(name, value, like.device)


def scale_tensor(name: str, value: Tensor, like: Tensor) -> float | None:
    """Check a temperature or its inverse: one positive element, on the CPU too, or one a row. Return the least of its
    values, or None where these cannot be read."""
    n = like.shape[0]
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be a number or a floating tensor, got {value.dtype}")
    dense(name, value)
    if value.numel() != 1 and tuple(value.shape) not in ((n,), (n, 1)):
        raise ValueError(
            f"{name} must be a number, a one-element tensor or one value per row, shape ({n},) or ({n}, 1), "
            f"got shape {tuple(value.shape)}"
        )
    if value.device != like.device and not (value.numel() == 1 and value.device.type == "cpu"):
        raise ValueError(f"{name} must be on {like.device} as query is, or one element on the CPU, got {value.device}")
    if not values_are_free(value):
        return None
    if value.numel() == 1:
        return positive_float(name, value.item())
    only(name, value, (value > 0) & value.isfinite(), "be positive and finite")
    return value.min().item() if value.numel() else None


def temperature(value: Any, like: Tensor, dtype: torch.dtype, name: str = "temperature") -> Temperature:
    """Return a positive number, a one-element tensor or one value a row of `like` as a `Temperature`, differentiable.

    Where values cannot be read for free, those that are not positive become NaN.
    """
    if not isinstance(value, Tensor):
        return Temperature(None, positive_float(name, value), dtype, like.device)
    lowest = scale_tensor(name, value, like)
    if value.dim() > 1:
        value = value.reshape(-1)
    if value.dtype != dtype or not value.is_contiguous():
        value = value.to(dtype).contiguous()
    found = Temperature(_beside(value, like), lowest, raw=True)
    if torch.compiler.is_compiling():  # a Function may make no tensor inside
        return Temperature(found.values, lowest)
    return found


def one_number(name: str, value: Any) -> None:
    """Check for a number or a floating tensor of one element."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number or a one-element tensor, got {type(value).__name__}")
        return
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be a number or a floating tensor, got {value.dtype}")
    dense(name, value)
    if value.numel() != 1:
        raise ValueError(f"{name} must be a number or a one-element tensor, got shape {tuple(value.shape)}")


def logit_bias(name: str, value: Any, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a finite number or a tensor of one element, on the CPU too, as (1,) beside `like`, differentiable.

    Where values cannot be read for free, one that is not finite becomes NaN.
    """
    one_number(name, value)
    if not isinstance(value, Tensor):
        return torch.full((1,), finite(name, value), dtype=dtype, device=like.device)
    if value.device != like.device and value.device.type != "cpu":
        raise ValueError(f"{name} must be on {like.device}, or one element on the CPU, got {value.device}")
    if values_are_free(value):
        finite(name, value.item())
    else:
        value = torch.where(value.isfinite(), value, torch.nan)
    return _beside(value.reshape(1).to(dtype), like)


def _beside(value: Tensor, like: Tensor) -> Tensor:
    """Return a tensor on the device of `like`, as a vector if it has to move: it has one element then, on the CPU."""
    if value.device == like.device:
        return value
    # a product with a 0-d CPU tensor passes it as a kernel argument
    return torch.ones(1, dtype=value.dtype, device=like.device) * value.reshape(())


def number_or_tensor(name: str, value: Any) -> None:
    """Check what a module holds of a scale: a positive number or a floating tensor, its values where free."""
    if not isinstance(value, Tensor):
        positive_float(name, value)
    elif value.dtype not in FLOATS:
        raise TypeError(f"{name} must be a number or a floating tensor, got {value.dtype}")
    elif type(value) in (Tensor, torch.nn.Parameter) and values_are_free(value):  # unlike those of a DTensor
        only(name, value, (value > 0) & value.isfinite(), "be positive and finite")


def row_weight(value: Any, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return None, or one weight a row of `like`, none negative."""
    if value is None:
        return None
    per_row("weight", value, like)
    return only("weight", value, (value >= 0) & value.isfinite(), "not be negative, and finite").to(dtype)


def bias(name: str, value: Any, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return one bias a key, of exactly this shape, contiguous, in the dtype of the statistics of `like`.

    None may be NaN or inf; -inf is for a key that is left out.
    """
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating tensor of shape {shape}, got {kind}")
    dense(name, value)
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must be a floating tensor of shape {shape}, got shape {tuple(value.shape)}")
    on(name, value, like.device)
    good = value < math.inf  # which NaN is not
    return only(name, value, good, "be finite, or -inf to leave a key out").to(statistics_dtype(like)).contiguous()


def positive_weight(value: Any, shape: tuple[int, int], like: Tensor) -> Tensor:
    """Return one weight a positive, none negative."""
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"positive_weight must be a floating tensor of shape {shape}, got {kind}")
    dense("positive_weight", value)
    if tuple(value.shape) != shape:
        raise ValueError(f"positive_weight must have shape {shape} as target has, got {tuple(value.shape)}")
    on("positive_weight", value, like.device)
    if value.requires_grad:
        raise ValueError("positive_weight must not require a gradient: it is a constant of the loss")
    return only("positive_weight", value, (value >= 0) & value.isfinite(), "not be negative, and finite")


def target(value: object, like: Tensor, columns: int, ignore_index: int, several: bool = False) -> Tensor:
    """Return (N,) indices below `columns`, with `ignore_index` as -1; with `several`, of any (N, P).

    Out of range is an error where values are free; elsewhere it becomes the index `columns`, which no backend reads and
    whose logit is NaN.
    """
    shape = tuple(value.shape) if several and isinstance(value, Tensor) else like.shape[:1]
    index = ids("target", value, (like.shape[0], *shape[1:]), like.device)
    return _below(columns, "target", index, ignore_index, f"ignore_index ({ignore_index})")


def places(name: str, value: object, size: int, device: torch.device, like: str = "the table") -> Tensor:
    """Return (N,) indices below `size` as int64.

    Out of range is an error where values are free; elsewhere PyTorch's own look-up stops.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be an integer tensor of shape (N,), got {type(value).__name__}")
    if value.dim() != 1:
        raise ValueError(f"{name} must have 1 dimension (N,), got shape {tuple(value.shape)}")
    index = ids(name, value, tuple(value.shape), device, like)
    if values_are_free(index):
        bad = (index < 0) | (index >= size)
        if bad.any():
            raise ValueError(f"{name} must be in [0, {size}), got {index[bad][0].item()}")
    return index


def negative_index(value: object, like: Tensor, table: Tensor) -> Tensor:
    """Return (N, H) indices of rows of a table, or -1, which is no negative. Out of range is what it is of a target."""
    expected = f"({len(like)}, H)"
    if not isinstance(value, Tensor):
        raise TypeError(f"negative_index must be an integer tensor of shape {expected}, got {type(value).__name__}")
    dense("negative_index", value)
    if value.dim() != 2 or len(value) != len(like):
        raise ValueError(f"negative_index must have shape {expected}, got {tuple(value.shape)}")
    index = ids("negative_index", value, tuple(value.shape), like.device)
    return _below(len(table), "negative_index", index, -1, "-1 (no negative)")


def _below(columns: int, name: str, index: Tensor, ignored_value: int, ignored_name: str) -> Tensor:
    """Return indices below `columns`, or -1 for what is ignored, or `columns` for what is neither."""
    if values_are_free(index) and index.numel() and not 0 <= ignored_value < columns:
        least, most = torch.aminmax(index)
        if least.item() >= (-1 if ignored_value == -1 else 0) and most.item() < columns:
            return index  # the usual case: nothing to tell apart
    ignored = index == ignored_value
    bad = ~ignored & ((index < 0) | (index >= columns))
    if values_are_free(index) and bad.any():
        raise ValueError(f"{name} must be in [0, {columns}) or {ignored_name}, got {index[bad][0].item()}")
    return torch.where(ignored, -1, torch.where(bad, columns, index))


def workspace_limit(value: Any) -> int | None:
    return checked_limit("workspace_limit", value)
