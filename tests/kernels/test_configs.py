"""Configurations as data: the tables that ship, the choice by tokens, the cache on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from awqc.kernels import configs
from awqc.kernels.triton_tile import Tile

CPU = torch.device("cpu")
FILES = sorted(Path(configs.__file__).parent.glob("configs_*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_tables_that_ship_hold_launchable_tiles(file: Path) -> None:
    table = json.loads(file.read_text())["qlinear_triton"]
    assert [int(most) for most in table] == sorted(int(most) for most in table)
    for most, entry in table.items():
        tile = Tile(**entry)
        assert all(value & (value - 1) == 0 for value in (tile.block_m, tile.block_n, tile.warps))
        # Less than the next narrower tile would hold, so no token is computed twice for nothing.
        assert tile.block_m <= max(int(most), 8)


def test_the_first_entry_that_serves_the_tokens() -> None:
    table = {8: {"a": 1}, 32: {"a": 2}}
    found = [configs.entry(table, tokens) for tokens in (1, 8, 9, 32, 33)]
    assert found == [{"a": 1}, {"a": 1}, {"a": 2}, {"a": 2}, None]


def test_devices_without_a_file_take_the_default() -> None:
    default = json.loads((Path(configs.__file__).parent / "configs_default.json").read_text())
    table = configs.measured("qlinear_triton", CPU)
    assert {str(most): dict(entry) for most, entry in table.items()} == default["qlinear_triton"]
    with pytest.raises(KeyError, match=r"configs_default\.json has no table for nothing"):
        configs.measured("nothing", CPU)


def test_what_is_kept_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWQC_KERNEL_CACHE", str(tmp_path / "cache"))
    assert configs.tuned("one", CPU) is None
    configs.keep("one", CPU, {16: {"a": 1}, 8: {"a": 2}})
    configs.keep("two", CPU, {8: {"a": 3}})
    assert configs.tuned("one", CPU) == {8: {"a": 2}, 16: {"a": 1}}
    configs._tuned.cache_clear()  # as in another process
    assert configs.tuned("two", CPU) == {8: {"a": 3}}
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["tuned_cpu.json"]
