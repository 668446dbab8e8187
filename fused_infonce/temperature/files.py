"""Embeddings and integers in .npy files, mapped into memory, with errors that say what to save in their place; and the
names of files that hold pictures."""

from __future__ import annotations

import mmap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends.contract import EPS

FLOATS = ("float16", "float32", "float64")
MAGIC = b"\x93NUMPY"
HEADS = {  # what other files begin with
    b"PK": "an archive, as of np.savez or torch.save: save each array by itself, np.save(path, x)",
    b"\x80": "a pickle, as of pickle.dump or an old torch.save: save the array itself, np.save(path, x)",
    b"\x89HDF": "an HDF5 file: save the array itself, np.save(path, x[:])",
}
SAVE = "np.save(path, x.float().cpu().numpy())"
PICTURES = ("eps", "jpeg", "jpg", "pdf", "png", "ps", "svg", "svgz", "tif", "tiff", "webp")  # matplotlib's
NEEDED = "pictures need matplotlib: pip install 'fused-infonce[plot]'"
ROWS = 1024  # that are looked at in one go


def mapped(path: Path) -> Any:
    """Return the array of a .npy file, mapped into memory and read where it is used.

    Raises:
        FileNotFoundError: no such file. ValueError: another kind of file, a damaged one, one of Python objects.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if path.is_dir():
        raise ValueError(f"{path}: expected a .npy file, got a folder")
    with path.open("rb") as file:
        head = file.read(len(MAGIC))
    if head != MAGIC:
        kinds = [kind for start, kind in HEADS.items() if head.startswith(start)]
        kind = kinds[0] if kinds else f"something else: save an array, {SAVE}" if head else "an empty file"
        raise ValueError(f"{path}: expected a .npy file, got {kind}")
    try:
        return np.load(path, mmap_mode="c")  # like "r", with which torch warns that it could not write
    except ValueError as why:
        raise ValueError(f"{path}: cannot be mapped as an array, is it whole? {why}") from None


def forget(array: Any) -> None:
    """Let go of the memory that holds what was read of a mapped array, which is read again where it is used again."""
    if hasattr(mmap, "MADV_DONTNEED") and isinstance(array.base, mmap.mmap):
        array.base.madvise(mmap.MADV_DONTNEED)


def embeddings(path: Path) -> Any:
    """Return the embeddings of a .npy file, (N, D) of float16, float32 or float64, each of a length to divide by.

    They are an array that is mapped into memory, of which nothing is held yet.

    Raises:
        FileNotFoundError: no such file. TypeError: another dtype. ValueError: another shape, no rows, or rows that
        cannot be compared with others, which the message counts and names.
    """
    array = mapped(path)
    if array.dtype.name not in FLOATS or not array.dtype.isnative:
        raw = " (numpy has no bfloat16: such rows may be saved as float32)" if array.dtype.kind == "V" else ""
        raise TypeError(
            f"{path}: embeddings must be {', '.join(FLOATS)} in this machine's byte order, got {array.dtype}{raw}"
        )
    if array.ndim != 2 or not all(array.shape):
        raise ValueError(f"{path}: embeddings must be one row each, (N, D), got shape {array.shape}")
    found: dict[str, list[int]] = {}
    for start in range(0, len(array), ROWS):
        for what, bad in _bad(np.asarray(array[start : start + ROWS])).items():
            found.setdefault(what, []).extend((start + np.flatnonzero(bad)).tolist())
        forget(array)
    for what, places in found.items():
        if places:
            shown = ", ".join(map(str, places[:5])) + (", ..." if len(places) > 5 else "")
            raise ValueError(f"{path}: {len(places)} of {len(array)} rows {what}: rows {shown}")
    return array


def _bad(rows: Any) -> dict[str, Any]:
    """Return which of some rows cannot be compared with others, for each reason."""
    finite, zeros = np.isfinite(rows).all(1), (rows == 0).all(1)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        norm = np.sqrt(np.square(rows, dtype=np.float32).sum(1))  # as a loss makes it: squares overflow first
    return {
        "hold NaN or infinity": ~finite,
        "hold nothing but zeros": zeros,
        "have a norm beyond float32: divide them by something": finite & ~np.isfinite(norm),
        f"have a norm of {EPS:g} or less, which counts as zero: multiply them by something": (norm <= EPS) & ~zeros,
    }


def integers(path: Path, each: str, count: int, other: str, other_count: int) -> Tensor:
    """Return the integers of a .npy file, one for `each` of `count`, (count,) int64.

    other, other_count: what there might be one for by mistake.

    Raises:
        FileNotFoundError: no such file. TypeError: another dtype. ValueError: another shape.
    """
    array = mapped(path)
    if array.dtype.kind not in "iu" or not array.dtype.isnative:
        raise TypeError(f"{path}: expected integers, got {array.dtype}: save x.astype(np.int64)")
    if array.shape != (count,):
        hint = f", one for each {other}: are files the wrong way round?" if array.shape == (other_count,) else ""
        raise ValueError(
            f"{path}: expected one integer for each {each}, shape ({count},), got shape {array.shape}{hint}"
        )
    return torch.from_numpy(array.astype(np.int64))


def writable(path: str | Path) -> None:
    """Check that a picture of this name can be drawn, before anything is computed for it.

    matplotlib is looked for and not imported, since it takes 25 MiB.

    Raises:
        ModuleNotFoundError: matplotlib is missing. ValueError: a name that ends otherwise than in one of PICTURES.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(NEEDED, name="matplotlib")
    if Path(path).suffix.removeprefix(".").lower() not in PICTURES:
        raise ValueError(f"the picture's name must end in one of {', '.join(PICTURES)}, got {str(path)!r}")
