"""Two Gloo processes: the same bits as one, a dead one ends the job, and the journal survives it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from awqc.checkpoints import open_checkpoint
from awqc.ranks import Ranks, current
from awqc.report import Report
from tests import rank_worker

ROOT = Path(__file__).parents[1]
PROCESSES = 2


def run(task: str, folder: Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.run(
        [*launcher, "-m", "tests.rank_worker", task, str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    result = run("work", folder)
    assert result.returncode == 0, result.stderr
    return folder


def collectives(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"collectives-{rank}.pt") for rank in range(PROCESSES)]


def test_work_is_done_once_and_known_to_all(worked: Path) -> None:
    first, second = collectives(worked)
    for item, made in enumerate(first["map"]):
        assert made["by"] == item % PROCESSES
        assert torch.equal(made["of"][0], torch.full((item, 2), item, dtype=torch.uint8))
        assert torch.equal(made["of"][1][0], torch.ones(1) * item)
    for a, b in zip(tree_leaves(first["map"]), tree_leaves(second["map"]), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_tensors_of_all_processes(worked: Path) -> None:
    for rank, found in enumerate(collectives(worked)):
        assert [tuple(each.shape) for each in found["gather"]] == [(0, 2), (1, 2)]
        assert torch.equal(found["gather"][1], torch.full((1, 2), 2.0))
        assert torch.equal(found["add"], torch.full((3,), 3.0))
        assert found["agree"] == [0, 1]
        assert found["mine"] == list(range(5))[rank::2]
        assert "the 2 processes of this job differ in their numbers" in found["differ"]


@pytest.mark.parametrize("name", rank_worker.MODELS)
def test_two_processes_give_the_bits_of_one(name: str, worked: Path, tmp_path: Path) -> None:
    alone = rank_worker.compiled(name, tmp_path / "alone")
    one, two = open_checkpoint(alone.path), open_checkpoint(worked / name)
    assert list(one.tensors) == list(two.tensors)
    for tensor in one.tensors:
        assert torch.equal(one.tensors.get(tensor), two.tensors.get(tensor)), tensor


@pytest.mark.parametrize("name", rank_worker.MODELS)
def test_all_processes_report_the_same(name: str, worked: Path, tmp_path: Path) -> None:
    alone = rank_worker.compiled(name, tmp_path / "alone").report
    first, second = (Report.from_json((worked / f"{name}-{i}.json").read_text()) for i in range(PROCESSES))
    assert first.linears == second.linears == alone.linears
    assert first.groups == second.groups == alone.groups
    assert len(first.processes) == PROCESSES
    assert all(spent > 0 for spent in first.processes)
    assert alone.processes == []
    saved = json.loads((worked / name / "awqc_report.json").read_text())
    assert saved["processes"] == first.processes


def test_more_processes_than_samples_are_refused(worked: Path) -> None:
    for rank in range(PROCESSES):
        assert "2 processes and 1 calibration samples" in (worked / f"few-{rank}").read_text()


def test_a_dead_process_ends_the_job_and_leaves_the_journal(tmp_path: Path) -> None:
    result = run("die", tmp_path)
    assert result.returncode != 0
    said = (tmp_path / "lost-0").read_text()
    assert said.startswith("RankError: process 0 has lost another process of the job")
    assert "the same command goes on from there" in said
    assert list((tmp_path / "out.journal").glob("stage-*.json"))
    assert not (tmp_path / "out").exists()
    # One process goes on with what two have begun.
    again = rank_worker.compiled("dense", tmp_path / "out", rank_worker.dying(tmp_path))
    assert any("continued after" in what for _, what in again.report.notes)
    alone = rank_worker.compiled("dense", tmp_path / "alone", rank_worker.dying(tmp_path))
    one, two = open_checkpoint(alone.path), open_checkpoint(again.path)
    assert all(torch.equal(one.tensors.get(name), two.tensors.get(name)) for name in one.tensors)


def test_one_process_needs_no_group() -> None:
    ranks = current()
    assert ranks == Ranks(0, 1)
    assert ranks.first
    assert ranks.map(lambda item: item + 1, [1, 2], torch.device("cpu")) == [2, 3]
    assert ranks.agree("anything", 5) == [5]


@pytest.mark.parametrize(
    ("size", "count", "step"), [(100, 4, 64), (7, 3, 1), (128, 2, 64), (3, 4, 1), (1, 1, 64)]
)
def test_ranges_cover_everything_once(size: int, count: int, step: int) -> None:
    found = Ranks(0, count).ranges(size, step)
    assert [i for part in found for i in part] == list(range(size))
    assert len(found) <= count
    assert all(len(part) % step == 0 for part in found[:-1])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < PROCESSES, reason="needs two CUDA devices")
def test_two_gpus_give_the_bits_of_one(tmp_path: Path) -> None:
    result = run("gpus", tmp_path)
    assert result.returncode == 0, result.stderr
    for name in rank_worker.MODELS:
        alone = rank_worker.compiled(name, tmp_path / f"{name}-alone", device=torch.device("cuda"))
        one, two = open_checkpoint(alone.path), open_checkpoint(tmp_path / name)
        assert all(torch.equal(one.tensors.get(t), two.tensors.get(t)) for t in one.tensors)
