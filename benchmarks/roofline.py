"""Time of each GPU plan by arithmetic: an estimate, nothing is measured.

    python benchmarks/roofline.py [--tflops 790] [--tbps 4.3] [--texps 3.7] [--l2 60] [--rows 16384 ...] [--dims 64 ...]

Forward with backward, N = M, 16-bit inputs. A plan is a sequence of kernels; each takes the longest of its FLOPs over
the peak, its bytes over the bandwidth and its exponentials over their rate (16 a clock on each of 132 processors of
compute capability 9.0, at 1.755 GHz), as if they overlapped perfectly. Bytes are: inputs read once by every kernel that
takes them; coefficient blocks written once and read by each product, unless a block fits the L2 cache; float32
gradients, per product read and written, which is what a PyTorch that adds in place does; with --apart four times, as an
older one. Not counted: launches, rows of tiles read again from L2, other elementwise work, and that no kernel reaches
its peak: an accumulator in registers least of all as D grows.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from fused_infonce.backends.plan import GPU_ONEPASS_DIM, STREAMING_DIM, Plan, choose, default_limit

ITEM, ACC = 2, 4  # bytes of an input and of an accumulator
STREAMING_MOST = 512  # the longest rows that a streaming gradient holds: tiles.STREAMING_MAX_D
CALLS = {  # kind of call -> what `choose` is told of it
    "number": {"reduced": True, "bounded": True, "self_similar": False},
    "tensor": {"reduced": True, "bounded": False, "self_similar": False},
    "self": {"reduced": True, "bounded": True, "self_similar": True},
}
PLANS = {  # kind of call -> the plans that could serve it
    "number": ("streaming", "workspace", "onepass"),
    "tensor": ("streaming", "workspace"),
    "self": ("streaming self", "triangular"),
}
CALL_NAMES = {"number": "t a number", "tensor": "t a tensor", "self": "self-similarity"}
COLUMNS = ("streaming", "workspace", "onepass", "streaming self", "triangular")


@dataclass(frozen=True)
class Gpu:
    flops: float  # a second
    bandwidth: float  # bytes a second
    l2: float  # bytes
    exps: float = 3.7e12  # a second
    passes: int = 2  # over float32 gradients, a product that is added to them


@dataclass(frozen=True)
class Kernel:
    flops: float
    bytes: float
    exps: float = 0

    def seconds(self, gpu: Gpu) -> float:
        return max(self.flops / gpu.flops, self.bytes / gpu.bandwidth, self.exps / gpu.exps)


def chosen(call: str, n: int, d: int) -> Plan:
    """What `plan.choose` takes for such a call, with gradients."""
    return choose(
        backend="triton", device="cuda", n=n, m=n, d=d, itemsize=ITEM, acc_itemsize=ACC, gradients=True, columns=False,
        per_row=False, plain=True, limit=default_limit("cuda"), **CALLS[call],
    )  # fmt: skip


def steps(size: int, step: int) -> list[int]:
    return [min(step, size - start) for start in range(0, size, step)]


def statistics(n: int, d: int) -> Kernel:
    return Kernel(2 * n * n * d, 2 * n * d * ITEM, n * n)


def product(rows: int, inner: int, d: int, in_memory: bool, passes: int) -> Kernel:
    """Of a (rows, inner) block with (inner, D), added to float32."""
    block = rows * inner * ITEM if in_memory else 0
    return Kernel(2 * rows * inner * d, block + inner * d * ITEM + passes * rows * d * ACC)


def block(rows: int, cols: int, d: int, gpu: Gpu, products: int = 2) -> list[Kernel]:
    """A block of coefficients or exponentials, and its products with the keys and with the queries."""
    in_memory = rows * cols * ITEM > gpu.l2
    written = rows * cols * ITEM if in_memory else 0
    write = Kernel(2 * rows * cols * d, (rows + cols) * d * ITEM + written, rows * cols)
    sides = ((rows, cols), (cols, rows))[:products]
    return [write, *(product(*side, d, in_memory, gpu.passes) for side in sides)]


def finish(n: int, d: int, sides: int) -> Kernel:
    """Reads float32 sums, a row and its partner; writes the gradient."""
    return Kernel(0, sides * n * d * (ACC + 3 * ITEM))


def kernels(plan: str, n: int, d: int, gpu: Gpu) -> list[Kernel] | None:
    """None where the plan cannot run."""
    streamed = Kernel(4 * n * n * d, 2 * n * d * ITEM + n * d * ACC, n * n)
    if plan in ("streaming", "streaming self"):
        sides = 2 if plan == "streaming" else 1
        return [statistics(n, d), *[streamed] * sides, finish(n, d, sides)] if d <= STREAMING_MOST else None
    if plan == "workspace":
        of_blocks = chosen("tensor", n, STREAMING_DIM + 1)  # blocks do not depend on D
        pairs = [(rows, cols) for rows in steps(n, of_blocks.rows) for cols in steps(n, of_blocks.cols)]
        return [statistics(n, d), *(k for rows, cols in pairs for k in block(rows, cols, d, gpu)), finish(n, d, 2)]
    if plan == "onepass":
        of_chunks = chosen("number", n, max(d, GPU_ONEPASS_DIM))
        if of_chunks.name != "onepass":
            return None
        return [*(k for rows in steps(n, of_chunks.rows) for k in block(rows, n, d, gpu)), finish(n, d, 2)]
    sides = steps(n, chosen("self", n, STREAMING_DIM + 1).rows)
    blocks = [
        block(rows, cols, d, gpu, products=1 if i == j else 2)
        for i, rows in enumerate(sides)
        for j, cols in enumerate(sides)
        if j >= i
    ]
    return [statistics(n, d), *(k for parts in blocks for k in parts), finish(n, d, 1)]


def seconds(plan: str, n: int, d: int, gpu: Gpu) -> float | None:
    found = kernels(plan, n, d, gpu)
    return None if found is None else sum(kernel.seconds(gpu) for kernel in found)


def floor(n: int, d: int, gpu: Gpu) -> float:
    """Three bare GEMMs at the peak, which move nothing."""
    return 6 * n * n * d / gpu.flops


def of_call(call: str, n: int, d: int) -> str:
    """The name that the chosen plan has here."""
    name = chosen(call, n, d).name
    return "streaming self" if call == "self" and name == "streaming" else name


def table(sizes: list[int], dims: list[int], gpu: Gpu) -> list[str]:
    """Markdown."""
    lines = [
        "| N = M | D | floor, ms | " + " | ".join(COLUMNS) + " | chosen: t a number | t a tensor | self |",
        "|---" * (6 + len(COLUMNS)) + "|",
    ]
    for n in sizes:
        for d in dims:
            bare = floor(n, d, gpu)
            cells = []
            for plan in COLUMNS:
                time = seconds(plan, n, d, gpu)
                cells.append("-" if time is None else f"{time * 1e3:.3g} ms, {time / bare:.2f}")
            names = [of_call(call, n, d).split()[0] for call in CALLS]
            lines.append("| " + " | ".join([str(n), str(d), f"{bare * 1e3:.3g}", *cells, *names]) + " |")
    return lines


def contradictions(sizes: list[int], dims: list[int], gpu: Gpu) -> list[str]:
    """Where another plan than the chosen one is faster by more than 2%, by this estimate."""
    lines = []
    for call, plans in PLANS.items():
        for n in sizes:
            for d in dims:
                times = {plan: time for plan in plans if (time := seconds(plan, n, d, gpu)) is not None}
                name, best = of_call(call, n, d), min(times, key=lambda plan: times[plan])
                if times[name] > 1.02 * times[best]:
                    factor = times[name] / times[best]
                    lines.append(
                        f"- {CALL_NAMES[call]}, N = {n}, D = {d}: {name} is chosen, {best} is {factor:.2f} times faster"
                    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=790, help="of dense 16-bit matmuls; default: H200")
    parser.add_argument("--tbps", type=float, default=4.3, help="memory bandwidth, TB/s")
    parser.add_argument("--texps", type=float, default=3.7, help="exponentials, 10^12 a second")
    parser.add_argument("--apart", action="store_true", help="products are not added where they lie")
    parser.add_argument("--l2", type=float, default=60, help="MB; blocks up to this size never leave the cache")
    parser.add_argument("--rows", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256, 512, 768, 1024, 2048, 4096])
    args = parser.parse_args()
    gpu = Gpu(args.tflops * 1e12, args.tbps * 1e12, args.l2 * 1e6, args.texps * 1e12, 4 if args.apart else 2)
    print(
        f"Every figure is an estimate by arithmetic for {args.tflops:g} TFLOP/s, {args.tbps:g} TB/s and {args.l2:g} MB"
    )
    print(
        "of L2, forward with backward, 16-bit inputs: none is measured. Time, and its ratio to three GEMMs at peak.\n"
    )
    print("\n".join(table(args.rows, args.dims, gpu)))
    found = contradictions(args.rows, args.dims, gpu)
    print(
        "\nWhere the estimate contradicts the choice of `plan.py` by more than 2%:\n"
        if found
        else "\nNo contradiction."
    )
    print("\n".join(found))


if __name__ == "__main__":
    main()
