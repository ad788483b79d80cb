"""Several processes on one compile: each moves its share of the calibration tokens, and work is divided.

Processes are those of a torch.distributed group, started by ``torchrun`` for example; collectives are its
own. Everything is divided so that a single call computes what it computes in one process, in the same order:
on a CPU the results are the same bits, not only the same sums. That matters, since one rounding apart is
another code, and everything behind it is calibrated on that code. A GPU's library may add up a part of a
product in another order than the whole; results then agree within the rounding of sums.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from awqc.errors import ConfigError, RankError

T = TypeVar("T")
R = TypeVar("R")

#: How long a process waits for the others before it takes one for dead.
TIMEOUT = timedelta(minutes=30)
#: Rows of a weight that are not divided further, so that products have the tiles that they have in one piece.
ROWS = 64


@dataclass(frozen=True)
class Ranks:
    """The processes of a job, as one of them sees them; by default there is one.

    Args:
        rank: number of this process.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """Every ``count``-th of ``items``, from the one numbered ``rank``."""
        return items[self.rank :: self.count]

    def ranges(self, size: int, step: int = 1) -> list[range]:
        """``size`` things in at most ``count`` runs, all but the last a multiple of ``step``."""
        width = -(-size // (self.count * step)) * step
        return [range(start, min(start + width, size)) for start in range(0, size, width)]

    def map(self, work: Callable[[T], R], items: Sequence[T], device: torch.device) -> list[R]:
        """``work(item)`` for each of ``items``, each in one process; all results in all, in order.

        Args:
            work: gives nested tuples, lists and dicts of tensors and plain values.
            device: where the tensors in results are.

        Raises:
            RankError: if another process has gone.
        """
        if self.count == 1:
            return [work(item) for item in items]
        made = [work(item) for item in self.mine(items)]
        every: list[Any] = [None] * self.count
        with _together():
            dist.all_gather_object(every, [tree_map(_described, result) for result in made])
            return [
                self._shared(every[n % self.count][n // self.count], made, n, device)
                for n in range(len(items))
            ]

    def _shared(self, described: Any, made: list[R], number: int, device: torch.device) -> R:
        """The result of item ``number``, its tensors from the process that has made them."""
        owner = number % self.count
        own = iter(tree_leaves(made[number // self.count]) if owner == self.rank else ())

        def received(leaf: Any) -> Any:
            value = next(own, None)
            if not isinstance(leaf, _Described):
                return leaf
            there = value if value is not None else torch.empty(leaf.shape, dtype=leaf.dtype, device=device)
            there = there.contiguous()
            dist.broadcast(there, owner)
            return there

        result: R = tree_map(received, described)
        return result

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """``tensor`` of every process, in order; of one shape but for the first dimension."""
        if self.count == 1:
            return [tensor]
        lengths: list[Any] = [None] * self.count
        with _together():
            dist.all_gather_object(lengths, len(tensor))
            longest = max(lengths)
            padded = tensor.new_zeros((longest, *tensor.shape[1:]))
            padded[: len(tensor)] = tensor
            found = [torch.empty_like(padded) for _ in lengths]
            dist.all_gather(found, padded)
        return [each[:length] for each, length in zip(found, lengths, strict=True)]

    def add(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by its sum over all processes."""
        if self.count > 1:
            with _together():
                dist.all_reduce(tensor)

    def agree(self, what: str, value: Any) -> list[Any]:
        """``value`` of every process.

        Raises:
            ConfigError: if they differ and ``what`` says what they are of.
        """
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with _together():
            dist.all_gather_object(found, value)
        if what and any(other != found[0] for other in found):
            raise ConfigError(
                f"the {self.count} processes of this job differ in {what}: start all with the same command, "
                "on the same files"
            )
        return found


@dataclass(frozen=True)
class _Described:
    """A tensor that follows."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _described(leaf: Any) -> Any:
    return _Described(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def current() -> Ranks:
    """The processes of the torch.distributed group that there is, or this one alone."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


@contextmanager
def job(device: torch.device, timeout: timedelta = TIMEOUT) -> Iterator[torch.device]:
    """Join the processes that ``torchrun`` has started, if it has; within the block there is a group of them.

    Yields:
        The device of this process: on GPUs, each has its own.

    Raises:
        RankError: if they do not find each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield device
        return
    backend = "gloo"
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    with _together():
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    """What torch raises in a collective means that another process is not there."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        rank = os.environ.get("RANK", "?")
        reason = str(error).strip().splitlines()[0]
        raise RankError(
            f"process {rank} has lost another process of the job ({reason}): its own message says why. What "
            "was finished is in the journal: the same command goes on from there"
        ) from error
