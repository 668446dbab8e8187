"""MovieLens-100K as it lies in the wheel of recbole, of which nothing is imported, and its split."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FILE = "recbole/dataset_example/ml-100k/ml-100k.inter"


@dataclass(frozen=True)
class Ratings:
    """Who saw what: each user's last film is held out, all earlier ones are for training.

    users, items: (R,) int64, numbered from 0, the pairs of the training
    held_out: (U,) int64, the film of each user that is to be found
    names: how many users and items there are
    """

    users: Tensor
    items: Tensor
    held_out: Tensor
    names: tuple[int, int]

    @property
    def counts(self) -> Tensor:
        """Returns how often each item was seen in the training pairs, (I,)."""
        return torch.bincount(self.items, minlength=self.names[1])

    @property
    def log_frequency(self) -> Tensor:
        """Returns log q_j, the log-probability with which item j is drawn into a batch; an unseen one counts once."""
        counts = self.counts.clamp_min(1).float()
        return torch.log(counts / len(self.items))

    @property
    def seen(self) -> Tensor:
        """Returns (U, I): which items a user saw in training, and which are therefore not recommended."""
        seen = torch.zeros(self.names, dtype=torch.bool)
        seen[self.users, self.items] = True
        return seen


def file_of(folder: Path | None) -> Path:
    """Returns the file of ratings: in this folder, or else in recbole's wheel.

    Raises FileNotFoundError where there is none, with what to do about it.
    """
    if folder is not None:
        path = folder / Path(FILE).name
    else:
        try:
            path = Path(str(distribution("recbole").locate_file(FILE)))
        except PackageNotFoundError:
            raise FileNotFoundError(
                "the demo reads MovieLens-100K from recbole's wheel, which is not installed: run "
                "`make demo-recommender`, or pip install --no-deps recbole, or name the folder of ml-100k.inter: --data"
            ) from None
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    return path


def read(path: Path) -> Ratings:
    """Returns the ratings in a file of recbole's columns: user, item, rating and time, under a line of names."""
    rows = np.genfromtxt(path, skip_header=1, dtype=np.float64)
    _, users = np.unique(rows[:, 0], return_inverse=True)
    _, items = np.unique(rows[:, 1], return_inverse=True)
    order = np.lexsort((np.arange(len(rows)), rows[:, 3], users))  # by user, then by time, ties as they come
    users, items = users[order], items[order]
    last = np.append(users[1:] != users[:-1], True)
    return Ratings(
        torch.from_numpy(users[~last]),
        torch.from_numpy(items[~last]),
        torch.from_numpy(items[last]),
        (int(users.max()) + 1, int(items.max()) + 1),
    )
