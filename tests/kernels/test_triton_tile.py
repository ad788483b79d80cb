"""Configurations of the Triton products have the shared memory that they take, on every GPU we know of."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product as combinations
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from awqc.kernels import configs, qexperts_triton, qlinear_triton
from awqc.kernels.hardware import Hardware, known
from awqc.kernels.launch import launches
from awqc.kernels.qexperts_triton import TritonExperts
from awqc.kernels.qlinear_triton import TritonGemm
from awqc.kernels.triton_call import Call, Target
from awqc.kernels.triton_tile import Tile
from awqc.kernels.triton_weight import Weight
from tests.kernels import triton_weights, uninterpreted

FILES = sorted(Path(configs.__file__).parent.glob("configs_*.json"))
WIDE = Tile(block_m=128, block_n=128, warps=8, stages=3, programs=1)
#: What AMD's have, whose capability is not counted as NVIDIA's.
LDS = Hardware("amd_instinct_mi300x", "cuda", 304, None, 64 << 10)


def weight_of(
    k: int, group_size: int, scales: torch.dtype = torch.float16, n: int = 512, experts: int | None = None
) -> Weight:
    """A packed weight without memory, of ``experts`` if there are any."""
    return triton_weights.weight_of(n, k, group_size, scales, experts=experts)


def weights() -> Iterator[Weight]:
    """Every width, run and size of scales, with whole and with ragged blocks of K."""
    groups = (-1, 16, 32, 48, 64, 96, 128, 256)
    for k, group, scales in combinations((4096, 4088, 4095, 300), groups, (torch.bfloat16, torch.float32)):
        yield weight_of(k, group, scales)


def tiles() -> Iterator[Tile]:
    """Those of all tables, and those that are tuned against each other."""
    for file in FILES:
        for name, table in json.loads(file.read_text()).items():
            if name in (qlinear_triton.NAME, qexperts_triton.NAME):
                yield from (Tile(**entry) for entry in table.values())
    for tokens in qlinear_triton.TOKENS:
        yield from qlinear_triton.candidates(tokens)


def taken(tile: Tile, weight: Weight, at: Hardware) -> int:
    return tile.shared_bytes(weight.packed.shape[-1], weight.run, weight.scales.element_size(), at)


@pytest.mark.parametrize("at", [*known().values(), LDS], ids=lambda at: at.name)
def test_no_configuration_takes_more_than_the_device_has(at: Hardware) -> None:
    chosen = {(w.packed.shape[-1], w.run, w.scales.element_size()): w for w in weights()}
    assert {(64, 1, 4), (64, 2, 2), (64, 4, 2), (32, 1, 4), (16, 1, 4)} <= chosen.keys()
    for tile, weight in combinations(set(tiles()), chosen.values()):
        fitted = weight.fitting(tile, at)
        assert taken(fitted, weight, at) <= at.shared_bytes
        if taken(tile, weight, at) <= at.shared_bytes:
            assert fitted == tile
        else:
            assert (fitted.stages, fitted.block_m, fitted.block_n) < (tile.stages, tile.block_m, tile.block_n)
            assert fitted.stages >= 2, "memory is read ahead still"


def test_a_tile_that_ran_out_of_shared_memory_loses_a_stage() -> None:
    """Triton allots it 233472 bytes for groups of 64 channels with float32 scales; a block has 232448."""
    h200, weight = known()["h200"], weight_of(4096, 64, torch.float32)
    assert taken(WIDE, weight, h200) >= 233472 > h200.shared_bytes
    fitted = weight.fitting(WIDE, h200)
    assert fitted == Tile(128, 128, warps=8, stages=2, programs=1)
    assert qexperts_triton.choose(10**6, weight_of(4096, 64, torch.float32, experts=8), h200) == fitted


@pytest.mark.parametrize("group_size", [-1, 64, 128])
def test_what_was_measured_is_launched_as_it_was(group_size: int) -> None:
    h200, weight = known()["h200"], weight_of(4096, group_size)
    for entry in configs.measured(qlinear_triton.NAME, h200.name).values():
        assert weight.fitting(Tile(**entry), h200) == Tile(**entry)


def test_less_shared_memory_takes_stages_then_tokens_then_rows() -> None:
    weight, found = weight_of(4096, 128), []
    for kib in (227, 163, 99, 64, 48, 24, 1):
        at = Hardware("some", "cuda", 100, (8, 0), kib << 10)
        tile = weight.fitting(Tile(128, 128, 8, 4, 1), at)
        found.append((tile.stages, tile.block_m, tile.block_n, tile.warps))
    assert found == [
        (3, 128, 128, 8),
        (3, 128, 128, 8),
        (2, 128, 128, 8),
        (2, 64, 128, 8),
        (2, 32, 128, 8),
        (2, 16, 64, 4),
        (2, 16, 32, 2),
    ]


def test_a_device_of_which_nothing_is_known_takes_what_the_table_says() -> None:
    weight, cpu = weight_of(4096, 64, torch.float32), Hardware("cpu", "cpu", 4)
    assert weight.fitting(WIDE, cpu) == WIDE


def test_a_description_states_what_is_launched() -> None:
    at, x = known()["l4"], torch.empty(100, 4096, dtype=torch.float16, device="meta")
    weight = weight_of(4096, 128)
    operands = (weight.packed, weight.scales, weight.zeros)
    first, *_ = launches(TritonGemm.op, at, (x, *operands, None, 512, 128), x)
    assert (first.config["block_m"], first.config["stages"]) == (128, 2)
    experts = weight_of(4096, 128, experts=2)
    x = torch.empty(2, 300, 4096, dtype=torch.float16, device="meta")
    operands = (experts.packed, experts.scales, experts.zeros)
    first, *_ = launches(TritonExperts.op, at, (x, None, *operands, 512, 128), x)
    assert (first.config["block_m"], first.config["stages"]) == (128, 2)


def test_only_what_fits_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    at, tried = known()["rtx_3090"], []

    def first(runs: Mapping[Tile | None, Callable[[int], object]], copies: int) -> Tile | None:
        tried.extend(tile for tile in runs if tile is not None)
        return tried[-1]

    monkeypatch.setattr(qlinear_triton, "fastest", first)
    monkeypatch.setattr(qlinear_triton, "hardware", lambda device: at)
    tensors, _ = TritonGemm.pack(
        torch.zeros(64, 256, dtype=torch.uint8), torch.ones(64, 4), torch.ones(64, 4), None, 4, 64
    )
    held = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    weight = Weight(**held, n=64, k=256, group_size=64)
    table = qlinear_triton.tune(weight, torch.float16)
    assert list(table) == list(qlinear_triton.TOKENS)
    assert all(taken(tile, weight, at) <= at.shared_bytes for tile in tried)
    every = [tile for tokens in qlinear_triton.TOKENS for tile in qlinear_triton.candidates(tokens)]
    assert set(every) - set(tried) == {t for t in every if taken(t, weight, at) > at.shared_bytes} != set()


def call_of(tile: Tile, weight: Weight, dtype: torch.dtype, at: Hardware) -> Call:
    """The product of 200 tokens."""
    x = torch.empty(200, weight.k, dtype=dtype, device="meta")
    y, target = x.new_empty(200, weight.n), Target.of(at)
    if weight.packed.dim() == 3:
        return qlinear_triton.product(x, weight, None, y, tile, target)[0]
    ends = torch.empty(weight.packed.shape[0], dtype=torch.int32, device="meta")
    return qexperts_triton.product(x, ends, weight, y, tile, target)[0]


def against_the_compiler() -> None:
    """Prints by name what a program takes at most, what Triton allots, and how many products of Hopper's
    matrix unit may still run after each wait for them. Run where nothing is interpreted: see below."""
    half, full, brain = torch.float16, torch.float32, torch.bfloat16
    devices = known()
    cases: dict[str, tuple[str, Tile, Weight, torch.dtype]] = {
        "ran out": ("h200", WIDE, weight_of(4096, 64, full), half),
        "ran out, of experts": ("h200", WIDE, weight_of(4096, 64, full, experts=4), brain),
        "fits closely": ("h200", WIDE, weight_of(4096, 128), half),
        "ampere": ("a100", WIDE, weight_of(4096, 64, full), brain),
        "ada": ("l4", replace(WIDE, stages=2), weight_of(4096, -1), half),
        "narrow planes": ("a100", Tile(64, 128, 4, 2, 1), weight_of(4096, 32, full, experts=4), half),
        "ragged": ("l4", Tile(64, 64, 4, 3, 3), weight_of(4095, 128), brain),
        "few tokens": ("h200", Tile(8, 32, 2, 3, 8), weight_of(4096, 128), half),
        "mostly result": ("l4", replace(WIDE, stages=1), weight_of(400, 16), half),
    }
    found = {}
    for name, (device, tile, weight, dtype) in cases.items():
        at = devices[device]
        assert at.capability is not None
        code = call_of(tile, weight, dtype, at).code()
        waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", code.ptx(at.capability))
        found[name] = (taken(tile, weight, at), code.shared_bytes(at.capability), sorted({*map(int, waits)}))
    print(json.dumps(found))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int, list[int]]]:
    command = "from tests.kernels.test_triton_tile import against_the_compiler as run; run()"
    printed = uninterpreted.run("-c", command, cache=tmp_path_factory.mktemp("triton"))
    return {name: tuple(found) for name, found in json.loads(printed.splitlines()[-1]).items()}


def test_no_program_takes_more_than_it_is_said_to(compiled: dict[str, tuple[int, int, list[int]]]) -> None:
    for name, (most, allotted, _) in compiled.items():
        assert 0 < allotted <= most, name
    for name in ("ran out", "ran out, of experts"):
        assert compiled[name][1] > known()["h200"].shared_bytes, "the case that the limit is for"
    for name in ("ran out", "fits closely", "ampere", "ada"):
        assert compiled[name][0] <= 1.02 * compiled[name][1], (
            f"{name}: loosely bounded, stages are lost for nothing"
        )


def test_no_operand_is_made_anew_under_a_product(compiled: dict[str, tuple[int, int, list[int]]]) -> None:
    """A product alone in its loop runs on while its left operand, in registers, is made anew: Triton 3.6 then
    gives wrong results in some tilings. Those of a loop with several are waited for at once."""
    for name, (_, _, running) in compiled.items():
        assert running in ([], [0]), name
    assert compiled["ran out"][2] == compiled["fits closely"][2] == [0], "products of Hopper's matrix unit"
