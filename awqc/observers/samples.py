"""The values of calibration samples on their way: on the device, in pinned host memory, or on disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, fx

from awqc.checkpoints.tensors import read_header, read_tensor
from awqc.errors import JournalError
from awqc.program import Env

Place = Literal["device", "host", "disk"]


class Samples:
    """Live values by sample. Where they are kept elsewhere, one sample at a time is on the device, and the
    next is on its way there.

    Args:
        count: of samples.
        device: that computes.
        place: where values are kept.
        folder: of files, where that is the disk; a temporary directory in it is made and removed again.
    """

    def __init__(
        self, count: int, device: torch.device, place: Place = "device", folder: Path | None = None
    ) -> None:
        self.place, self._device = place, device
        self._held: list[Any] = [{} for _ in range(count)]
        self._folder = Path(tempfile.mkdtemp(prefix="activations-", dir=folder)) if place == "disk" else None
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="samples") if place != "device" else None
        self._coming: tuple[int, Future[Env]] | None = None

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Env]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Env:
        """The values of one sample on the device; change them by setting them."""
        if self._threads is None:
            env: Env = self._held[index]
            return env
        coming, self._coming = self._coming, None
        ahead = coming is not None and coming[0] == index
        found = coming[1].result() if coming is not None and ahead else self._fetch(index)
        if index + 1 < len(self):
            self._coming = index + 1, self._threads.submit(self._fetch, index + 1)
        return {
            node: value.to(self._device, non_blocking=True) if isinstance(value, Tensor) else value
            for node, value in found.items()
        }

    def __setitem__(self, index: int, env: Env) -> None:
        if self.place == "device":
            self._held[index] = env
            return
        if self._coming is not None and self._coming[0] == index:
            self._coming[1].result()
            self._coming = None
        if self.place == "host":
            self._held[index] = {node: _on_host(value, self._device) for node, value in env.items()}
            return
        self._held[index] = self._write(index, env)

    def close(self) -> None:
        """Free what they took."""
        if self._threads is not None:
            self._threads.shutdown(wait=True)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._held = [{} for _ in self._held]

    def _fetch(self, index: int) -> Env:
        if self.place == "host":
            return dict(self._held[index])
        found: Env = {}
        for node, value in self._held[index].items():
            found[node] = read_tensor(value) if value is not None else None
        return found

    def _write(self, index: int, env: Env) -> dict[fx.Node, Any]:
        assert self._folder is not None
        file = self._folder / f"{index}.safetensors"
        tensors = {
            node.name: value.detach().cpu().contiguous().clone()
            for node, value in env.items()
            if isinstance(value, Tensor)
        }
        needed, free = sum(t.nbytes for t in tensors.values()), shutil.disk_usage(self._folder).free
        if free < needed:
            raise JournalError(
                f"the disk is full: activations of a sample need {needed:,} bytes and {free:,} are free in "
                f"{self._folder.parent}: free some space and run the same command again"
            )
        save_file(tensors, file)
        infos = read_header(file)
        return {node: infos.get(node.name) for node in env}


def _on_host(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor) or device.type == "cpu":
        return value
    pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return pinned.copy_(value)
