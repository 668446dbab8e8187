"""Base classes of the losses as modules: they hold options and a temperature, and their forward calls a function."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from .. import checks, contrast
from ..backends import BackendName, Reduction
from ..backends.plan import Plan
from ..backends.recording import Recorded, recorded, recordings
from ..compose.arguments import NEGATIVE_MODES, NegativeMode
from ..distributed import DistributedLike, of_module, options_of
from ..distributed.exchange import Exchange
from ..temperature.scale import HasTemperature, TemperatureLike

Negatives = Literal["views", "keys"]
COMMON = (
    "reduction",
    "normalize",
    "backend",
    "workspace_limit",
    "distributed",
)  # options that the functions of all losses take
OF_KEYS = ("symmetric", "negative_mode", "in_batch_negatives", "ignore_index")  # options of negatives="keys" only
OF_VIEWS = (False, "unpaired", None, -100)  # and their values for negatives="views"
COMPILED = (
    "record=True keeps tensors of a call, which code of torch.compile does not: set record = False, or call "
    "torch.compiler.disable(loss) in place of loss"
)
TEMPERATURE = ("temperature", "learnable_temperature", "max_logit_scale")


class Plans(tuple[Plan | Exchange, ...]):
    """The plans of a call, one for each matrix of scores that it goes over, and the exchanges between processes that it
    takes; they print a line each."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


class Explained(nn.Module):
    """A module that can say how a call of it would be computed."""

    if TYPE_CHECKING:  # nn.Module's returns Any

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...

    def explain(self, *args: Any, **kwargs: Any) -> Plans:
        """Return how a call with these arguments would be computed, and why, without computing scores.

        The answer depends on whether the inputs require gradients. Arguments that the call refuses raise its errors.
        """
        with contrast.explaining() as plans:
            self(*args, **kwargs)
        return Plans(plans)

    def __prepare_scriptable__(self) -> Explained:
        """Refuse `torch.jit.script`, which calls this first, and which cannot read keyword-only arguments."""
        raise TypeError(f"{type(self).__name__} cannot be compiled by torch.jit.script: use torch.compile")


class ContrastiveLoss(HasTemperature, Explained):
    """The options that all losses hold.

    Args:
        temperature, learnable_temperature, max_logit_scale: see `HasTemperature`.
        reduction: "mean", "sum" or "none".
        normalize: divide every row by its norm first.
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch; None: 64 MiB on a CPU, 1/128 of a GPU's memory, or what the environment says.
        distributed: whose rows make one batch: False, True, a process group, a mesh, or a `Distributed`.
        record: keep what the rows of the last call were made of in `recorded`: the positives' logits, and the
            logsumexps and mean logits of the negatives.
    """

    recorded: Recorded | None = None  # of the last call, where `record` asks for it
    _record, _over_processes = False, False
    no_softmax = ""  # what the rows of this loss are where they are no softmax over keys
    own: tuple[str, ...] = ()  # options that the loss's function takes besides those that every loss has

    def __init__(
        self, temperature: TemperatureLike | None, learnable_temperature: bool, max_logit_scale: float | None,
        reduction: Reduction, normalize: bool, backend: BackendName, workspace_limit: int | None,
        distributed: DistributedLike = False, record: bool = False,
    ):  # fmt: skip
        super().__init__(temperature, learnable_temperature, max_logit_scale)
        checks.one_of("reduction", reduction, checks.REDUCTIONS)
        checks.one_of("backend", backend, checks.BACKENDS)
        checks.flags(normalize=normalize)
        self.reduction = reduction
        self.normalize = normalize
        self.backend = backend
        self.workspace_limit = checks.workspace_limit(workspace_limit)
        self.distributed = distributed
        self.record = record

    def hold_options_of_keys(
        self, symmetric: bool, negative_mode: NegativeMode, in_batch_negatives: bool | None, ignore_index: int
    ) -> None:
        """Check and hold the options of a loss of queries against keys, all of which `info_nce` explains."""
        checks.flags(symmetric=symmetric)
        checks.one_of("negative_mode", negative_mode, NEGATIVE_MODES)
        checks.one_of("in_batch_negatives", in_batch_negatives, (True, False, None))
        self.symmetric = symmetric
        self.negative_mode = negative_mode
        self.in_batch_negatives = in_batch_negatives
        self.ignore_index = checks.whole("ignore_index", ignore_index, -(2**63))

    @property
    def distributed(self) -> DistributedLike:
        """The processes whose rows make one batch, which may be assigned."""
        return self._distributed

    @distributed.setter
    def distributed(self, value: DistributedLike) -> None:
        over_processes = options_of(value) is not None  # or it refuses the value
        self._choose_forward(self._record, over_processes)
        self._distributed, self._over_processes = value, over_processes

    @property
    def record(self) -> bool:
        """Whether a call keeps `recorded`, which may be assigned.

        `recorded` is a named tuple (pos, neg, mean, temperature, keys, counted) of detached (R,) tensors: the logit of
        each row's positive, the logsumexp and the mean logit of its negatives, its temperature, and whether the loss
        counts it; `keys` is the number of keys that a row was scored against. R is N, and 2 N where both directions of
        N pairs are scored, the queries against the keys first. They are what the loss makes anyway: no scores are made
        again, and nothing waits for a GPU. They are of the last call, and None before the first. Under `torch.compile`
        a call is a RuntimeError.
        """
        return self._record

    @record.setter
    def record(self, value: bool) -> None:
        checks.flags(record=value)
        self._choose_forward(value, self._over_processes)
        self._record = value

    def _choose_forward(self, record: bool, over_processes: bool) -> None:
        """Put the forward that these options ask for in place of the class's, which alone pays nothing for them.

        A forward that is not the loss's own, such as a library's around it, holds what the options were: another one
        would drop it.
        """
        if self._forward_is_replaced():
            if (record, over_processes) != (self._record, self._over_processes):
                raise RuntimeError(
                    f"the forward of this {type(self).__name__} has been replaced, by {vars(self)['forward']!r}, which "
                    "record and distributed would drop: set them before"
                )
            return
        vars(self).pop("forward", None)
        if record:
            vars(self)["forward"] = self._recording_forward
        elif over_processes:
            vars(self)["forward"] = self._told_forward

    def _forward_is_replaced(self) -> bool:
        """Return whether this object has a forward that neither its class nor its options gave it."""
        held = vars(self).get("forward")
        own = ContrastiveLoss._recording_forward, ContrastiveLoss._told_forward
        return held is not None and getattr(held, "__func__", None) not in own

    def _recording_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            raise RuntimeError(COMPILED)
        self.check_record()
        forward = self._told_forward if self._over_processes else type(self).forward.__get__(self)
        with recordings.taken() as notes:
            loss = forward(*args, **kwargs)
        if notes:
            self.recorded = recorded(notes)
        elif not contrast.is_explaining():  # parts of a call may be compiled apart
            raise RuntimeError(COMPILED)
        return loss

    def check_record(self) -> None:
        """Raise a ValueError where the rows of this loss are no softmax, which there is something to record of."""
        if self.no_softmax:
            raise ValueError(f"record keeps statistics of a softmax: {self.no_softmax}, has none")

    @of_module
    def _told_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return type(self).forward(self, *args, **kwargs)

    def _replicate_for_data_parallel(self) -> ContrastiveLoss:
        replica: ContrastiveLoss = super()._replicate_for_data_parallel()  # of `nn.DataParallel`
        replica._choose_forward(self._record, self._over_processes)  # that of the replica
        return replica

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("recorded",) if self._forward_is_replaced() else ("forward", "recorded")
        return {name: value for name, value in vars(self).items() if name not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.distributed = vars(self).get("_distributed", False)  # whose forward is bound to this copy

    @property
    def options(self) -> dict[str, Any]:
        """The options that the loss's function takes, by name."""
        return {name: getattr(self, name) for name in (*self.own, *COMMON)}

    def extra_repr(self) -> str:
        """Show the temperature, the reduction, and every other option that is not at its default."""
        shown = self.shown_temperature() | {"reduction": self.reduction}
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = parameter.default if name in TEMPERATURE else getattr(self, name, parameter.default)
            if value is not parameter.default and value != parameter.default:
                shown[name] = value
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class PairLoss(ContrastiveLoss):
    """The base of DCLLoss and DebiasedLoss: a loss of two views of a batch, or of queries against keys.

    Args:
        negatives: "views" (the two inputs are views of a batch, and the rows of both views of other samples are the
            negatives) or "keys" (the inputs are queries and keys).
        symmetric, negative_mode, in_batch_negatives, ignore_index: options of `info_nce`, for negatives="keys" only.
    """

    def __init__(
        self, negatives: Negatives, symmetric: bool, negative_mode: NegativeMode, in_batch_negatives: bool | None,
        ignore_index: int, **options: Any,
    ):  # fmt: skip
        super().__init__(**options)
        checks.one_of("negatives", negatives, get_args(Negatives))
        self.hold_options_of_keys(symmetric, negative_mode, in_batch_negatives, ignore_index)
        if negatives == "views" and (symmetric, negative_mode, in_batch_negatives, ignore_index) != OF_VIEWS:
            raise ValueError(f"{', '.join(OF_KEYS[:-1])} and {OF_KEYS[-1]} are options of negatives='keys'")
        self.negatives = negatives

    def of_keys(self, **given: Any) -> dict[str, Any]:
        """Return the arguments that only the function of keys takes; with negatives="views" none may be given."""
        if self.negatives == "keys":
            return given | {name: getattr(self, name) for name in OF_KEYS}
        for name, value in given.items():
            if value is not None:
                why = ": those of two views are their other rows" if name == "negative_keys" else ""
                raise ValueError(f"{name} needs negatives='keys'{why}")
        return {}
