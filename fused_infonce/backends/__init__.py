"""The primitive on a device: one contract, and a file or folder for each backend.

`registry` has the backends, which one a call takes, and by which plan it runs.
"""

from .registry import BackendName, Options, Reduction, get, plan_of, user_level

__all__ = ["BackendName", "Options", "Reduction", "get", "plan_of", "user_level"]
