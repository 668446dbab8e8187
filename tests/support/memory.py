"""The memory that a call takes, measured by the storages of its operators' results."""

import gc
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20


class PeakMemory(TorchDispatchMode):
    """A count of the bytes of storages made inside: those alive now, their peak, and the largest storage.

    What nothing but a cycle of objects holds, such as the frames of Triton's interpreter, does not count.
    """

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak, self.largest = {}, 0, 0, 0

    def __enter__(self):
        gc.freeze()  # what was there before takes no time at each new peak
        return super().__enter__()

    def __exit__(self, *error):
        gc.unfreeze()
        return super().__exit__(*error)

    def forget(self, key):
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if not isinstance(x, torch.Tensor):
                continue
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self.alive and key not in given:
                self.alive[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
                weakref.finalize(storage, self.forget, key)
        if self.now > self.peak:
            gc.collect()  # of what is younger than `freeze`, which is where cycles of a call are
            self.peak = max(self.peak, self.now)
        return out
