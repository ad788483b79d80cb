"""The kernel for few tokens, without a GPU: its tilings, and that it compiles for all targets."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from awqc.kernels import extension, marlin_stream, nvrtc
from awqc.kernels import marlin_layout as layout
from awqc.kernels.cuda_launch import read_source
from awqc.kernels.hardware import Hardware
from awqc.kernels.marlin_stream import Problem, tile, tile_tokens

#: Shared memory that a block may have on compute capability 8.0, 8.9 and 9.0, in bytes.
LIMITS = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90a": 227 << 10}


@pytest.mark.parametrize("limit", LIMITS.values())
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 3, 16, 64, 100, 224, 448, 2004])
def test_every_tiling_fits_and_covers_the_weight(rows: int, group: int, limit: int) -> None:
    for columns in (1, 7, 32, 224):
        for tokens in (1, 2, 4, 8, 16):
            tiling = tile(rows, columns, tokens, group, 132, limit)
            assert tiling.shared_bytes(tokens, group) <= tiling.occupied_bytes(tokens, group, limit) <= limit
            # 1024 bytes of barriers, 8 each.
            assert tiling.warps * tiling.depth <= 128
            shares = tiling.blocks(rows * 4)
            assert shares * tiling.strips * tiling.rounds >= rows * 4
            assert (shares - 1) * tiling.strips * tiling.rounds < rows * 4


@pytest.mark.parametrize(("rows", "columns"), [(64, 32), (224, 32), (64, 112), (128, 224), (96, 32)])
def test_up_to_eight_tokens_are_cut_alike(rows: int, columns: int) -> None:
    """The choice is stable: a token more or less changes nothing but what is copied."""
    assert len({tile(rows, columns, tokens, 128, 132, LIMITS["sm_90a"]) for tokens in (1, 2, 4, 8)}) == 1


CAPABILITIES = {"sm_80": (8, 0), "sm_89": (8, 9), "sm_90a": (9, 0)}
#: Multiprocessors of the devices of each architecture that the limits are of.
PROCESSORS = {"sm_80": 108, "sm_89": 128, "sm_90a": 132}


def variants(arch: str) -> list[dict[str, int | str]]:
    """Macros of all tilings that weights of usual sizes are cut into; dtypes and groups go round."""
    sizes = itertools.product((64, 1024, 4096, 8192, 14336, 128256), (128, 4096, 28672), (1, 8, 16))
    dtypes = itertools.cycle(itertools.product((torch.float16, torch.bfloat16), (False, True)))
    groups = itertools.cycle((128, 64, 128, 32, 128))
    forms = itertools.cycle([{}, {}, {"weights": 2, "gated": True}, {}, {"weights": 3}])
    at = Hardware(arch, "cuda", PROCESSORS[arch], CAPABILITIES[arch], LIMITS[arch])
    found: dict[object, dict[str, int | str]] = {}
    for (n, k, tokens), group, form in zip(sizes, groups, forms, strict=False):
        dtype, bfloat16_scales = next(dtypes)
        problem = Problem(-(-n // 64), -(-k // 128), tokens, group, dtype, bfloat16_scales, **form)
        tiling = problem.tiling(at)
        macros = problem.macros(tiling, at.has_bulk_copies)
        found.setdefault((tiling, tile_tokens(tokens), problem.gated), macros)
    return list(found.values())


@pytest.mark.skipif(not nvrtc.available(), reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")
@pytest.mark.parametrize("arch", LIMITS)
def test_the_kernel_compiles_in_every_tiling_and_spares_no_registers(arch: str) -> None:
    source = read_source("marlin_small.cu")
    for defines in variants(arch):
        flags = [f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v"]
        flags += [f"-D{key}={value}" for key, value in defines.items()]
        cubin, log = nvrtc.compile_with_log(source, flags, "marlin_small.cu")
        assert b"small" in cubin
        # One block has a processor to itself, so the compiler need not save registers: it spills at 255 only.
        assert "0 bytes spill stores" in log or "Used 255 registers" in log, defines


class Recorded:
    """A kernel that only notes what it is launched with."""

    def __init__(self, params: str, shared: int) -> None:
        self.format, self.shared, self.handle = struct.Struct(f"@{params}"), shared, 5
        self.launches: list[tuple[Any, ...]] = []

    def launch(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...]) -> None:
        self.launches.append((grid, block, self.format.unpack(self.format.pack(*args))))


@pytest.fixture(params=["sm_80", "sm_90a"])
def recorded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Kernels made for a device of this architecture, none of which runs; plans given to the extension."""
    arch = request.param
    at = Hardware(arch, "cuda", PROCESSORS[arch], CAPABILITIES[arch], LIMITS[arch])
    made: list[Any] = []

    def kernel(file: str, entry: str, params: str, device: torch.device, **options: Any) -> Recorded:
        made.append((Recorded(params, options["shared"]), options))
        return made[-1][0]

    monkeypatch.setattr(marlin_stream, "kernel", kernel)
    monkeypatch.setattr(marlin_stream, "hardware", lambda device: at)
    monkeypatch.setattr(marlin_stream, "tensor_map", lambda x, rows, columns: bytes([rows, columns]) * 64)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(extension, "plan", lambda *args: made.append(args))
    marlin_stream.stream.cache_clear()
    yield made
    marlin_stream.stream.cache_clear()


def packed_of(n: int, k: int) -> torch.Tensor:
    return torch.zeros(-(-n // 64), -(-k // 128), 4, layout.strip_bytes(128), dtype=torch.uint8)


def test_what_a_launch_is_given(recorded: list[Any]) -> None:
    x, packed = torch.zeros(3, 256).half(), packed_of(100, 256)
    bias, residual = torch.zeros(100).half(), torch.zeros(3, 100).half()
    out = marlin_stream.multiply(x, packed, bias, 100, 128, False, residual)
    (run, options), *plans = recorded
    ((grid, block, args),) = run.launches
    assert grid == (8, 1)  # a strip a block
    assert block == (options["WARPS"] * 32,)
    hopper = options["HOPPER"]
    weight = marlin_stream._WEIGHT.pack(
        packed.data_ptr(), bias.data_ptr(), residual.data_ptr(), out.data_ptr(), 0, 100
    )
    if hopper:
        assert args == (bytes([4, 64]) * 64, weight, 3, 8, 2, 4)
        assert plans == [((0, False, False, 128, False, 2, 2, 4), 5, 8, block[0], run.shared)]
    else:
        assert args == (x.data_ptr(), weight, 3, 8, 2, 256)
        assert plans == []


def test_weights_of_one_launch_follow_each_other(recorded: list[Any]) -> None:
    x, weights = torch.zeros(1, 256).half(), [packed_of(n, 256) for n in (100, 64, 70)]
    outs = marlin_stream.multiply_all(x, weights, [None] * 3, [100, 64, 70], 128, False)
    ((run, options),) = recorded  # several weights have no plan
    ((_, _, args),) = run.launches
    found = list(marlin_stream._WEIGHT.iter_unpack(args[1]))
    assert [(first, n) for *_, first, n in found] == [(0, 100), (8, 64), (12, 70)]
    assert [y for *_, y, _, _ in found] == [out.data_ptr() for out in outs]
    assert options["WEIGHTS"] == 3
    assert 20 in args  # strips of all


def test_a_gate_has_the_strips_of_one(recorded: list[Any]) -> None:
    x, gate, up = torch.zeros(2, 256).half(), packed_of(100, 256), packed_of(100, 256)
    out = marlin_stream.multiply_gated(x, gate, up, 100, 128, False)
    (run, options), *plans = recorded
    ((grid, _, args),) = run.launches
    found = list(marlin_stream._WEIGHT.iter_unpack(args[1]))
    assert found == [(w.data_ptr(), 0, 0, out.data_ptr(), 0, 100) for w in (gate, up)]
    assert (options["GATED"], options["STRIPS"]) == (1, 2)
    assert grid == (8, 1)
    assert [plan[0][4] for plan in plans] == [True] * bool(options["HOPPER"])


def test_no_tokens_launch_nothing(recorded: list[Any]) -> None:
    x, packed = torch.zeros(0, 256).half(), packed_of(100, 256)
    assert marlin_stream.multiply(x, packed, None, 100, 128, False).shape == (0, 100)
    assert marlin_stream.multiply_gated(x, packed, packed, 100, 128, False).shape == (0, 100)
    assert [y.shape for y in marlin_stream.multiply_all(x, [packed], [None], [100], 128, False)] == [(0, 100)]
    assert recorded == []
