"""What every backend owes: agreement with float64 arithmetic, an exact way back, and one graph."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from awqc.backend import LinearShape, backends
from awqc.quantized import QuantizedWeight, Scheme, quantize
from awqc.runtime.linear import QuantLinear
from awqc.runtime.lowering import lower_linear

CPU = torch.device("cpu")
#: Where backends run here. Triton's kernels run on the CPU too, interpreted.
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]
#: Backends without a device here.
ELSEWHERE = set() if torch.cuda.is_available() else {"exllama", "marlin"}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = [0, 1, 7, 8, 9, 33]
#: The coarsest dtype to which a backend rounds on the way; that of the activations for the others.
ROUNDS_TO = {"reference": torch.float32, "cpu": torch.bfloat16}
CASES = [
    *[(64, 256, Scheme(bits)) for bits in range(2, 9)],
    *[(48, 384, Scheme(4, group)) for group in (-1, 16, 32, 64, 96, 128)],
    *[(32, 512, Scheme(bits, -1, zero_point=False)) for bits in (3, 4, 8)],
    (32, 512, Scheme(4, 256)),
    (144, 128, Scheme(4, 64, zero_point=False)),
    (32, 320, Scheme(4, 128)),  # a ragged last group that splits
    (16, 300, Scheme(4, 128)),  # and one that does not
    (7, 33, Scheme(3, 10)),
    (1, 1, Scheme(2, -1)),
]


def legal(name: str, n: int, k: int, scheme: Scheme, dtype: torch.dtype, device: torch.device = CPU) -> bool:
    return backends()[name]().refuses(LinearShape(n, k, scheme, dtype, device)) is None


def marks(device: torch.device) -> list[pytest.MarkDecorator]:
    return [pytest.mark.gpu] if device.type == "cuda" else []


LEGAL = [
    pytest.param(
        name,
        *case,
        dtype,
        device,
        id=f"{name}-{case[0]}x{case[1]}-{case[2]}-{dtype}-{device}",
        marks=marks(device),
    )
    for name in backends()
    for case in CASES
    for dtype in DTYPES
    for device in DEVICES
    if legal(name, *case, dtype, device)
]
#: Every backend on every device that it runs on, with the first dtype that it takes.
RUNS = [
    pytest.param(name, dtypes[0], device, id=f"{name}-{dtypes[0]}-{device}", marks=marks(device))
    for name in backends()
    for device in DEVICES
    if (dtypes := [dtype for dtype in DTYPES if legal(name, 32, 128, Scheme(4, 64), dtype, device)])
]


def make_weight(n: int, k: int, scheme: Scheme) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(n * k + scheme.bits)
    return quantize(torch.randn(n, k, generator=generator) / k**0.5, scheme)


def make_input(rows: int, k: int, dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(rows + k)).to(device, dtype)


def float64_weight(weight: QuantizedWeight) -> Tensor:
    group = torch.arange(weight.in_features) // weight.scheme.group(weight.in_features)
    return (weight.codes.double() - weight.zeros.double()[:, group]) * weight.scales.double()[:, group]


def zero_terms(weight: QuantizedWeight) -> Tensor:
    """What the cpu backend adds to ``(code - middle) * scale``: rounded at its own size, not the weight's."""
    group = torch.arange(weight.in_features) // weight.scheme.group(weight.in_features)
    middle = weight.scheme.levels // 2
    return ((middle - weight.zeros.double()) * weight.scales.double())[:, group]


def root_of_squares(x: Tensor, weight: Tensor) -> Tensor:
    """Root of the summed squares of the products whose sum is ``x @ weight.T``."""
    return (x.double().square() @ weight.double().square().t()).sqrt()


def lowered(
    name: str,
    weight: QuantizedWeight,
    bias: Tensor | None,
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> QuantLinear:
    result = lower_linear(weight, bias, dtype, device, name)
    assert result.backend.name == name
    return QuantLinear(result)


def assert_close_to_float64(
    name: str, got: Tensor, x: Tensor, weight: QuantizedWeight, bias: Tensor | None
) -> None:
    """Each element within what independent roundings allow.

    A product x * w passes at most four roundings to the backend's own dtype (activation, scale, zero term,
    weight), each off by a relative ``u / sqrt(3)`` or less (one standard deviation); over K products of
    either sign they add up as squares do, and six deviations of the four are below ``8 u``. float32
    accumulation adds K steps of its own ``u``, below ``4 sqrt(K) u``. The result is rounded once before
    the bias and once after it.
    """
    got, x = got.cpu(), x.cpu()
    energy = root_of_squares(x, float64_weight(weight))
    if name == "cpu":
        energy = energy + root_of_squares(x, zero_terms(weight))
    offset = torch.zeros(()).double() if bias is None else bias.double()
    product = x.double() @ float64_weight(weight).t()
    own = torch.finfo(ROUNDS_TO.get(name, x.dtype)).eps / 2
    result = max(own, torch.finfo(x.dtype).eps / 2)
    accumulation = weight.in_features**0.5 * torch.finfo(torch.float32).eps / 2
    bound = (8 * own + 4 * accumulation) * energy + 2 * result * (product.abs() + offset.abs())
    excess = (got.double() - product - offset).abs() - bound
    assert (excess <= 0).all(), f"{name}: an element is {excess.max():.3g} outside its bound"


def test_every_backend_can_run_something() -> None:
    assert {param.values[0] for param in LEGAL} == set(backends()) - ELSEWHERE


@pytest.mark.parametrize(("name", "n", "k", "scheme", "dtype", "device"), LEGAL)
def test_agrees_with_float64(
    name: str, n: int, k: int, scheme: Scheme, dtype: torch.dtype, device: torch.device
) -> None:
    weight = make_weight(n, k, scheme)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    for vector in (None, bias):
        linear = lowered(name, weight, vector, dtype, device)
        for rows in ROWS:
            x = make_input(rows, k, dtype, device)
            got = linear(x)
            assert (got.shape, got.dtype) == ((rows, n), dtype)
            assert_close_to_float64(name, got, x, weight, vector)


@pytest.mark.parametrize(("name", "dtype", "device"), RUNS)
def test_the_oracle_notices_one_wrong_group(name: str, dtype: torch.dtype, device: torch.device) -> None:
    weight = make_weight(32, 512, Scheme(4, 128))
    wrong = weight.scales.clone()
    wrong[5, 2] *= 1.2
    linear = lowered(
        name, QuantizedWeight(weight.codes, wrong, weight.zeros, weight.scheme), None, dtype, device
    )
    x = make_input(33, 512, dtype, device)
    with pytest.raises(AssertionError, match="outside its bound"):
        assert_close_to_float64(name, linear(x), x, weight, None)


@pytest.mark.parametrize(("name", "dtype", "device"), RUNS)
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 12),
    k=st.integers(1, 20),
    multiple=st.sampled_from([1, 16, 32]),
    bits=st.integers(2, 8),
    group_size=st.sampled_from([-1, 7, 16, 32, 64, 96, 128]),
    zero_point=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_unpack_is_the_exact_inverse_of_pack(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    n: int,
    k: int,
    multiple: int,
    bits: int,
    group_size: int,
    zero_point: bool,
    seed: int,
) -> None:
    n, k, scheme = n * multiple, k * multiple, Scheme(bits, group_size, zero_point)
    if not legal(name, n, k, scheme, dtype, device):
        return
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(k)
    weight = QuantizedWeight(
        torch.randint(0, 2**bits, (n, k), generator=generator).to(torch.uint8),
        torch.rand(n, groups, generator=generator).to(torch.float16),
        torch.randint(0, 2**bits, (n, groups), generator=generator).to(torch.uint8),
        scheme,
    )
    bias = torch.randn(n, generator=generator)
    unpacked, same_bias = lowered(name, weight, bias, dtype, device).unpack()
    assert unpacked.scheme == scheme
    assert same_bias is not None
    assert torch.equal(same_bias.cpu(), bias)
    for tensor in ("codes", "scales", "zeros"):
        got, want = getattr(unpacked, tensor), getattr(weight, tensor)
        assert got.dtype == want.dtype, tensor
        assert torch.equal(got.cpu(), want), tensor


@pytest.mark.parametrize(("name", "dtype", "device"), RUNS)
def test_packing_leaves_the_weight_alone(name: str, dtype: torch.dtype, device: torch.device) -> None:
    weight = make_weight(32, 128, Scheme(3, 64))
    before = [weight.codes.clone(), weight.scales.clone(), weight.zeros.clone()]
    linear = lowered(name, weight, None, dtype, device)
    linear(make_input(3, 128, dtype, device))
    assert all(map(torch.equal, before, (weight.codes, weight.scales, weight.zeros)))


@pytest.mark.parametrize(("name", "dtype", "device"), RUNS)
def test_opcheck(name: str, dtype: torch.dtype, device: torch.device) -> None:
    packed = lower_linear(make_weight(32, 128, Scheme(4, 64)), torch.zeros(32), dtype, device, name).packed
    x = make_input(2, 128, dtype, device)
    torch.library.opcheck(packed.op, (x, *packed.tensors.values(), *packed.constants))


@pytest.mark.parametrize(("name", "dtype", "device"), RUNS)
def test_compiles_without_a_graph_break(name: str, dtype: torch.dtype, device: torch.device) -> None:
    model = torch.nn.Sequential(
        lowered(name, make_weight(64, 128, Scheme(4, 64)), torch.zeros(64), dtype, device),
        torch.nn.SiLU(),
        lowered(name, make_weight(32, 64, Scheme(4, 32)), None, dtype, device),
    )
    x = make_input(6, 128, dtype, device).view(2, 3, 128)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


@pytest.mark.parametrize(("name", "dtype", "device"), [run for run in RUNS if run.values[2] != CPU])
def test_captured_in_a_cuda_graph(name: str, dtype: torch.dtype, device: torch.device) -> None:
    linear = lowered(name, make_weight(144, 512, Scheme(4, 128)), torch.ones(144), dtype, device)
    for rows in ROWS[1:]:
        x = make_input(rows, 512, dtype, device)
        want = linear(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = linear(x)
        for repeat in range(2):
            got.fill_(repeat)
            graph.replay()
            assert torch.equal(got, want)
