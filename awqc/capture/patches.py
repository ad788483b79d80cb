"""The patches by which transformers' own exporter gets modules through ``torch.export``.

They replace forwards that split packed images by equal ones of static shape, and the like. Which modules
they are for is transformers' knowledge; what comes out is compared with eager execution like anything else.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from awqc.capture.tracing import reason
from awqc.errors import CaptureError

_UTILS, _EXPORTER = "transformers.exporters.utils", "transformers.exporters.exporter_dynamo"


def _utils() -> Any:
    """The module that knows the patches.

    Raises:
        CaptureError: if the installed transformers has none.
    """
    try:
        importlib.import_module(_EXPORTER)  # registers the patches
        return importlib.import_module(_UTILS)
    except ImportError as error:
        raise CaptureError(f"the installed transformers has no exporter ({error})") from error


@contextmanager
def exporter_patches() -> Iterator[None]:
    """Patched forwards within the block.

    Raises:
        CaptureError: if the installed transformers has none.
    """
    with _utils().apply_patches("dynamo"):
        yield


def prepared_arguments(module: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments besides ``kwargs`` that spare a patched forward computing shapes from values, such as the
    lengths of packed images. They follow from the sizes of the inputs, not from what the inputs say.

    Raises:
        CaptureError: if transformers cannot compute them.
    """
    if any(name.endswith("ids") for name in kwargs):
        return {}  # what it would prepare for a module that reads tokens depends on the tokens
    given = dict(kwargs)
    try:
        _utils().precompute_export_inputs(module, given)
    except Exception as error:
        raise CaptureError(f"transformers cannot prepare its inputs: {reason(error)}") from error
    return {name: value for name, value in given.items() if value is not kwargs.get(name)}
