"""Products of many tokens in Gluon: how they are cut, where they are used, what is launched and compiled."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import triton

from awqc.kernels import qlinear_triton
from awqc.kernels.hardware import Hardware, known
from awqc.kernels.launch import launches
from awqc.kernels.qlinear_triton import TritonGemm
from awqc.kernels.triton_call import Call
from awqc.kernels.triton_many import TILES, Cut, ManyTile, cuts, fastest, missing, product
from awqc.kernels.triton_tile import Tile
from awqc.kernels.triton_weight import Weight
from tests.kernels import uninterpreted
from tests.kernels.triton_weights import weight_of

H200 = known()["h200"]
HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: str(tile.block_m))
@pytest.mark.parametrize(
    ("m", "n", "blocks"), [(300, 4096, 16), (1024, 14336, 16), (2048, 8192, 112), (17, 100, 1)]
)
def test_every_tile_is_whole_or_shared(tile: ManyTile, m: int, n: int, blocks: int) -> None:
    places = 132 * tile.programs
    found = list(cuts(tile, m, n, blocks, 132))
    assert len(found) == len(set(found))
    for cut in found:
        assert cut.tiles == -(-m // tile.block_m) * -(-n // 128)
        assert 1 <= cut.shares <= blocks
        assert (cut.shares == 1) == (cut.shared == 0)
        assert cut.shares == 1 or (cut.whole % places == 0 and cut.shared < places)
        assert cut.programs == cut.whole + cut.shared * cut.shares


@pytest.mark.usefixtures("compiling")
def test_tiles_that_do_not_fill_the_processors_are_shared_out() -> None:
    # 448 tiles are three rounds of 132, and 52 that leave most processors idle.
    cut = fastest(1024, weight_of(14336, 4096), H200)
    assert cut is not None
    assert (cut.tile.block_m, cut.whole, cut.shared, cut.shares) == (256, 396, 52, 2)


@pytest.mark.usefixtures("compiling")
def test_more_tokens_take_larger_tiles_and_more_time() -> None:
    weight, before, time = weight_of(8192, 28672), 0, 0.0
    for tokens in (17, 33, 64, 65, 128, 129, 256, 512, 2048):
        cut = fastest(tokens, weight, H200)
        assert cut is not None
        assert cut.tile.block_m >= before
        assert cut.time(112, 132) >= time
        before, time = cut.tile.block_m, cut.time(112, 132)


@pytest.mark.usefixtures("compiling")
def test_small_products_and_few_tokens_take_the_portable_kernel() -> None:
    for tokens, weight in ((100, weight_of(256, 512)), (16, weight_of(8192, 28672))):
        assert fastest(tokens, weight, H200) is None
        assert isinstance(qlinear_triton.route(tokens, weight, HALF, H200), Tile)


@pytest.mark.usefixtures("compiling")
def test_the_weight_is_written_out_where_tiles_would_leave_processors_idle() -> None:
    # Eight rounds for 7.06 rounds of tiles of a weight that is written out in a few microseconds.
    weight = weight_of(1024, 1024)
    assert fastest(132 * 256 * 7 // 8 + 1, weight, H200) is None
    # Of a device whose rates are not known nothing else is assumed.
    assert fastest(132 * 256 * 7 // 8 + 1, weight, replace(H200, read_rate=None)) is not None


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize(
    ("change", "group_size", "reason"),
    [
        ({}, 128, None),
        ({}, 32, None),
        ({"capability": (8, 0)}, 128, "needs compute capability 9.0"),
        ({"capability": (10, 0)}, 128, "needs compute capability 9.0"),
        ({}, 16, "needs groups of a multiple of 32 channels"),
        ({"shared_bytes": 99 << 10}, 128, "needs more shared memory than 101376 bytes"),
    ],
)
def test_what_is_missing_has_a_name(change: dict[str, object], group_size: int, reason: str | None) -> None:
    assert missing(weight_of(256, 512, group_size), replace(H200, **change)) == reason


@pytest.mark.usefixtures("compiling")
def test_a_triton_that_was_not_tried_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    weight, at = weight_of(4096, 4096), replace(H200, name="another")
    assert missing(weight, at) == "was tried with Triton 3.6 to 3.9, not with 4.0.0"
    assert qlinear_triton.route(1000, weight, HALF, at) is None


def described_without() -> None:
    """Prints what a description says beside the routine of a library; see below."""
    triton.__version__ = "4.0.0"
    weight, x = weight_of(4096, 4096), torch.empty(1000, 4096, dtype=HALF, device="meta")
    operands = (weight.packed, weight.scales, weight.zeros)
    _, blas = launches(TritonGemm.op, H200, (x, *operands, None, 4096, 128), x)
    print(json.dumps(dict(blas.config)))


def test_a_description_says_why_it_is_not_used() -> None:
    command = "from tests.kernels.test_triton_many import described_without as run; run()"
    config = json.loads(uninterpreted.run("-c", command).splitlines()[-1])
    assert config == {"without many_gluon.py, which": "was tried with Triton 3.6 to 3.9, not with 4.0.0"}


def test_what_is_interpreted_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert missing(weight_of(256, 512), H200) == "has no interpreter"
    assert not isinstance(qlinear_triton.route(100, weight_of(256, 512), torch.float16, H200), Cut)


def calls(cut: Cut, weight: Weight, m: int, dtype: torch.dtype, *, bias: bool = False) -> list[Call]:
    x = torch.empty(m, weight.k, dtype=dtype, device="meta")
    y = x.new_empty(m, weight.n)
    return product(x, weight, x.new_empty(weight.n) if bias else None, y, cut)


def described() -> None:
    """Prints what a description says of whole tiles and of shared ones; see below."""
    found = []
    for n, k, m, group_size in ((8192, 2048, 512, 128), (14336, 4096, 1024, 128), (8192, 2045, 512, -1)):
        weight, x = weight_of(n, k, group_size), torch.empty(m, k, dtype=torch.float16, device="meta")
        operands = (weight.packed, weight.scales, weight.zeros)
        for launch in launches(TritonGemm.op, H200, (x, *operands, None, n, group_size), x):
            found.append((launch.kernel, launch.grid, launch.block, launch.reads, launch.writes))
    print(json.dumps(found))


def test_a_description_counts_what_is_moved() -> None:
    command = "from tests.kernels.test_triton_many import described as run; run()"
    whole, shared, joined, ragged = json.loads(uninterpreted.run("-c", command).splitlines()[-1])
    of_weight = 8192 * 2048 // 2 + 8192 * 16 * 3
    assert whole == ["many_gluon.py:gemm_many", [128], [256], of_weight + 512 * 2048 * 2, 512 * 8192 * 2]
    partial = 52 * 2 * 256 * 128 * 4
    assert shared[1] == [396 + 2 * 52]
    assert shared[4] == 1024 * 14336 * 2 + partial
    assert joined[:2] == ["many_gluon.py:add_tiles", [52, 16]]
    assert joined[3] >= partial
    # Rows of activations begin at multiples of 16 bytes: 3 channels more, of zeros.
    assert ragged[3] == 8192 * 2048 // 2 + 8192 * 3 + 512 * 2048 * 2


def test_the_least_memory_that_hopper_has_is_enough() -> None:
    for tile in TILES:
        assert tile.programs * (tile.shared_bytes(64) + 2048) <= 228 << 10
    at = Hardware("some", "cuda", 100, (9, 0), 227 << 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        assert missing(weight_of(256, 512), at) is None
