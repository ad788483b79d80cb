"""How much memory a compile may use, and what each part of a stage takes: one set of formulas for the compile
itself and for plans of it.

On the compute device there are at once: the activations of all samples, the weights of the stage in float32,
the statistics of its inputs, and what the pass that runs needs beside them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from accelerate.utils import convert_file_size_to_int

from awqc.errors import ConfigError
from awqc.observers.stages import Observer
from awqc.views import ExpertLinear, Linear

#: How the statistics of an activation are held: Gram matrices where they are computed; Gram matrices on the
#: host between passes; or their diagonal blocks, one a quantization group, and a sample of tokens.
Kind = Literal["full", "offloaded", "sampled"]

FLOAT = 4
#: Tokens in the sample of a ``sampled`` activation, for searching and held out each.
SAMPLED_ROWS = 2048
#: Tokens that are added to a Gram matrix at once, at most, and as a share of its width: it is read and
#: written each time, and they wait in memory. Of an expert's, of which there are many, a quarter.
_ADDED_ROWS, _ADDED_SHARE, _OF_EXPERT = 2048, 2, 4
#: Elements of weights that compensated rounding handles at once, at least where there are as many; and the
#: share of what a GPU has left beside a stage that more of them may take.
ROUNDED_AT_ONCE, _ROUNDING_SHARE = 1 << 26, 0.75
#: Elements of weights or of Gram matrices of experts that other passes handle at once.
BATCHED = 1 << 25
#: Copies in float32 of what is rounded at once: its rows joined, what is wanted of them, and its grid. Of all
#: weights that read an input there are codes in bytes, twice. Other passes need a few temporary copies of a
#: weight beside it.
_ROUNDING_COPIES, _CODES_BYTES, _OTHER_COPIES = 2.25, 2, 5
#: The same of experts that other passes handle at once: candidates of their scales, the grids of these spread
#: over columns, errors, and Gram matrices.
_BATCH_COPIES = 7
#: Gram matrices that the factorization in place of one needs at most for what is copied at once, and for the
#: library.
_FACTORING = 0.25
#: Shares of the limit: of activations that stay on the device, and on the host of one of the two shards of a
#: checkpoint that are there at once.
ACTIVATIONS_SHARE, SHARD_SHARE = 0.3, 0.0625


@dataclass(frozen=True)
class MemoryLimit:
    """Bytes that a compile may use; None is no limit.

    Args:
        device: on the device that computes.
        host: in the memory of the host; the same as ``device`` where that is the CPU.
        short: by how statistics were held, the least that a stage was to need (:func:`stage_bytes`) which
            then ran out of memory.
    """

    device: int | None = None
    host: int | None = None
    short: Mapping[Kind, int] = field(default_factory=dict)

    def by_device(self, device: torch.device) -> dict[int | str, int] | None:
        """As accelerate takes it, for a compile on ``device``; None without a limit."""
        if self.device is None:
            return None
        host: dict[int | str, int] = {} if self.host is None else {"cpu": self.host}
        return {"cpu": self.device} if device.type == "cpu" else {device.index or 0: self.device, **host}

    def without(self, kind: Kind, need: int) -> MemoryLimit:
        """The same after a stage that was to need so much, with statistics held so, ran out of memory."""
        return replace(self, short={**self.short, kind: min(need, self.short.get(kind, need))})

    def allows(self, kind: Kind, need: int) -> bool:
        """Whether a stage that is to need so much, with statistics held so, is within it."""
        return need <= (self.device or math.inf) and need < self.short.get(kind, math.inf)


def memory_limit(
    max_memory: int | str | Mapping[int | str, int | str] | None, device: torch.device
) -> MemoryLimit:
    """The limit that the user has stated: for the compute device, or by device.

    Args:
        max_memory: bytes, a size such as ``"10GB"`` or ``"10GiB"``, or a mapping such as
            ``{"cuda:0": "10GB", "cpu": "30GB"}``; as accelerate takes it, devices may be numbers.

    Raises:
        ConfigError: if it is none of these.
    """
    if max_memory is None:
        return MemoryLimit()
    if not isinstance(max_memory, Mapping):
        size = _bytes(max_memory)
        return MemoryLimit(size, size if device.type == "cpu" else None)
    by_device: dict[torch.device, int] = {}
    for name, stated in max_memory.items():
        try:
            key = torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
        except RuntimeError as error:
            raise ConfigError(
                f"max_memory: {name!r} is no device: give 'cpu', 'cuda:0' or a number"
            ) from error
        by_device[_indexed(key)] = _bytes(stated)
    limit, host = by_device.get(_indexed(device)), by_device.get(torch.device("cpu"))
    return MemoryLimit(limit, host)


@contextmanager
def enforced(limit: MemoryLimit, device: torch.device) -> Iterator[None]:
    """Hold torch's allocator on a GPU to ``limit`` within the block: before it takes more it gives back what
    it holds unused, and what does not fit then is an ``OutOfMemoryError``.

    Raises:
        ConfigError: in the place of one that nothing in the block had an answer to.
    """
    if device.type != "cuda" or limit.device is None:
        yield
        return
    if device.index is None:  # of several processes, each has its own
        device = torch.device("cuda", torch.cuda.current_device())
    _let_segments_grow()
    before = torch.cuda.get_per_process_memory_fraction(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit.device / total), device)
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        what = str(error).partition(". ")[0]
        raise ConfigError(
            f"{limit.device / 1e9:.1f} GB of memory on {device}, which max_memory allows, are not enough "
            f"({what}): give more; what is finished is kept and continued"
        ) from error
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def _let_segments_grow() -> None:
    """Blocks of many sizes follow each other: in segments of fixed sizes, half of the memory would lie idle.
    What the user has set stays."""
    stated = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    if "expandable_segments" not in stated:
        torch._C._accelerator_setAllocatorSettings(
            ",".join(filter(None, (stated, "expandable_segments:True")))
        )


def _indexed(device: torch.device) -> torch.device:
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else torch.device(device.type)


def _bytes(size: Any) -> int:
    try:
        found = int(convert_file_size_to_int(int(size) if str(size).isdigit() else size))
    except ValueError as error:
        raise ConfigError(f"max_memory={size!r}: give bytes, or a size such as '10GB'") from error
    if found <= 0:
        raise ConfigError(f"max_memory={size!r}: give a positive size")
    return found


def statistics_bytes(kind: Kind, width: int, group: int, matrices: int = 1) -> int:
    """Of the sums over tokens on the compute device while they are added up, of ``matrices`` inputs of
    ``width`` channels (those of experts are apart)."""
    if kind == "sampled":
        return 2 * FLOAT * width * (min(group, width) + SAMPLED_ROWS)
    apart = matrices - 1 if kind == "full" else 0
    waiting = added_rows(width) + apart * added_rows(width, expert=True)
    return 2 * FLOAT * width * ((1 + apart) * width + waiting)


def added_rows(width: int, expert: bool = False) -> int:
    """Tokens of an activation of ``width`` channels that are added to a Gram matrix at once."""
    return max(1, min(_ADDED_ROWS, width // _ADDED_SHARE) // (_OF_EXPERT if expert else 1))


def weight_bytes(views: Iterable[Linear | ExpertLinear]) -> int:
    """Of the weights in float32."""
    return sum(
        FLOAT * v.out_features * v.in_features * (v.count if isinstance(v, ExpertLinear) else 1)
        for v in views
    )


def working_bytes(observer: Observer, kind: Kind, compensated: bool, at_once: int = ROUNDED_AT_ONCE) -> int:
    """What the passes over the linears of ``observer`` need at most beside weights and statistics, if so many
    elements are rounded at once."""
    views, width = observer.views, observer.in_features
    gram = FLOAT * width * width

    def rounding(rows: int, elements: int) -> int:
        """Of weights with so many rows, so many elements at once."""
        return int(_ROUNDING_COPIES * FLOAT * elements) + _CODES_BYTES * rows * width

    rows = sum(v.out_features for v in observer.linears)
    linears = gram + max(int(_FACTORING * gram), rounding(rows, min(rows * width, max(at_once, width))))
    rows, count = (
        sum(v.out_features for v in observer.stacks),
        max((v.count for v in observer.stacks), default=0),
    )
    together = min(count, max(1, at_once // (width * max(rows, width))))
    # Of experts that are rounded together there are all factors, and one that is copied to them.
    experts = (together + 1) * gram + rounding(count * rows, together * rows * width)
    other = _OTHER_COPIES * FLOAT * max(v.out_features for v in views) * width
    stacked = max((width * v.out_features * v.count for v in observer.stacks), default=0)
    other = max(other, _BATCH_COPIES * FLOAT * min(stacked, BATCHED))
    if not compensated or kind == "sampled":
        return other
    return max(linears if observer.linears else 0, experts if count else 0, other)


def observing_bytes(observers: Iterable[Observer], kind: Kind, group: int) -> int:
    """Of all sums of a stage while they are added up."""
    return sum(statistics_bytes(kind, o.in_features, group, _inputs(o)) for o in observers)


def stage_bytes(
    observers: Iterable[Observer],
    kind: Kind,
    group: int,
    compensated: bool,
    activations: int,
    at_once: int = ROUNDED_AT_ONCE,
) -> int:
    """The peak of a stage on the compute device.

    Args:
        observers: of the stage.
        kind: how their statistics are held.
        group: input channels that share a scale.
        compensated: whether weights are rounded with error compensation.
        activations: bytes of those that stay on the device.
        at_once: elements that are rounded at once.
    """
    found = list(observers)
    observing = observing_bytes(found, kind, group)
    # Of Gram matrices on the host, the one that is worked with is on the device.
    held = observing if kind != "offloaded" else max(FLOAT * o.in_features**2 for o in found)
    passes = held + max(working_bytes(o, kind, compensated, at_once) for o in found)
    return activations + sum(weight_bytes(o.views) for o in found) + max(observing, passes)


def rounded_at_once(
    observers: Iterable[Observer],
    kind: Kind,
    limit: MemoryLimit,
    device: torch.device,
    group: int,
    activations: int,
) -> int:
    """Elements that compensated rounding handles at once in a stage. On a GPU the step of a column takes the
    same for many rows as for few, so they are more where there is room; not where some stage has run out of
    memory. Arguments as for :func:`stage_bytes`."""
    if device.type == "cpu" or limit.short:
        return ROUNDED_AT_ONCE
    there = limit.device or torch.cuda.get_device_properties(device).total_memory
    room = max(there - stage_bytes(observers, kind, group, True, activations), 0)
    return ROUNDED_AT_ONCE + int(_ROUNDING_SHARE * room / ((1 + _ROUNDING_COPIES) * FLOAT))


def kinds_on(device: torch.device) -> list[Kind]:
    """How statistics can be held for a compile on ``device``, the most exact first."""
    return ["full", "sampled"] if device.type == "cpu" else ["full", "offloaded", "sampled"]


def choose_kind(
    observers: Iterable[Observer],
    limit: MemoryLimit,
    device: torch.device,
    group: int,
    compensated: bool,
    activations: int,
) -> Kind:
    """The most exact statistics with which a stage stays within the limit."""
    found = list(observers)
    host = observing_bytes(found, "full", group)
    *exact, least = kinds_on(device)
    for kind in exact:
        on_host = kind != "offloaded" or limit.host is None or host <= limit.host // 2
        if on_host and limit.allows(kind, stage_bytes(found, kind, group, compensated, activations)):
            return kind
    return least


def activations_place(
    narrowest: int, limit: MemoryLimit, device: torch.device
) -> tuple[Literal["device", "host", "disk"], float]:
    """Where activations are kept between stages, and how many bytes of them at most.

    Args:
        narrowest: bytes of all samples where least of them is live; what is wider can be computed anew.
    """
    if limit.device is None or narrowest <= ACTIVATIONS_SHARE * limit.device:
        return "device", math.inf if limit.device is None else ACTIVATIONS_SHARE * limit.device
    if device.type != "cpu" and (limit.host is None or narrowest <= limit.host // 2):
        return "host", math.inf if limit.host is None else limit.host / 2
    return "disk", math.inf


def _inputs(observer: Observer) -> int:
    """Activations with statistics of their own: that of a linear, and one of each expert and of all."""
    return sum(1 + view.count for view in observer.stacks[:1]) + bool(observer.linears)
