"""Launch configurations as data: which one a kernel uses for a number of tokens, per device.

``configs_<device>.json`` beside this file holds what was measured, for each kernel a table from the most
tokens that an entry serves to the entry. Devices without a file use ``configs_default.json``. What the
autotuner finds for a shape on this machine is kept in the cache folder and goes before both.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from awqc.kernels.hardware import file_name

#: The most tokens that each entry serves, ascending, and the entry: keyword arguments of a launch.
Table = Mapping[int, Mapping[str, int]]

_FOLDER = Path(__file__).parent


def cache_file(device: torch.device | str) -> Path:
    """Where the autotuner keeps its results for ``device``: in ``AWQC_KERNEL_CACHE``, or the user's cache."""
    folder = os.environ.get("AWQC_KERNEL_CACHE") or Path.home() / ".cache" / "awqc" / "kernels"
    return Path(folder) / f"tuned_{device_name(device)}.json"


def device_name(device: torch.device | str) -> str:
    """The name of a device as it stands in file names, which may be given instead: ``nvidia_h200``."""
    if isinstance(device, str):
        return device
    return file_name(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)


@functools.cache
def measured(kernel: str, device: torch.device | str) -> Table:
    """The table that was measured for ``kernel`` on devices like ``device``, or on another."""
    own = _FOLDER / f"configs_{device_name(device)}.json"
    for file in (own, _FOLDER / "configs_default.json"):
        if file.exists() and kernel in (tables := json.loads(file.read_text(encoding="utf-8"))):
            return _table(tables[kernel])
    raise KeyError(f"{_FOLDER / 'configs_default.json'} has no table for {kernel}")


@functools.cache
def _tuned(file: Path) -> dict[str, Table]:
    if not file.exists():
        return {}
    return {key: _table(table) for key, table in json.loads(file.read_text(encoding="utf-8")).items()}


def tuned(key: str, device: torch.device | str) -> Table | None:
    """What :func:`keep` was given for ``key`` on a device of this name, in this process or another."""
    return _tuned(cache_file(device)).get(key)


def keep(key: str, device: torch.device, table: Table) -> None:
    """Write ``table`` to the cache folder under ``key``, which names the kernel and the shape."""
    file = cache_file(device)
    _tuned.cache_clear()  # another process may have written meanwhile
    tables = {**_tuned(file), key: table}
    _tuned.cache_clear()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(tables, indent=1), encoding="utf-8")
    partial.replace(file)


def entry(table: Table, tokens: int) -> Mapping[str, int] | None:
    """The entry for ``tokens``: the first that serves so many; None beyond the last."""
    return next((table[most] for most in sorted(table) if tokens <= most), None)


def _table(entries: Mapping[str, Mapping[str, int]]) -> Table:
    return {int(most): entries[most] for most in sorted(entries, key=int)}
