"""Loading and launching: the layout of parameters without a GPU, launches on one."""

from __future__ import annotations

import pytest
import torch

from awqc.kernels import cuda_launch, nvrtc
from awqc.kernels.cuda_launch import CudaKernel, LaunchError, parameter_offsets

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SOURCE = """
extern "C" __global__ void affine(float* y, const float* x, int n, float a, long long b) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = a * x[i] + b;
}
"""


@pytest.mark.parametrize(
    ("params", "offsets"),
    [
        ("PPi", [0, 8, 16]),
        ("iPfq", [0, 8, 16, 24]),
        ("128siP", [0, 128, 136]),
        ("iii", [0, 4, 8]),
    ],
)
def test_parameters_lie_as_in_c(params: str, offsets: list[int]) -> None:
    assert parameter_offsets(params) == offsets


def affine(**options: int) -> CudaKernel:
    arch = nvrtc.architecture(torch.cuda.get_device_capability())
    return CudaKernel(nvrtc.compile_source(SOURCE, arch), "affine", "PPifq", 0, **options)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("options", [{}, {"shared": 100_000}, {"dependent": True}])
def test_a_launch(options: dict[str, int]) -> None:
    x = torch.randn(1000, device="cuda")
    y = torch.full_like(x, torch.nan)
    affine(**options).launch((4,), (256,), (y.data_ptr(), x.data_ptr(), 1000, 2.0, 3))
    assert torch.equal(y, 2 * x + 3)


@pytest.mark.gpu
@needs_gpu
def test_a_launch_is_captured_with_its_arguments() -> None:
    x, y = torch.randn(1000, device="cuda"), torch.zeros(1000, device="cuda")
    kernel = affine()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.launch((4,), (256,), (y.data_ptr(), x.data_ptr(), 1000, 2.0, 3))
    x.normal_()
    graph.replay()
    assert torch.equal(y, 2 * x + 3)


@pytest.mark.gpu
@needs_gpu
def test_refusals_name_the_call() -> None:
    cubin = nvrtc.compile_source(SOURCE, nvrtc.architecture(torch.cuda.get_device_capability()))
    with pytest.raises(LaunchError, match=r"^cuModuleGetFunction\('nothing'\): named symbol not found"):
        CudaKernel(cubin, "nothing", "P", 0)
    with pytest.raises(LaunchError, match=r"^cuLaunchKernelEx\(grid=\(1,\), block=\(4096,\)\): invalid"):
        affine().launch((1,), (4096,), (0, 0, 0, 0.0, 0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA driver")
def test_a_machine_without_a_driver_is_told() -> None:
    with pytest.raises(LaunchError, match=r"^no CUDA driver: "):
        cuda_launch.driver()
