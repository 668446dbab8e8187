"""The option `distributed` of a loss, and one call of it as a rank sees it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor

from .. import contrast
from . import preflight

if TYPE_CHECKING:
    from .communicator import Communicator

Gradients = Literal["mean", "sum"]
Exchange = Literal["auto", "gather", "stream"]
Check = Literal["sizes", "values", "none"]
NUMBER, ONE, ROWS = 0, 1, 2  # what a temperature is: a number, a tensor for all rows, or one of a value a row
KINDS = 3  # of these
TOLD = "_ranks_are_told"  # an attribute of an error
NOT_A_MEMBER = -100  # what `torch.distributed.new_group` returns to a process outside
OUTSIDE = "distributed names a process group that this process is not in"


@dataclass(frozen=True)
class Distributed:
    """How a loss takes the rows of all processes of a group for one batch.

    Args:
        group: a `ProcessGroup`, a one-dimensional `DeviceMesh`, or None, the default group.
        parameter_gradients: what becomes of the parameters' gradients afterwards. "mean": they are averaged over the
            ranks, as DDP and FSDP do, so that embeddings get W times the gradient of the global loss, and a learnable
            temperature its whole gradient on every rank. "sum": they are added, and each rank has its part.
        exchange: "auto", "gather" (all rows are gathered at once) or "stream" (in parts).
        check: what ranks compare before a call: "sizes" (shapes, dtypes and options), "values" (also the value of a
            temperature that all rows share), or "none" (nothing: all ranks must pass equally many rows, with
            the same workspace limit, and a mistake on one may make the others wait for it).
    """

    group: Any = None
    parameter_gradients: Gradients = "mean"
    exchange: Exchange = "auto"
    check: Check = "sizes"

    def __post_init__(self) -> None:
        for name, kinds in (("parameter_gradients", Gradients), ("exchange", Exchange), ("check", Check)):
            if getattr(self, name) not in get_args(kinds):
                allowed = ", ".join(map(repr, get_args(kinds)))
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        _check_group(self.group)

    def __repr__(self) -> str:
        shown = [f"{name}={getattr(self, name)!r}" for name in ("parameter_gradients", "exchange", "check")]
        return f"Distributed({', '.join(shown)})"


DistributedLike = Any  # bool | Distributed | ProcessGroup | DeviceMesh; inside the library a Call


class Call:
    """One call of a loss as this rank makes it, with the ranks that make it too."""

    def __init__(self, communicator: Communicator, options: Distributed):
        self.communicator, self.options = communicator, options
        self.rank, self.world = communicator.rank, communicator.world
        self.met = contrast.is_explaining()  # whether this rank has told the others that its arguments are good
        self.temperatures = NUMBER  # what the temperature is, on all ranks once they have met
        self.noted = ""  # what must be the same on every rank, beside what `counts` is given
        self.keys: list[int] = []  # the numbers of rows of all ranks, of the first set of keys
        self.limit = 0  # the least workspace limit of all ranks, in bytes, once they have met
        self.takes_unit_rows = False  # whether every rank's backend takes them, once they have met
        self.own_guide = False  # whether the rows are their own guide, and travel once: by the loss, on all ranks

    @property
    def factor(self) -> int:
        """By how much gradients of the global loss are multiplied, so that their mean over the ranks is their sum."""
        return self.world if self.options.parameter_gradients == "mean" else 1

    def counts(
        self, signature: str, values: str, sizes: Sequence[int], limit: int = 0, takes_unit_rows: bool = False
    ) -> list[list[int]]:
        """Return the numbers of rows of all ranks, in rank order, for each of this rank's `sizes`.

        signature: what must be the same on every rank. values: what must be so with check="values", but where rows have
        temperatures of their own, which may be equal in a rank of one row. limit: this rank's workspace
        limit, of which `Call.limit` becomes the least: GPUs may differ, but not the parts of an exchange. The same of
        whether its backend takes unit rows, since the ranks' backends may differ, but not what travels.
        """
        number, self.limit, self.takes_unit_rows = self.begin(), limit, takes_unit_rows
        check = self.options.check
        if check == "none" or contrast.is_explaining():
            return [[size] * self.world for size in sizes]
        signature = f"{self.noted}{signature} {self.options}"
        own = (limit * 2 + takes_unit_rows) * KINDS + self.temperatures
        said = preflight.agree(self.communicator, number, signature, [*sizes, own])
        kinds = [words[len(sizes)] % KINDS for words in said]
        self.limit = min(words[len(sizes)] // KINDS // 2 for words in said)
        self.takes_unit_rows = all(words[len(sizes)] // KINDS % 2 for words in said)
        if ROWS in kinds:  # where a temperature of one element is that of a rank's only row
            for rank, words in enumerate(said):
                if kinds[rank] != ROWS and words[0] != 1:
                    first = kinds.index(ROWS)
                    raise ValueError(
                        f"the ranks' calls differ: the temperature is one for all rows on rank {rank}, one a row on "
                        f"rank {first}"
                    )
            self.temperatures = ROWS
        elif check == "values":
            preflight.compare(self.communicator, number, values)
        return [[words[i] for words in said] for i in range(len(sizes))]

    def begin(self) -> int:
        """Return the number of this rank's next message to the others: ranks that differ are at different calls."""
        self.met = True
        if torch.compiler.is_compiling() and self.options.check == "none":
            return 0
        _numbers[self.communicator] = _numbers.get(self.communicator, 0) + (not contrast.is_explaining())
        return _numbers[self.communicator]

    def unique(self, ids: Tensor) -> Tensor:
        """Return ids of this rank's rows by which they differ from those of all other ranks."""
        return ids * self.world + self.rank

    def start(self, counts: Sequence[int]) -> int:
        """Return the place of this rank's first row among those of all."""
        return sum(counts[: self.rank])

    def failed(self, error: BaseException) -> None:
        """Tell the other ranks of an error, once, before they wait for this one's rows in vain."""
        told = getattr(error, TOLD, False)
        setattr(error, TOLD, True)
        if self.met or told:
            return
        number = self.begin()
        if self.options.check != "none":
            preflight.report(self.communicator, number, error)


_numbers: weakref.WeakKeyDictionary[Communicator, int] = weakref.WeakKeyDictionary()  # of calls made so far
_communicators: weakref.WeakKeyDictionary[Any, Communicator] = weakref.WeakKeyDictionary()  # of process groups


def options_of(value: Any) -> Distributed | None:
    """Return the options that a user's `distributed` stands for; None for False.

    Raises:
        TypeError: it is none of what a loss takes.
    """
    if value is False or value is None:
        return None
    if value is True:
        return Distributed()
    if isinstance(value, Distributed):
        return value
    return Distributed(value)


def _check_group(value: Any) -> None:
    if value is None or (isinstance(value, int) and value == NOT_A_MEMBER) or _is_group(value):
        return
    raise TypeError(
        "distributed must be True, False, a ProcessGroup, a one-dimensional DeviceMesh or a Distributed, got "
        f"{type(value).__name__}"
    )


def _is_group(value: Any) -> bool:
    return hasattr(value, "all_gather_host") or hasattr(value, "get_group") or hasattr(value, "allreduce")


def communicator_of(group: Any, silent: bool = False) -> Communicator:
    """Return the communicator of a group of `Distributed`; silent: whether hosts have nothing to tell each other.

    Raises:
        RuntimeError: there is no process group. ValueError: a mesh of several dimensions, or this process is outside.
    """
    if isinstance(group, int):  # NOT_A_MEMBER
        raise ValueError(OUTSIDE)
    if hasattr(group, "all_gather_host"):
        return cast("Communicator", group)
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("distributed=True needs a process group: call torch.distributed.init_process_group first")
    if hasattr(group, "get_group"):
        if group.ndim != 1:
            raise ValueError(
                f"a DeviceMesh must have one dimension, got {group.ndim}: pass mesh['name'] of one of them"
            )
        group = group.get_group()
    group = dist.group.WORLD if group is None else group
    if dist.get_rank(group) < 0:
        raise ValueError(OUTSIDE)
    from .communicator import GroupCommunicator, RecordedCommunicator

    if torch.compiler.is_compiling() and silent:
        return RecordedCommunicator(group)
    if group not in _communicators:
        _communicators[group] = GroupCommunicator(group)
    return _communicators[group]


F = TypeVar("F", bound=Callable[..., Any])


def together(loss: F) -> F:
    """Make a loss's `distributed` argument a `Call`, or None, and an error on one rank an error on all."""

    defaults = {name: parameter.default for name, parameter in inspect.signature(loss).parameters.items()}

    @functools.wraps(loss)
    def called(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("distributed", False) is False:
            return loss(*args, **kwargs)
        return _called(loss, defaults, args, kwargs)

    return cast(F, called)


def _called(loss: Callable[..., Any], defaults: dict[str, Any], args: Any, kwargs: dict[str, Any]) -> Any:
    given = kwargs["distributed"]
    if isinstance(given, Call):  # of a loss that calls this one
        return loss(*args, **kwargs)
    options = options_of(given)
    if options is None:
        return loss(*args, **kwargs | {"distributed": False})
    call = Call(communicator_of(options.group, options.check == "none"), options)
    names = [*defaults][: len(args)]
    given = {**dict(zip(names, args[: len(names)], strict=True)), **kwargs}
    try:
        call.noted = f"{loss.__name__}({_said(given, defaults)}); "
        return loss(*args, **kwargs | {"distributed": call})
    except Exception as error:
        call.failed(error)
        raise


def of_module(forward: F) -> F:
    """Make an error of a method of an object with `distributed` one on all ranks, also before a loss is called."""

    @functools.wraps(forward)
    def called(module: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return forward(module, *args, **kwargs)
        except Exception as error:
            tell(module.distributed, error)
            raise

    return cast(F, called)


def tell(distributed: Any, error: Exception) -> None:
    """Tell the other ranks of an error that they may not know of."""
    with contextlib.suppress(RuntimeError, TypeError, ValueError):  # where there are no other ranks
        options = options_of(distributed)
        if options is not None:
            Call(communicator_of(options.group, options.check == "none"), options).failed(error)


# What may be a number on one rank and a tensor on another, or differ between them for good reasons.
ITS_OWN = {"temperature", "logit_scale", "logit_bias", "teacher_temperature", "tau_plus", "offset"}
ITS_OWN |= {"backend", "workspace_limit", "distributed"}


def _said(given: dict[str, Any], defaults: dict[str, Any]) -> str:
    """Return the options that are not at their defaults, and what tensors there are."""
    said = []
    for name in sorted(set(given) & set(defaults) - ITS_OWN):
        value, default = given[name], defaults[name]
        if default is None and isinstance(value, Tensor):
            said.append(name)
        if isinstance(value, (str, int, float)) and value != default:
            said.append(f"{name}={float(value) if isinstance(value, int) else value!r}")  # 1 is 1.0 and True
        elif isinstance(value, (tuple, list, set, frozenset)) and value and all(isinstance(x, str) for x in value):
            said.append(f"{name}={sorted(value)}")
    return ", ".join(said)
