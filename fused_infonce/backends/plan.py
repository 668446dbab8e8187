"""The choice of a plan for given shapes, and the reason for it: arithmetic on sizes only, no tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .contract import STATE_SLOTS

MIB = 2**20
CPU_LIMIT = 64 * MIB  # a block that a few caches can hold
OTHER_LIMIT = 256 * MIB  # of a device whose memory is not known
MEMORY_SHARE = 128  # this part of a GPU's memory is its limit: an estimate, not yet measured
LIMIT_VARIABLE = "FUSED_INFONCE_WORKSPACE_LIMIT"
LEAST_LIMIT = 2**16  # a number of MiB taken for one of bytes would run for minutes
# Of the CPU's thresholds DENSE_SELF has its runs in results/cpu.csv and notes.md; the others were tried, not recorded.
ROWS = 1024  # rows of a chunk in PyTorch: enough for a library GEMM to run at its full rate
ONEPASS_ROWS = 256  # with fewer rows a chunk, adding into the key gradients costs more than recomputing the scores
CPU_BLOCK = 2**21  # scores: 8 MiB in fp32, so that the elementwise passes stay in the last-level cache
DENSE = 2**18  # scores up to which a call costs more than its arithmetic
DENSE_SELF = 2**22  # of self-similarity, where blocks on the diagonal waste half of their scores: 2048 rows
TRIANGULAR_ROWS = 512  # side of a block of a symmetric score matrix: a smaller one wastes less on the diagonal
TRIANGULAR_SIDE = 6144  # at most, of a block on a GPU, whose diagonal is waste: an estimate, not yet measured
PRODUCT_SHARE = 4  # this part of the limit is for library products that cannot be added to float32 in place
GPU_DENSE = 2**24  # scores up to which a call on a GPU waits for its host: an estimate, not yet measured
GPU_DENSE_WIDE = 2**20  # of float32 and float64, multiplied without tensor cores: an estimate, not yet measured
GPU_SCORES_DIM = 256  # where scores are kept: below it a second product costs less than a pass over them: an estimate
# The four below are by a model (python -m benchmarks.tiles.model, results/model.csv) and not yet measured.
STREAMING_DIM = 32  # above it every other plan is ahead, since the masks and exponentials of three passes bound it
STREAMING_ROWS = 4096  # below it too few programs to fill a GPU
GPU_ONEPASS_ROWS = 1024  # with fewer in a chunk, adding to the keys' gradients costs more than scores made again
GPU_ONEPASS_DIM = 16  # the shortest rows that the model counts, of which one pass is ahead as it is of all others
STATE_BLOCK = 64  # columns of a tile, a state each: those of backends/triton/tiles.py, but for float64's 32
PROCESSORS = 132  # of the GPU that plans without one are made for: an H100's and an H200's
PRODUCT_ROWS, PRODUCT_WIDTHS = 128, (256, 128)  # of an output tile of a library product, one a processor: an estimate


@dataclass(frozen=True)
class Plan:
    """The way in which one call is computed.

    name: "forward" (statistics only), "onepass" (loss and gradients in the forward), "dense" (the same for few scores,
        all held at once), or where the backward recomputes the scores, "workspace" (blocks of coefficients and library
        GEMMs), "streaming" (accumulators in registers) or "triangular" (as workspace, with half of a symmetric matrix)
    rows, cols: the block of the N x M plane that is worked on at a time
    limit: bytes that may be allocated beyond inputs, gradients and their accumulators
    flops: of forward and backward, as a multiple of N M D; three bare matmuls are 6
    gradients: whether any input needs one
    bounded: whether exp of every logit is known to fit the accumulator
    full: whether mean and maximum are results, so that they are computed even where no gradient needs them
    mean: whether the mean is computed: it is a result, or the temperature's gradient is made of it
    record: whether a loss and its gradients come with the statistics of the rows
    as_is: whether inputs are known to be of the products' dtype, with autocast off
    value: whether a dense plan in PyTorch is of pairs of unit rows alone, and of their loss alone
    """

    name: str
    rows: int
    cols: int
    limit: int
    flops: float
    reason: str
    backend: str = ""
    gradients: bool = True
    bounded: bool = False
    full: bool = False
    mean: bool = True
    record: bool = False
    as_is: bool = False
    value: bool = False

    @property
    def one_pass(self) -> bool:
        """Return whether the loss and its gradients are made together."""
        return self.name in ("onepass", "dense")

    def __str__(self) -> str:
        limit = f"{self.limit / MIB:.0f} MiB" if self.limit >= MIB else f"{self.limit} bytes"
        work = "forward and backward" if self.gradients else "forward"
        memory = f"in blocks of {self.rows} x {self.cols} scores, with at most {limit} of workspace"
        return (
            f"{self.name} on the {self.backend} backend, because {self.reason}: {self.flops:g} N M D FLOPs {work} "
            f"(a matrix product of N queries and M keys is 2), {memory if self.name != 'reference' else 'all at once'}"
        )


def checked_limit(name: str, value: Any) -> int | None:
    """Return a number of bytes as it was given, by an argument or by the environment; None where it was not given."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer number of bytes or None, got {type(value).__name__}")
    if not LEAST_LIMIT <= value < 2**63:
        raise ValueError(_not_bytes(name, value))
    return value


def _not_bytes(name: str, value: int | str) -> str:
    example = f"256 MiB is 256 * 2**20 = {256 * MIB}"
    return f"{name} must be a number of bytes, {LEAST_LIMIT} (64 KiB) or more ({example}), got {value!r}"


def limit_of_environment() -> int | None:
    """Return the bytes of workspace that the environment asks for; None if it does not."""
    given = os.environ.get(LIMIT_VARIABLE)
    if given is None or not (text := given.strip()):
        return None
    if not text.isdecimal():
        raise ValueError(_not_bytes(LIMIT_VARIABLE, text))
    return checked_limit(LIMIT_VARIABLE, int(text))


@dataclass(frozen=True)
class Call:
    """The facts of a call that are known without reading a tensor."""

    backend: str
    device: str
    n: int  # rows
    m: int  # columns over all segments
    d: int
    itemsize: int  # bytes of an input
    acc_itemsize: int  # bytes of a logit
    gradients: bool  # whether any input needs one
    columns: bool  # whether the other direction is asked for too
    self_similar: bool  # whether the keys are the queries
    reduced: bool  # whether the loss is a weighted sum of row losses known in closed form
    per_row: bool  # whether rows have temperatures of their own
    plain: bool  # nothing but queries and keys: no ids, weights, targets (but in self-similarity), negatives apart
    bounded: bool  # whether exp of every logit is known to fit the accumulator
    limit: int  # bytes of workspace
    guided: bool = False  # whether a guide's scores are made beside every block of scores
    biased: bool = False  # whether keys have biases as negatives
    scores_bounded: bool = False  # whether exp of every logit without its bias is known to fit, even where not with it
    learned_biases: bool = False  # whether those of keys that all queries have have gradients
    joint: bool = False  # whether every key of every set is scored against every query: the scores are one matrix
    one_to_one: bool = False  # whether there is one set of keys, each of them the target of one query
    pairwise: bool = False  # whether a loss is a sum over pairs, so that every block of scores is final by itself
    processors: int = PROCESSORS  # of a GPU, which the output tiles of a library product are to fill

    @property
    def empty(self) -> bool:
        return self.n == 0 or self.m == 0

    @property
    def rows_alone(self) -> bool:
        """Return whether a block of rows against all columns has all that its part of a reduced loss is made of."""
        return self.reduced and not self.columns and not self.empty

    @property
    def shifts_fit(self) -> bool:
        """Return whether exp of every logit fits less a shift of its row that is known before: see triton/shifts.py."""
        return self.bounded or self.scores_bounded

    @property
    def value(self) -> bool:
        """Return whether the loss of pairs is all that is asked for, and each has negatives."""
        return self.reduced and self.plain and not self.gradients and self.m > 1 + self.self_similar

    @property
    def gpu_onepass_dim(self) -> int:
        """Return the shortest rows of one pass in one direction; it keeps scores where biases have gradients."""
        return GPU_SCORES_DIM if self.learned_biases else GPU_ONEPASS_DIM

    @property
    def both_at_once(self) -> bool:
        """Return whether a pass over all scores may serve both directions, where exponentials fit."""
        return self.reduced and self.columns and not self.per_row

    @property
    def room(self) -> int:
        """Return the bytes of the limit that library products leave on a GPU."""
        return self.limit - self.limit // PRODUCT_SHARE


# The first row whose condition holds: (plan, condition, N M D FLOPs of forward and backward, reason). Thresholds on a
# GPU are estimates for 16-bit rows on Hopper, taken for every architecture and dtype until one has been measured.
Rule = tuple[str, Callable[[Call], bool], float, str]
NO_GRADIENT = "no input requires a gradient"
HALF = "all rows are compared with one another, and half of a symmetric matrix will do"
AT_ONCE = "a block of queries meets all keys at once, which gives loss and gradients in one pass"
ALL_FIT = "all scores fit workspace_limit, which gives both directions and their gradients in one pass"
AGAIN = ": the backward computes the scores again"
BY_PAIRS = "a pair's loss needs no other pair, so that any block of scores gives loss and gradients at once"
ROWS_APART = "the rows' losses are not simply added up (reduction='none', or a loss with terms of its own)" + AGAIN
# fmt: off
PAIRWISE: tuple[Rule, ...] = (
    ("forward", lambda c: c.pairwise and not c.gradients, 2, NO_GRADIENT),
    ("onepass", lambda c: c.pairwise and c.reduced, 6, BY_PAIRS),
    ("workspace", lambda c: c.pairwise, 8, ROWS_APART),
)
TRITON: tuple[Rule, ...] = (
    *PAIRWISE,
    ("dense", lambda c: c.reduced and c.one_to_one and not c.biased and 0 < c.n * c.m <= _gpu_few(c), 6,
     "the scores are few, so that launching kernels would cost more than their arithmetic"),
    ("forward", lambda c: not c.gradients, 2, NO_GRADIENT),
    ("triangular", lambda c: c.self_similar and c.d > STREAMING_DIM, 4, HALF),
    ("streaming", lambda c: c.self_similar, 5,
     "all rows are compared with one another, half of whose scores are made at first, and one pass serves both sides"),
    ("onepass", lambda c: c.rows_alone and c.shifts_fit and c.d >= c.gpu_onepass_dim and _gpu_chunk(c) > 0, 6,
     AT_ONCE),
    ("onepass", lambda c: c.both_at_once and c.shifts_fit and c.joint and not c.guided and c.d >= GPU_SCORES_DIM
     and 0 < c.n * _gpu_bytes(c) <= c.room, 6, ALL_FIT),
    ("workspace", lambda c: c.biased, 8,
     "keys have biases, and loss and gradients do not come in one pass" + AGAIN),
    ("streaming", lambda c: c.d <= STREAMING_DIM and min(c.n, c.m) >= STREAMING_ROWS and not c.guided, 10,
     "embeddings are short, and the rows are enough to fill the device"),
    ("workspace", lambda c: True, 8, "embeddings are long, or the rows too few to fill the device"),
)
REFERENCE: tuple[Rule, ...] = (("reference", lambda c: True, 6, "backend='reference' holds all scores, however many"),)
FEW = "the scores are few, so that dividing them would cost more than it saves"
TORCH: tuple[Rule, ...] = (
    ("dense", lambda c: c.pairwise and c.reduced and c.one_to_one and not c.per_row and 0 < c.n * c.m <= _few(c), 6,
     FEW),
    *PAIRWISE,
    ("dense", lambda c: c.joint and not c.per_row and c.n * c.m <= _few(c), 6, FEW),
    ("triangular", lambda c: c.self_similar, 4, HALF),
    ("forward", lambda c: not c.gradients, 2, NO_GRADIENT),
    ("onepass", lambda c: c.rows_alone and _chunk(c) >= min(c.n, ONEPASS_ROWS), 6, AT_ONCE),
    ("onepass", lambda c: c.both_at_once and c.bounded and not c.empty and c.n <= _chunk(c) - _chunk(c) // 8, 6,
     ALL_FIT),
    ("workspace", lambda c: c.empty, 8, "there is nothing to compare"),
    ("workspace", lambda c: c.columns, 8,
     "both directions are asked for, and that of the keys is complete after the last query only" + AGAIN),
    ("workspace", lambda c: c.reduced, 8, "too few queries fit workspace_limit beside all keys" + AGAIN),
    ("workspace", lambda c: True, 8, ROWS_APART),
)
# fmt: on


def choose(
    full: bool = False, mean: bool = True, record: bool = False, as_is: bool = False, pairs: bool = False, **sizes: Any
) -> Plan:  # fmt: skip
    """Return the plan of one call, from the fields of `Call`; full, mean, record, as_is: as in `Plan`.

    pairs: whether there is nothing but pairs of unit rows.
    """
    call = Call(**sizes)
    rules, blocks = RULES[call.backend]
    name, _, flops, reason = next(rule for rule in rules if rule[1](call))
    halved = call.self_similar and call.backend != "reference"
    if name == "dense" and halved:
        flops = 4
    if not call.gradients:
        flops = 1 if halved and name != "dense" else 2
    rows, cols = blocks("workspace" if call.pairwise and name not in ("dense", "reference") else name, call)
    return Plan(
        name, rows, cols, call.limit, flops, reason, call.backend, call.gradients, call.bounded, full, mean, record,
        as_is, name == "dense" and call.backend == "torch" and pairs and call.value and not (full or record),
    )  # fmt: skip


def _few(call: Call) -> int:
    """Return how many scores the dense plan may hold a few times."""
    if call.device != "cpu" or call.empty:
        return -1
    widened = (call.n + call.m) * call.d * call.acc_itemsize  # all rows at once, where they are of 16 bits
    if call.itemsize < call.acc_itemsize and widened > call.limit // 4:
        return -1
    matrices = 2 + (not call.bounded) + (not (call.reduced and call.plain)) + call.guided + call.biased
    most = DENSE_SELF if call.self_similar and call.reduced else DENSE
    return min(most, call.limit // (matrices * call.acc_itemsize))


def _gpu_few(call: Call) -> int:
    """Return how many scores the dense plan may hold on a GPU: dot products, and coefficients beside them."""
    most = GPU_DENSE if call.itemsize == 2 else GPU_DENSE_WIDE
    return min(most, call.room // (call.acc_itemsize + call.itemsize))


def _chunk(call: Call) -> int:
    """Return how many rows' scores against every column fit the limit.

    Beside a score lies a mask's byte where pairs are left out by ids, or a guide's score and what is made of it.
    """
    bytes_each = 3 * call.acc_itemsize if call.guided else call.acc_itemsize + (not call.plain)
    return call.limit // (bytes_each * max(call.m, 1))


def _gpu_chunk(call: Call) -> int:
    """Return the rows per chunk on a GPU whose exponentials and states fit; 0 if a chunk would be too short."""
    chunk = _filling(call.n, call.room // _gpu_bytes(call), call)
    return chunk if chunk >= min(call.n, GPU_ONEPASS_ROWS) else 0


def _gpu_bytes(call: Call) -> int:
    """Return the bytes of a row's exponentials or scores on a GPU, and of their states."""
    return call.itemsize * call.m + _state_bytes(call) * -(-call.m // STATE_BLOCK) * (1 + call.columns)


def _state_bytes(call: Call) -> int:
    return STATE_SLOTS * call.acc_itemsize


def _triton_block(name: str, call: Call) -> tuple[int, int]:
    n, m = max(call.n, 1), max(call.m, 1)
    if name == "dense":
        return n, m
    if name == "onepass":
        return n if call.columns else _gpu_chunk(call), m
    states = call.pairwise * _state_bytes(call)  # of STATE_BLOCK scores
    scores = STATE_BLOCK * call.room // (STATE_BLOCK * call.itemsize + states)
    side = max(math.isqrt(scores), 1)
    if name == "triangular":
        return (_filling(n, min(TRIANGULAR_SIDE, side), call),) * 2
    cols = _filling(m, max(scores // _filling(n, side, call), 1), call)
    return _filling(n, max(scores // cols, 1), call), cols


def _torch_block(name: str, call: Call) -> tuple[int, int]:
    n, m, acc = max(call.n, 1), max(call.m, 1), call.acc_itemsize
    block = CPU_BLOCK if call.device == "cpu" else n * m
    if name == "dense":
        return n, m
    if name == "triangular":
        return (min(TRIANGULAR_ROWS, max(math.isqrt(call.limit // (4 * acc)), 1)),) * 2
    if call.itemsize < acc:  # the columns of a block are widened, for which a quarter of the limit is kept
        m = min(m, max(call.limit // (4 * acc * max(call.d, 1)), 1))
    if name == "onepass" and call.columns:  # scores become coefficients in a block of their own, an eighth of the limit
        return n, min(m, max(min(block, call.limit // (8 * acc)) // n, 1))
    if name == "onepass":
        rows = min(n, _chunk(call), ROWS)
        return rows, min(m, max(block // rows, 1))
    rows = min(n, ROWS, max(call.limit // (4 * acc), 1))
    return rows, min(m, max(block // rows, 1), max(call.limit // (4 * acc * rows), 1))


def _filling(n: int, most: int, call: Call) -> int:
    """Return the rows of a block, at most `most` of n, whose library product with D columns fills a GPU.

    Its output tiles make as many whole waves of the processors as fit, of the widest tiles that make one; a wave may
    lack a twentieth. Where none fits, the library has to divide the sum, and the rows are divided evenly.
    """
    if most >= n:
        return n
    tiles, fill = most // PRODUCT_ROWS, call.processors
    for width in PRODUCT_WIDTHS:
        across = -(-call.d // width)
        waves = (tiles * across + fill // 20) // fill
        if waves > 0:
            return max(min(waves * fill // across, tiles), 1) * PRODUCT_ROWS
    return _even(n, most)


def _even(n: int, most: int) -> int:
    """Return a chunk of at most `most` rows that splits n rows evenly, in whole tiles where it holds one."""
    tile = PRODUCT_ROWS
    most = most if most < tile else most // tile * tile
    if most >= n or most < 1:
        return min(n, most)
    chunk = -(-n // -(-n // most))
    return chunk if chunk < tile else min(most, -(-chunk // tile) * tile)


def _whole(name: str, call: Call) -> tuple[int, int]:
    return call.n, call.m


RULES = {"triton": (TRITON, _triton_block), "torch": (TORCH, _torch_block), "reference": (REFERENCE, _whole)}
