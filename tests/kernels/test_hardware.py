"""What kernels are planned for."""

from __future__ import annotations

import pytest
import torch

from awqc.kernels.hardware import assumed, file_name, hardware, known
from awqc.kernels.qlinear_marlin import Marlin


def test_the_cpu() -> None:
    found = hardware(torch.device("cpu"))
    assert (found.name, found.type, found.capability) == ("cpu", "cpu", None)
    assert found.processors == torch.get_num_threads()
    assert not found.has_bulk_copies


def test_what_is_known_of_gpus_makes_sense() -> None:
    assert {"h200", "a100", "rtx_4090"} <= known().keys()
    for name, found in known().items():
        assert found.name == f"nvidia_{name}"
        assert found.capability is not None
        assert found.capability >= (8, 0)
        # As the CUDA programming guide has it: what a block may have depends on the capability alone.
        shared = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227}[found.capability]
        assert found.shared_bytes == shared * 1024
        assert found.read_rate is not None
        assert found.product_rate is not None
        assert found.product_rate > 10 * found.read_rate


def test_a_device_may_be_assumed() -> None:
    cuda, at = torch.device("cuda"), known()["a100"]
    with assumed(at):
        assert hardware(cuda) is at
        assert hardware(torch.device("cpu")).name == "cpu"
        assert Marlin.legal(64, 128, 4, 128, torch.float16, cuda) is None
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            hardware(cuda)


def test_names_of_devices() -> None:
    assert file_name("NVIDIA A100-SXM4-80GB") == "nvidia_a100_sxm4_80gb"
