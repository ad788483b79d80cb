"""Products of many tokens in Gluon: what is compiled for Hopper, and what comes out there."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from awqc.kernels import qlinear_triton
from awqc.kernels.machine_code import sass
from awqc.kernels.triton_many import TILES, Cut, cuts, missing
from tests.kernels import uninterpreted
from tests.kernels.test_triton_many import BRAIN, H200, HALF, calls
from tests.kernels.triton_weights import weight_of

SHAPES = [
    (200, 1024, 128, 300, 4),
    (1000, 2048, 64, 77, 3),
    (129, 512, 32, 513, 2),
    (4096, 1000, -1, 64, 1),
    (384, 504, -1, 1, 2),
    (17000, 1021, -1, 600, 3),
]
TYPES = [(HALF, HALF), (HALF, BRAIN), (HALF, torch.float32), (BRAIN, HALF), (BRAIN, BRAIN)]


def compiled_for_hopper() -> None:
    """Prints by tile and types the products that the machine code begins, its waits for them, and memory."""
    found = {}
    cases = [(tile, 128, HALF, HALF) for tile in TILES]
    cases += [(TILES[0], 32, HALF, HALF), (TILES[0], 64, BRAIN, BRAIN)]
    cases += [(TILES[1], -1, BRAIN, HALF), (TILES[2], 64, BRAIN, HALF)]
    for tile, group_size, dtype, of_scales in cases:
        weight = weight_of(512, 512, group_size, of_scales)
        shared, _ = calls(Cut(tile, 4, 0, 2), weight, tile.block_m, dtype, bias=True)
        code, name = shared.code(), f"{tile.block_m} {group_size} {dtype} {of_scales}"
        text = sass(code, (9, 0))
        waits = Counter(re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d+)", text))
        allotted = code.shared_bytes((9, 0))
        said = tile.shared_bytes(weight.packed.shape[-1])
        found[name] = (
            len(re.findall(r"\bHGMMA", text)),
            waits,
            len(re.findall(r"\bSTL", text)),
            allotted,
            said,
        )
    print(json.dumps(found))


def test_products_run_while_the_next_weights_are_made(tmp_path: Path) -> None:
    command = "from tests.kernels.test_many_gluon import compiled_for_hopper as run; run()"
    found = json.loads(uninterpreted.run("-c", command, cache=tmp_path).splitlines()[-1])
    assert len(found) == len(TILES) + 4
    for name, (products, waits, spills, allotted, said) in found.items():
        narrow = " 32 " in name
        assert products == (8 if narrow else 16), name
        # One wait for all, behind the loop: a compiler that serializes products would wait so for each.
        assert waits == {"0x1": 4 if narrow else 8, "0x0": 1}, name
        assert spills <= 4, name
        assert said <= allotted <= said + 256, name


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize(
    ("shape", "types"),
    [*((shape, TYPES[0]) for shape in SHAPES), *((SHAPES[1], types) for types in TYPES[1:])],
    ids=str,
)
def test_equals_the_reference(
    shape: tuple[int, int, int, int, int], types: tuple[torch.dtype, torch.dtype]
) -> None:
    (n, k, group_size, m, shares), (dtype, of_scales) = shape, types
    weight = weight_of(n, k, group_size, of_scales, "cuda")
    assert missing(weight, H200) is None
    x, bias = torch.randn(m, k, device="cuda", dtype=dtype), torch.randn(n, device="cuda", dtype=dtype)
    want = x.double() @ qlinear_triton.dense(weight, torch.float32).double().t() + bias.double()
    for tile in TILES:
        ways = [c for c in cuts(tile, m, n, weight.packed.shape[0], 132) if c.shares in (1, shares)]
        assert {cut.shares for cut in ways} == {1, shares}
        for cut in ways:
            y = qlinear_triton.multiply(x, weight, bias, cut)
            error = (y.double() - want).norm() / want.norm()
            assert error <= {HALF: 5e-4, BRAIN: 4e-3}[dtype], cut
            assert torch.equal(y, qlinear_triton.multiply(x, weight, bias, cut)), cut
