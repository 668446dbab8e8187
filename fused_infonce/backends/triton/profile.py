"""The profile in Triton kernels: refused until there is one."""

from ..contract import Problem, Profile
from ..ladder import Ladder
from ..plan import Plan


def profile(problem: Problem, plan: Plan, ladder: Ladder) -> Profile:
    raise ValueError("there is no kernel for sweeps and fits yet: pass backend='torch', which runs on a GPU too")
