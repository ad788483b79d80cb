"""The choice of a backend: ranking, refusals that are kept, third parties, unknown names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from awqc import backend as registry
from awqc.backend import Backend, LinearShape, PackedLinear, backends, get_backend, register_backend
from awqc.backends.cpu import CpuBackend
from awqc.backends.reference import ReferenceBackend
from awqc.errors import BackendError
from awqc.quantized import QuantizedWeight, Scheme, quantize
from awqc.runtime.lowering import lower_linear

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The two backends that need no GPU, and what a test registers."""
    shipped = backends()
    monkeypatch.setattr(registry, "_REGISTRY", {name: shipped[name] for name in ("cpu", "reference")})
    yield
    registry._import_backends.cache_clear()


def weight(n: int = 32, k: int = 128, bits: int = 4) -> QuantizedWeight:
    return quantize(torch.randn(n, k), Scheme(bits, 64))


def test_auto_takes_the_backend_of_highest_priority() -> None:
    lowered = lower_linear(weight(), None, torch.float32, "cpu")
    assert lowered.backend.name == "cpu"
    assert lowered.refused == {}
    assert lowered.shape == LinearShape(32, 128, Scheme(4, 64), torch.float32, CPU)


@pytest.mark.usefixtures("without_llvm")
def test_auto_falls_to_the_next_and_keeps_the_reason() -> None:
    lowered = lower_linear(weight(n=33), None, torch.float32, CPU)
    assert lowered.backend.name == "reference"
    assert lowered.refused == {"cpu": "needs a multiple of 16 output features, not 33"}


def test_a_named_backend_that_refuses_falls_to_reference_with_its_reason() -> None:
    lowered = lower_linear(weight(bits=8), None, torch.float32, CPU, "cpu")
    assert lowered.backend.name == "reference"
    assert lowered.refused == {"cpu": "holds codes of at most 4 bits, not 8"}


def test_a_backend_object_carries_its_options() -> None:
    lowered = lower_linear(weight(), None, torch.float32, CPU, CpuBackend(prefill="packed"))
    assert lowered.packed.tensors["dense"] is None


def test_the_weight_moves_to_the_device() -> None:
    lowered = lower_linear(weight(), torch.zeros(32), torch.float32, "meta")
    assert {tensor.device.type for tensor in lowered.packed.tensors.values()} == {"meta"}
    assert lowered.refused == {"cpu": "runs on cpu, not on meta"}


def test_unknown_backend() -> None:
    with pytest.raises(BackendError) as error:
        lower_linear(weight(), None, torch.float32, CPU, "cuda")
    assert str(error.value) == "unknown backend 'cuda': choose one of auto, cpu, reference"


@pytest.mark.usefixtures("without_llvm")
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_no_backend_at_all(backend: str) -> None:
    with pytest.raises(BackendError) as error:
        lower_linear(weight(), None, torch.int8, CPU, backend)
    assert str(error.value) == (
        "no backend runs a 32x128 linear of W4 g64 asym weights with torch.int8 activations on cpu: "
        "cpu computes in bfloat16: float32, float16 or bfloat16 activations, not torch.int8; "
        "reference multiplies floating-point activations, not torch.int8"
    )


def test_a_third_party_backend_takes_part() -> None:
    @register_backend("narrow")
    class Narrow(ReferenceBackend):
        priority = 99

        def refuses(self, shape: LinearShape) -> str | None:
            return None if shape.out_features < 100 else f"is narrow: {shape.out_features} outputs"

    assert lower_linear(weight(n=96), None, torch.float32, CPU).backend.name == "narrow"
    wide = lower_linear(weight(n=112), None, torch.float32, CPU)
    assert (wide.backend.name, wide.refused) == ("cpu", {"narrow": "is narrow: 112 outputs"})


def test_a_name_is_given_once() -> None:
    with pytest.raises(BackendError) as error:

        @register_backend("cpu")
        class Other(Backend):
            def refuses(self, shape: LinearShape) -> str | None:
                return None

            def pack(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
                raise NotImplementedError

            def unpack(
                self, packed: PackedLinear, shape: LinearShape
            ) -> tuple[QuantizedWeight, Tensor | None]:
                raise NotImplementedError

    assert str(error.value) == "backend 'cpu' is already registered by awqc.backends.cpu"


def test_an_installed_package_registers_through_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / "awqc_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: awqc-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[awqc.backends]\nplugin = awqc_test_plugin\n")
    (tmp_path / "awqc_test_plugin.py").write_text(
        "from awqc.backend import register_backend\n"
        "from awqc.backends.reference import ReferenceBackend\n"
        "@register_backend('plugin')\n"
        "class PluginBackend(ReferenceBackend): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry._import_backends.cache_clear()
    assert get_backend("plugin").name == "plugin"
    assert lower_linear(weight(), None, torch.float32, CPU, "plugin").backend.name == "plugin"
