"""The kernel of blocks that stay, without a GPU: who does what of a product, and that it compiles."""

from __future__ import annotations

import ctypes
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch

from awqc.kernels import nvrtc
from awqc.kernels.cuda_launch import read_source
from awqc.kernels.marlin_many import TILE_TOKENS, Shares, _launch_tokens, fitting, multiply, takes
from awqc.kernels.marlin_many import tile as cut
from tests.kernels.marlin_problem import problem
from tests.kernels.on_host import COMPILER

LIMIT = 227 << 10
#: Blocks, waves, tiles, steps: more tiles than blocks and fewer, shares within a tile, of none, of one step.
SHARES = [
    *product((1, 3, 7), (0, 1, 2), (1, 2, 5, 8, 15), (1, 2, 7)),
    *((132, 0, 224, 32), (132, 0, 64, 32), (128, 0, 64, 112), (132, 5, 896, 32), (132, 1, 256, 113)),
]
HOST = """
#include <algorithm>
#define __device__
#define __forceinline__ inline
typedef unsigned u32;
using std::min;
using std::max;
%s
extern "C" int pieces(int blocks, int waves, int tiles, int steps, int block, int* out) {
  Walk walk({blocks, waves, tiles, steps}, block);
  for (int i = 0; i < walk.pieces; ++i, out += 3) {
    const Piece piece = walk.piece(i);
    out[0] = piece.tile, out[1] = piece.begin, out[2] = piece.end;
  }
  return walk.pieces;
}
"""


@pytest.mark.parametrize(("blocks", "waves", "tiles", "steps"), SHARES)
def test_every_step_is_done_once_and_joined_in_order(blocks: int, waves: int, tiles: int, steps: int) -> None:
    shares = Shares(blocks, waves, tiles, steps)
    done: dict[int, dict[int, tuple[int, int]]] = {}
    for block in range(blocks):
        pieces = list(shares.pieces(block))
        # A block leaves its sums once at most, in the first of its pieces that are shared.
        begun = [i for i, (_, begin, _) in enumerate(pieces) if begin]
        assert begun in ([], [sum(tile < waves * blocks for tile, *_ in pieces)])
        for tile, begin, end in pieces:
            assert 0 <= begin < end <= steps
            assert block not in done.setdefault(tile, {})
            done[tile][block] = begin, end
    assert sorted(done) == list(range(tiles))
    for tile, parts in done.items():
        first, *rest = sorted(parts, key=lambda block: parts[block])
        assert shares.others(first, tile) == rest
        assert rest == sorted(rest)
        ends = [parts[block] for block in (first, *rest)]
        assert [begin for begin, _ in ends] == [0, *(end for _, end in ends[:-1])]
        assert ends[-1][1] == steps
        assert shares.joins or not rest


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_the_kernel_has_the_same_pieces(tmp_path: Path) -> None:
    source = tmp_path / "share.cpp"
    source.write_text(HOST % read_source("marlin_share.cuh"))
    command = [
        str(COMPILER),
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-o",
        str(tmp_path / "share.so"),
        str(source),
    ]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(tmp_path / "share.so"))
    for sizes in SHARES:
        shares = Shares(*sizes)
        for block in range(shares.blocks):
            found = (ctypes.c_int * 3 * 100)()
            count = library.pieces(*sizes, block, found)
            assert [tuple(piece) for piece in found[:count]] == list(shares.pieces(block))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("tokens", TILE_TOKENS)
@pytest.mark.parametrize("form", ["whole", "shared", "cluster"])
def test_every_tiling_fits(tokens: int, form: str, group: int) -> None:
    tiling = fitting(tokens, form, group, LIMIT)
    assert tiling.shared_bytes(group) <= LIMIT
    assert tiling.stages >= 3
    for rows, columns, m in ((64, 32, 512), (224, 32, 512), (7, 3, 700), (64, 112, 2048), (2004, 32, 300)):
        tiles = tiling.tiles(rows, m)
        if form == "cluster" and tiles > 66:
            continue
        shares = tiling.shares(rows, columns, m, 132)
        assert shares.blocks <= 132
        work = [sum(end - begin for _, begin, end in shares.pieces(b)) for b in range(shares.blocks)]
        assert sum(work) == tiles * columns
        if form != "whole":
            assert max(work) - min(work) <= 1 or tiles % shares.blocks == 0
        part = 128 * tokens * 4 + 32
        assert shares.parts(tiling).nbytes == (
            shares.blocks * part if shares.joins and form == "shared" else 0
        )


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "expected"),
    [
        (64, 32, 256, (128, "cluster")),
        (224, 32, 256, (256, "whole")),
        (64, 112, 256, (128, "cluster")),
        (128, 224, 256, (256, "cluster")),
        (64, 32, 512, (128, "whole")),
        (224, 32, 512, (256, "shared")),
        (64, 112, 512, (256, "cluster")),
        (128, 224, 512, (256, "whole")),
        (64, 32, 2048, (256, "whole")),
        (224, 32, 2048, (256, "shared")),
        (64, 32, 1536, (256, "shared")),
        (64, 112, 1024, (256, "whole")),
        (64, 112, 2048, (256, "whole")),
        (128, 224, 2048, (256, "whole")),
        (64, 1, 256, (128, "whole")),  # nothing to share
    ],
)
def test_how_products_are_cut(rows: int, columns: int, tokens: int, expected: tuple[int, str]) -> None:
    """As it was fastest on an H200 for the shapes measured there, or within 3% of that."""
    tiling = cut(rows, columns, tokens, 128, 132, LIMIT)
    assert (tiling.tokens, tiling.form) == expected


@pytest.mark.skipif(not nvrtc.available(), reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")
@pytest.mark.parametrize("bfloat16", [0, 1])
@pytest.mark.parametrize("tokens", TILE_TOKENS)
@pytest.mark.parametrize("cluster", [0, 1])
def test_the_kernel_compiles_without_spills_and_waits(tokens: int, cluster: int, bfloat16: int) -> None:
    """The compiler says so when it has to wait for each matrix product, or to keep registers in memory."""
    flags = ["--gpu-architecture=sm_90a", "--std=c++17", "--ptxas-options=-v"]
    for group, scales in ((32, 1), (64, 0), (128, 1), (128, 0)):
        defines = {
            "BF16": bfloat16,
            "SCALE_BF16": scales,
            "GROUP": group,
            "TOKENS": tokens,
            "CLUSTER": cluster,
        }
        defines["STAGES"] = fitting(tokens, "whole", group, LIMIT).stages
        options = [*flags, *(f"-D{key}={value}" for key, value in defines.items())]
        _, log = nvrtc.compile_with_log(read_source("marlin_many.cu"), options, "marlin_many.cu")
        assert "Potential Performance Loss" not in log
        assert "0 bytes spill stores" in log


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TILE_TOKENS)
@pytest.mark.parametrize("form", ["whole", "shared", "cluster"])
@pytest.mark.parametrize(
    ("n", "k", "m", "group", "dtype"),
    [
        (4096, 4096, 512, 128, torch.float16),
        (200, 1160, 70, 32, torch.bfloat16),
        (130, 4096, 300, 128, torch.bfloat16),
        (14336, 1024, 512, 128, torch.float16),
        (1001, 1000, 2300, 64, torch.float16),
    ],
)
def test_products(n: int, k: int, m: int, group: int, form: str, tokens: int, dtype: torch.dtype) -> None:
    """Against float64, with a bias and scales that differ much or are zero; the same bits every time."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    tiling = fitting(tokens, form, group, LIMIT)
    if form == "cluster" and tiling.tiles(-(-n // 64), m) > 200:
        pytest.skip("clusters are for few tiles")
    of = problem(n, k, m, group, dtype, device="cuda")
    found = multiply(of.x, of.packed, of.bias, n, group, False, tiling)
    of.near(found)
    for _ in range(3):
        assert torch.equal(multiply(of.x, of.packed, of.bias, n, group, False, tiling), found)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k", "m"), [(18944, 1024, 20), (18944, 600, 50), (17100, 264, 128)])
def test_a_last_round_of_tiles_is_shared(n: int, k: int, m: int) -> None:
    """Where :func:`takes` says so, for fewer tokens than it is made for otherwise."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    of = problem(n, k, m, 128, torch.float16, device="cuda")
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    assert takes(-(-n // 64), -(-k // 128), m, processors)
    of.near(multiply(of.x, of.packed, of.bias, n, 128, False))


@pytest.mark.parametrize(("rows", "columns"), [(5, 3), (64, 32), (224, 32), (296, 28)])
def test_a_launch_serves_all_numbers_of_tokens_that_it_is_kept_for(rows: int, columns: int) -> None:
    for tokens in range(1, 1100):
        most = _launch_tokens(tokens)
        tiling = cut(rows, columns, most, 128, 132, LIMIT)
        assert tiling.tiles(rows, most) == tiling.tiles(rows, tokens)


@pytest.mark.parametrize(
    ("rows", "tokens", "taken"),
    [
        (64, 128, False),
        (64, 129, True),
        (224, 128, False),
        (296, 128, True),  # 148 tiles
        (296, 20, True),
        (448, 128, False),  # 224 tiles of a weight that the cache does not hold
        (2112, 64, False),  # 1056 tiles: eight rounds
    ],
)
def test_where_it_is_the_kernel_to_take(rows: int, tokens: int, taken: bool) -> None:
    """Up to 128 tokens where most of 132 processors would wait for the last tiles."""
    assert takes(rows, 32, tokens, 132) == taken
