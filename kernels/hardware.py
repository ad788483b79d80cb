"""What kernels are planned for: the device at hand, or one that this machine does not have.

``hardware.json`` holds what plans and floors need to know of common GPUs: compute capability,
multiprocessors, shared memory of a block, and the vendor's data sheet for memory bandwidth and for dense
16-bit products that are summed in float32.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch

_TABLE = Path(__file__).parent / "hardware.json"


@dataclass(frozen=True)
class Hardware:
    """One kind of device.

    Args:
        name: as it stands in names of files: ``nvidia_h200``, ``cpu``.
        type: of the torch device: ``cuda``, ``cpu``.
        processors: multiprocessors, or threads.
        capability: compute capability of NVIDIA's; None for others.
        shared_bytes: shared memory that a block may have; 0 where that is not known.
        read_rate: bytes a second from memory by the data sheet, if that is known.
        product_rate: dense 16-bit floating-point operations a second by the data sheet, if known.
    """

    name: str
    type: str
    processors: int
    capability: tuple[int, int] | None = None
    shared_bytes: int = 0
    read_rate: float | None = None
    product_rate: float | None = None

    @property
    def has_bulk_copies(self) -> bool:
        """Whether it has what the Hopper paths are made of: bulk copies, clusters, dependent launches."""
        return self.capability is not None and self.capability[0] == 9


_ASSUMED: ContextVar[Hardware | None] = ContextVar("assumed", default=None)


@contextmanager
def assumed(hardware: Hardware) -> Iterator[None]:
    """Within the block, devices of the type of ``hardware`` are taken to be that: for outlines alone."""
    token = _ASSUMED.set(hardware)
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def hardware(device: torch.device) -> Hardware:
    """What ``device`` is, or what :func:`assumed` says."""
    other = _ASSUMED.get()
    return other if other is not None and other.type == device.type else _found(device)


@functools.cache
def _found(device: torch.device) -> Hardware:
    if device.type != "cuda":
        return Hardware(device.type, device.type, torch.get_num_threads())
    properties = torch.cuda.get_device_properties(device)
    name = file_name(properties.name)
    nvidia = torch.version.hip is None
    sheets = [sheet for key, sheet in known().items() if re.search(rf"(^|_){key}(_|$)", name)]
    return Hardware(
        name,
        "cuda",
        properties.multi_processor_count,
        (properties.major, properties.minor) if nvidia else None,
        # What a block may ask for is known to torch for NVIDIA alone; AMD's have no more than they have.
        getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block),
        sheets[0].read_rate if sheets else None,
        sheets[0].product_rate if sheets else None,
    )


def file_name(name: str) -> str:
    """The name of a device as it stands in names of files: ``NVIDIA H200`` is ``nvidia_h200``."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


@functools.cache
def known() -> dict[str, Hardware]:
    """The GPUs of ``hardware.json`` by short name."""
    return {
        key: Hardware(
            f"nvidia_{key}",
            "cuda",
            entry["processors"],
            tuple(entry["capability"]),
            entry["shared_kib"] << 10,
            entry["gbytes_per_s"] * 1e9,
            entry["tflops"] * 1e12,
        )
        for key, entry in json.loads(_TABLE.read_text(encoding="utf-8")).items()
    }
