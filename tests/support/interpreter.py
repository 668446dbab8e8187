"""Triton's interpreter, made to do less beside the arithmetic, which takes most of its time in small kernels.

What an operation computes is as it was. As it is the interpreter

- prepares the modules of the language at every launch and at every call of a device function. That does the same each
  time, and nothing for a device function, because kernels and the functions that they call share these modules;
- makes the same types, and the same descriptions of them, anew for each result;
- looks for overflow at each sum of integers, and says nothing of it, because that is said under a debug flag alone.

`tests/kernels/test_the_interpreter.py` compares it with Triton's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

KNOWN = triton.__version__.startswith(("3.7.", "3.8."))  # others are left as they are, but for what a launch prepares
Plain = tuple[int, ...]


MISSING = object()
Change = tuple[Any, str, Any, Any]  # of an attribute: its object, its name, what it becomes and what it was


class Replay:
    """What a launch before has changed in the language, changed again."""

    def __init__(self, changes: list[Change]):
        self.changes = changes
        for obj, name, value, _ in changes:
            setattr(obj, name, value)

    def restore(self) -> None:
        for obj, name, _, before in reversed(self.changes):
            if before is MISSING:
                delattr(obj, name)
            else:
                setattr(obj, name, before)


class Scope:
    """What a launch has changed in the language, to be restored after it."""

    def __init__(self, inner: Any, prepared: set[str]):
        self.inner, self.prepared = inner, prepared

    def restore(self) -> None:
        self.prepared.clear()
        self.inner.restore()


def once_a_launch(prepare: Any) -> Any:
    """Return `prepare` of a function's language, doing nothing for modules that the running launch has prepared."""
    prepared: set[str] = set()
    names: dict[int, frozenset[str]] = {}  # of the modules that a file's functions see
    known: dict[tuple[frozenset[str], frozenset[str]], list[Change]] = {}  # by those and what was prepared before

    def scope_of(fn: Any, key: tuple[frozenset[str], frozenset[str]]) -> Any:
        if key in known:
            return Replay(known[key])
        scope = prepare(fn)
        absent = interpreter._MISSING
        known[key] = [
            (obj, name, getattr(obj, name), MISSING if before is absent else before)
            for obj, name, before in scope._changes
        ]
        return scope

    def patch(fn: Any) -> Any:
        seen = fn.__globals__
        needed = names.get(id(seen))
        if needed is None:
            modules = [module for module in seen.values() if module is tl or module is core]
            needed = names[id(seen)] = frozenset(module.__name__ for module in modules)
        if needed <= prepared:
            return None  # of a device function, which restores nothing
        before = frozenset(prepared)
        prepared.update(needed)
        scope = scope_of(fn, (needed, before))
        return scope if before else Scope(scope, prepared)

    return patch


# Types: one object for each, which knows what is asked of it again and again.

NEW_TYPE, NEW_TENSOR = tl.block_type.__init__, tl.tensor.__init__
NUMPY_TYPE, SCALAR_CONSTANT = interpreter._get_np_dtype, TritonSemantic.scalar_constant
CHECK, BROADCAST = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
COMPARE, COMPARE_BLOCKS = tl.dtype.__eq__, tl.block_type.__eq__
TO_IR = tl.block_type.to_ir
LIMITED = getattr(interpreter.TensorHandle, "__post_init__", None)  # Triton 3.5 has none

block_types: dict[Any, tl.block_type] = {}
numpy_types: dict[str, np.dtype] = {}
most_bytes: dict[str, int] = {}
constants: dict[Any, tl.tensor] = {}
broadcasts: dict[tuple[Plain, Plain], Plain] = {}


def plain(shape: Any) -> Plain:
    return tuple([each.value if type(each) is tl.constexpr else each for each in shape])


def one_block_type(cls: type, *arguments: Any) -> Any:
    """Return the type of these elements and this shape that there is, or a new one."""
    if len(arguments) != 2 or type(arguments[0]) not in (tl.dtype, tl.pointer_type):
        return object.__new__(cls)
    element, shape = arguments
    key = (element.name, getattr(element, "address_space", None), plain(shape))
    found = block_types.get(key)
    if found is None:
        found = object.__new__(cls)
        NEW_TYPE(found, element, shape)  # which refuses some shapes
        found.of_plain_shape = key[-1]
        block_types[key] = found
    return found


def new_block_type(self: Any, element: Any, shape: Any) -> None:
    if "of_plain_shape" not in self.__dict__:
        NEW_TYPE(self, element, shape)


def new_tensor(self: Any, handle: Any, type: Any) -> None:
    known = type.__dict__.get("of_tensors")
    if known is None:
        NEW_TENSOR(self, handle, type)
        type.of_tensors = self.shape, self.numel, self.dtype
        return
    self.handle, self.type = handle, type
    self.shape, self.numel, self.dtype = known


def shape_of(type: Any) -> Plain:
    return type.of_plain_shape if "of_plain_shape" in type.__dict__ else plain(type.shape)


def equal_types(self: Any, other: Any) -> bool:
    return self is other or COMPARE(self, other)


def equal_block_types(self: Any, other: Any) -> bool:
    return self is other or COMPARE_BLOCKS(self, other)


def block_to_ir(self: Any, builder: Any) -> Any:
    if builder is interpreter.interpreter_builder and type(self.element_ty) is tl.dtype:
        return self  # as a new one that equals it
    return TO_IR(self, builder)


def numpy_type(type: Any) -> Any:
    name = type.scalar.name
    found = numpy_types.get(name)
    if found is None:
        found = numpy_types[name] = NUMPY_TYPE(type)
    return found


# Handles of arrays.


def new_handle(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
    self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
    if data.itemsize > most(dtype):
        LIMITED(self)  # which raises, but for pointers


def most(dtype: Any) -> int:
    """Return how many bytes an element of an array may have for this type."""
    found = most_bytes.get(dtype.name)
    if found is None:
        pointer = isinstance(dtype, tl.pointer_type)
        found = most_bytes[dtype.name] = 8 if pointer else max(dtype.primitive_bitwidth, 8) // 8
    return found


def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    output, dtype = op(lhs.data, rhs.data), lhs.dtype.scalar
    if output.itemsize > most(dtype):
        output = output.astype(numpy_type(dtype))
    return interpreter.TensorHandle(output, dtype)


def splat(self: Any, type: Any, arg: Any) -> Any:
    of_block = isinstance(arg.dtype, tl.block_type)
    data = np.empty(shape_of(type), numpy_type(arg.dtype))
    data[...] = arg.data[0] if of_block else arg.data
    return interpreter.TensorHandle(data, arg.dtype.scalar)


# Rules of the language.


def scalar_constant(self: Any, value: Any, dtype: Any) -> Any:
    """Return a constant, of which no operation changes the array: the one that was made before."""
    if type(dtype) is not tl.dtype or type(value) not in (int, float, bool) or value != value:
        return SCALAR_CONSTANT(self, value, dtype)
    key = (self.builder, type(value), value, dtype.name)
    found = constants.get(key)
    if found is None:
        found = constants[key] = SCALAR_CONSTANT(self, value, dtype)
    return tl.tensor(interpreter.TensorHandle(found.handle.data, found.handle.dtype), found.type)


def check_operands(
    self: Any, lhs: Any, rhs: Any, left_pointer: bool = False, right_pointer: bool = False, arithmetic: bool = True,
    division: bool = False,
) -> Any:  # fmt: skip
    """Return the operands of an operation, cast and broadcast: tensors of one type, or a number beside one, at once."""
    if type(lhs) is tl.tensor:
        if type(rhs) is tl.tensor:
            if lhs.dtype is rhs.dtype and (lhs.dtype.name in PLAIN or not (division or lhs.dtype.is_ptr())):
                return self.broadcast_impl_value(lhs, rhs)
        elif arithmetic and fits(rhs, lhs.dtype):
            return lhs, filled(self, rhs, lhs)
    elif type(rhs) is tl.tensor and arithmetic and fits(lhs, rhs.dtype):
        return filled(self, lhs, rhs), rhs
    return CHECK(self, lhs, rhs, left_pointer, right_pointer, arithmetic, division)


FLOATS = frozenset({"fp32", "fp64"})
INTEGERS = {name: range(-(2 ** (bits - 1)), 2 ** (bits - 1)) for name, bits in (("int32", 32), ("int64", 64))}
PLAIN = FLOATS | INTEGERS.keys()  # types that a division keeps, as those of 16 bits are not


def fits(number: Any, dtype: Any) -> bool:
    """Return whether an operation of this number and a tensor is one of the tensor's type."""
    if type(number) is int:
        return dtype.name in FLOATS or (dtype.name in INTEGERS and number in INTEGERS[dtype.name])
    return type(number) is float and dtype.name in FLOATS


def filled(self: Any, number: Any, like: Any) -> Any:
    constant = self.scalar_constant(number, like.dtype)
    if not like.type.is_block():
        return constant
    return tl.tensor(self.builder.create_splat(like.type, constant.handle), like.type)


def broadcast_operands(self: Any, lhs: Any, rhs: Any) -> Any:
    a, b = lhs.type, rhs.type
    if a is b:
        return lhs, rhs
    if not a.is_block() or not b.is_block():
        if a.is_block():
            rhs = tl.tensor(self.builder.create_splat(a, rhs.handle), a.with_element_ty(b))
        elif b.is_block():
            lhs = tl.tensor(self.builder.create_splat(b, lhs.handle), b.with_element_ty(a))
        return lhs, rhs
    shapes = shape_of(a), shape_of(b)
    if shapes[0] == shapes[1]:
        return lhs, rhs
    if shapes not in broadcasts:
        results = BROADCAST(self, lhs, rhs)
        if len(shapes[0]) == len(shapes[1]):
            broadcasts[shapes] = shape_of(results[0].type)
        return results
    shape = broadcasts[shapes]
    for_each = ((lhs, shapes[0]), (rhs, shapes[1]))
    return tuple(x if own == shape else self.broadcast_impl_shape(x, list(shape)) for x, own in for_each)


def direct(obj: object, name: str, member: Any, builder: Any, scope: Any) -> None:
    """Put a function of the language in place that takes the interpreter's semantic, without the check that it has."""
    function, semantic = getattr(member, "__wrapped__", member), interpreter.interpreter_semantic

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    scope.set_attr(obj, name, call)


builder = interpreter.InterpreterBuilder
Parts = list[tuple[Any, str, Any]]
FASTER: Parts = [
    *((tl.block_type, "__new__", one_block_type), (tl.block_type, "__init__", new_block_type)),
    *((tl.block_type, "__eq__", equal_block_types), (tl.block_type, "to_ir", block_to_ir)),
    *((tl.dtype, "__eq__", equal_types), (tl.tensor, "__init__", new_tensor)),
    *((interpreter, "_get_np_dtype", numpy_type), (interpreter.TensorHandle, "__init__", new_handle)),
    *((builder, "binary_op", binary_op), (builder, "create_splat", splat), (interpreter, "_patch_attr", direct)),
    *(
        (TritonSemantic, "scalar_constant", scalar_constant),
        (TritonSemantic, "broadcast_impl_value", broadcast_operands),
    ),
    (TritonSemantic, "binary_op_type_checking_impl", check_operands),
]
PREPARE = interpreter._patch_lang
OPTIONS = interpreter.interpreter_builder.options
QUIET = dataclasses.replace(OPTIONS, sanitize_overflow=False)
OWN: Parts = [
    (obj, name, (lambda cls, *_: object.__new__(cls)) if name == "__new__" else getattr(obj, name))
    for obj, name, _ in FASTER
]


def put(parts: Parts) -> None:
    for obj, name, value in parts:
        setattr(obj, name, value)


@contextlib.contextmanager
def as_triton_has_it() -> Iterator[None]:
    """Let kernels run in the interpreter as it is without this file."""
    put([*OWN, (interpreter, "_patch_lang", PREPARE), (interpreter.interpreter_builder, "options", OPTIONS)])
    try:
        yield
    finally:
        install()


def install() -> None:
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = once_a_launch(PREPARE)
    if KNOWN:
        put([*FASTER, (interpreter.interpreter_builder, "options", QUIET)])


install()
