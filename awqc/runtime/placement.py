"""Where the tensors of a loaded model lie: on one device, on several, or offloaded to host memory or disk.

Which module goes where, and the hooks that bring offloaded tensors to the device that runs them, are
accelerate's. Packed weights are made for the device that runs them, wherever they are kept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awqc.checkpoints.shards import save_tensors
from awqc.errors import BackendError, CheckpointError, ConfigError
from awqc.runtime.packed import PackedModule

#: What accelerate calls a place by.
Place = int | str | torch.device
#: Device maps that are computed.
COMPUTED = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass
class Placement:
    """The place of every tensor of a model.

    Args:
        places: module name -> device, ``"cpu"`` or ``"disk"``; the longest name in front counts.
        main: the device that runs what is offloaded.
        folder: where tensors on disk go.
    """

    places: Mapping[str, Place]
    main: torch.device
    folder: Path | None = None
    _files: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def several(self) -> bool:
        """Whether not everything lies where it runs, on one device."""
        return len(set(self.places.values())) > 1 or "disk" in self.places.values()

    def place(self, name: str) -> Place:
        """Where the module or tensor ``name`` is kept."""
        while name not in self.places:
            if not name:
                raise ConfigError("the device map leaves modules out: give every module a device")
            name = name.rpartition(".")[0]
        return self.places[name]

    def device(self, name: str) -> torch.device:
        """The device that runs the module ``name``."""
        place = self.place(name)
        return self.main if place in ("cpu", "disk") else _device(place)

    def offloads(self, name: str) -> bool:
        """Whether the module ``name`` is kept elsewhere than it runs."""
        place = self.place(name)
        return place == "disk" or _device(place) != self.device(name)

    def put(self, tensor: Tensor, *names: str) -> Tensor:
        """Bring ``tensor``, which has these names, to its place; what goes to disk alone is left on ``meta``.

        Raises:
            CheckpointError: if it cannot be written.
        """
        places = [self.place(name) for name in names]
        if "disk" in places:
            self._files |= dict.fromkeys(names, self._write(tensor, names[0]))
        kept = next((place for place in places if place != "disk"), "meta")
        return tensor.to(_device(kept))

    def _write(self, tensor: Tensor, name: str) -> dict[str, str]:
        assert self.folder is not None
        file = self.folder / f"{name}.safetensors"
        try:
            save_tensors({name: tensor.detach().cpu().contiguous()}, file)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be written: {error}; offload to another folder") from error
        return {"safetensors_file": str(file), "weight_name": name}

    def put_packed(self, name: str, module: PackedModule) -> None:
        """Bring the tensors of ``module`` to their places, in place.

        Raises:
            BackendError: if they cannot be moved.
        """
        for part, tensor in list(module._buffers.items()):
            if tensor is None:
                continue
            if tensor.layout is not torch.strided and self.offloads(name):
                raise BackendError(
                    f"{name}: the tensors that backend {module.backend.name!r} packs cannot be moved "
                    f"(layout {tensor.layout}): keep this module on {self.device(name)}, or choose another "
                    "backend"
                )
            module._buffers[part] = self.put(tensor, f"{name}.{part}")

    def dispatch(self, model: nn.Module) -> None:
        """Let ``model``, whose tensors are at their places, run."""
        if not self.several:
            return
        from accelerate import dispatch_model

        # What it warns of, that parameters are on meta, is what was asked for.
        logger = logging.getLogger("accelerate.big_modeling")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            dispatch_model(
                model,
                dict(self.places),
                main_device=self.main.index if self.main.type == "cuda" else str(self.main),
                offload_index=self._files or None,
                offload_buffers=True,
                skip_keys=getattr(model, "_skip_keys_device_placement", None),
            )
        finally:
            logger.setLevel(level)


def _device(place: Place) -> torch.device:
    """The device that a map means; its numbers are those of GPUs."""
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def on(device: torch.device) -> Placement:
    """Everything on one device."""
    return Placement({"": device}, device)


def compute_places(
    model: nn.Module,
    device_map: str | Mapping[str, Place],
    max_memory: Mapping[Place, int | str] | None,
    main: torch.device,
    folder: str | Path | None,
) -> Placement:
    """The placement of ``model``, all of whose tensors may be on ``meta``.

    Args:
        model: with packed modules in place, so that sizes are those of packed tensors.
        device_map, max_memory: as :func:`awqc.load` takes them.
        main: the device that runs what is offloaded.
        folder: where tensors on disk go.

    Raises:
        ConfigError: for an unknown or incomplete map, one that divides modules which share a tensor, or if it
            needs a folder and there is none.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import check_device_map, find_tied_parameters, get_balanced_memory

    whole = [*(getattr(model, "_no_split_modules", None) or ()), *_packed_classes(model)]
    try:
        if isinstance(device_map, str):
            room: Any = None if max_memory is None else dict(max_memory)
            if device_map != "sequential":
                low_zero = device_map == "balanced_low_0"
                room = get_balanced_memory(model, room, no_split_module_classes=whole, low_zero=low_zero)
            places = infer_auto_device_map(model, room, no_split_module_classes=whole, offload_buffers=True)
        else:
            places = dict(device_map)
        check_device_map(model, places)
    except ValueError as error:
        raise ConfigError(f"device_map cannot be used: {error}") from error
    placement = Placement(places, main, None if folder is None else Path(folder))
    for shared in find_tied_parameters(model):
        apart = {name: placement.device(name) for name in shared}
        if len(set(apart.values())) > 1:
            where = ", ".join(f"{name!r} on {device}" for name, device in apart.items())
            raise ConfigError(f"device_map divides one tensor: {where}: give these modules the same device")
    if "disk" in places.values():
        if placement.folder is None:
            names = [name for name, place in places.items() if place == "disk"]
            raise ConfigError(
                f"{names[0] or 'the whole model'} {f'and {len(names) - 1} more modules ' * (len(names) > 1)}"
                "would go to disk: give offload_folder=..., or allow more memory"
            )
        placement.folder.mkdir(parents=True, exist_ok=True)
    return placement


def main_device(device_map: str | Mapping[str, Place], max_memory: Mapping[Place, int | str] | None) -> Any:
    """The device that runs what is offloaded: the first accelerator that the map or the limits name."""
    named: Iterable[Place]
    if not isinstance(device_map, str):
        named = device_map.values()
    elif device_map not in COMPUTED:
        raise ConfigError(f"device_map={device_map!r}: choose one of {', '.join(COMPUTED)}, or give a dict")
    else:
        from accelerate.utils import get_max_memory

        try:
            room = get_max_memory(None if max_memory is None else dict(max_memory))
        except ValueError as error:
            raise ConfigError(f"max_memory cannot be used: {error}") from error
        named = [place for place, limit in room.items() if limit]
    found = [place for place in named if place not in ("cpu", "disk")]
    return torch.device(found[0] if found else "cpu")


def _packed_classes(model: nn.Module) -> list[str]:
    return sorted({type(m).__name__ for m in model.modules() if isinstance(m, PackedModule)})
