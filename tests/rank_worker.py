"""What the processes of ``test_ranks.py`` do, started by torchrun: ``tests.rank_worker TASK FOLDER``."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

import awqc
from awqc import Context, Pass, Pipeline, QuantConfig
from awqc.errors import AwqcError, ConfigError
from awqc.graph import Graph
from awqc.ranks import Ranks, current, job
from awqc.streaming import compile_to
from tests import mixtures, models

CONFIG = QuantConfig(group_size=32)
CPU = torch.device("cpu")
#: Models that are compiled by several processes.
MODELS = {"dense": models.llama, "experts": lambda: mixtures.build("mixtral")}
SAMPLES = 5


@dataclass(frozen=True)
class Dying(Pass):
    """Kills the second process in the fourth stage, once."""

    name: ClassVar[str] = "dying"
    scope: ClassVar = "stage"

    marker: str = ""

    def run(self, graph: Graph, context: Context) -> None:
        assert context.stage is not None
        if context.stage.index == 3 and context.ranks.rank == 1 and not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)


def compiled(name: str, out: Path, pipeline: Pipeline | None = None, device: torch.device = CPU) -> Any:
    """``MODELS[name]`` on an odd number of samples, written to ``out``."""
    ids = mixtures.token_ids(1, SAMPLES, 32)
    return compile_to(
        MODELS[name](),
        out,
        ids,
        format="awqc",
        backend="reference",
        config=CONFIG,
        pipeline=pipeline,
        device=device,
    )


def dying(folder: Path) -> Pipeline:
    return Pipeline.default().insert_before("clip-weights", Dying(str(folder / "died")))


def _collectives(ranks: Ranks) -> dict[str, Any]:
    def work(item: int) -> dict[str, Any]:
        return {
            "by": ranks.rank,
            "of": (torch.full((item, 2), item, dtype=torch.uint8), [torch.ones(1) * item]),
        }

    total = torch.ones(3) * (1 + ranks.rank)
    ranks.add(total)
    found: dict[str, Any] = {
        "map": ranks.map(work, [0, 1, 2, 3, 4], CPU),
        "gather": ranks.gather(torch.full((ranks.rank, 2), 1.0 + ranks.rank)),
        "add": total,
        "agree": ranks.agree("", ranks.rank),
        "mine": list(ranks.mine(range(5))),
    }
    try:
        ranks.agree("their numbers", ranks.rank)
    except ConfigError as error:
        found["differ"] = str(error)
    return found


def main(task: str, folder: Path) -> None:
    with job(torch.device("cuda") if task == "gpus" else CPU) as device:
        ranks = current()
        if task == "gpus":
            for name in MODELS:
                compiled(name, folder / name, device=device)
        elif task == "work":
            torch.save(_collectives(ranks), folder / f"collectives-{ranks.rank}.pt")
            for name in MODELS:
                report = compiled(name, folder / name).report
                (folder / f"{name}-{ranks.rank}.json").write_text(report.to_json())
            try:
                awqc.compile(models.llama(), mixtures.token_ids(1, 1, 32), config=CONFIG, device=device)
            except ConfigError as error:
                (folder / f"few-{ranks.rank}").write_text(str(error))
        else:
            # torchrun ends those that are left, on a busy machine before they have found out themselves.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            try:
                compiled("dense", folder / "out", dying(folder))
            except AwqcError as error:
                (folder / f"lost-{ranks.rank}").write_text(f"{type(error).__name__}: {error}")
                raise


if __name__ == "__main__":
    from tests import rank_worker  # the pass is then of this module, as for who continues its journal

    rank_worker.main(sys.argv[1], Path(sys.argv[2]))
