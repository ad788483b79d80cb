"""What awqc makes of every model of the zoo, one line each.

    python -m tests.zoo.survey                      # all of them
    python -m tests.zoo.survey llama 'qwen*' -v     # some; -v spells out every refused linear

A line: fold error in float64 of the graph and of the model run eagerly, seconds; then name, rung of the
capture, linears that have a group and linears, share of the parameters of all matrix products that have one;
then how often which op refused, and products with a parameter that are seen as no linear. A model that fails
says at what.
"""

from __future__ import annotations

import copy
import fnmatch
import inspect
import math
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import awqc
from awqc.analysis import Analysis
from awqc.capture import relative_error
from awqc.capture.tracing import same_random
from awqc.errors import AwqcError
from awqc.scaleflow.coverage import factors
from awqc.scaleflow.groups import ScaleGroup
from awqc.views import shape
from tests.zoo.catalog import CATALOG

#: Reasons that name no op: the linear's weight must stay as it is.
TIED = "its weight is also read by"


@dataclass
class Row:
    """What was found in one model.

    Args:
        name: in the catalog.
        rung: of the capture.
        refusals: parameter name of every linear without a group -> reason.
        sizes: parameters of everything that a matrix product reads, by name.
        grouped: names of those that have a group.
        unseen: names of those that are no linear to awqc -> the op that reads them.
        nodes: of the graph.
        fold: relative error of the graph in float64 after a fold of random scales into all groups.
        eager: the same of the model itself; NaN where it does not run in float64.
        failure: the step that failed, and how; empty if none did.
    """

    name: str
    rung: str = "-"
    refusals: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    grouped: set[str] = field(default_factory=set)
    linears: int = 0
    unseen: dict[str, str] = field(default_factory=dict)
    nodes: int = 0
    fold: float = float("nan")
    eager: float = float("nan")
    seconds: float = 0.0
    failure: str = ""

    @property
    def share(self) -> float:
        """Share of the parameters of untied products that have a group."""
        free = {n: s for n, s in self.sizes.items() if not self.refusals.get(n, "").startswith(TIED)}
        return sum(free[n] for n in self.grouped & free.keys()) / max(sum(free.values()), 1)

    def summary(self) -> str:
        """What the golden file holds: nothing that differs from one machine to the next."""
        if self.failure:
            return f"{self.name:24} {self.failure[:160]}"
        ops = [f"{n}x {why}" for why, n in Counter(map(brief, self.refusals.values())).most_common()]
        ops += [f"{n}x UNSEEN {op}" for op, n in Counter(self.unseen.values()).most_common()]
        start = f"{self.name:24} {self.rung:13} {len(self.grouped):3} of {self.linears:3} {self.share:7.1%}"
        return f"{start}  {'; '.join(ops)}".rstrip()

    def __str__(self) -> str:
        if self.failure:
            return self.summary()
        return f"{self.fold:8.1e} {self.eager:8.1e} {self.seconds:5.1f}s  {self.summary()}"


def brief(reason: str) -> str:
    """The op that refuses, without the names of nodes."""
    if reason.startswith(TIED):
        return "tied"
    return re.sub(r" \([a-z_]+\d*(_\d+)*\)|(?<=[a-z])_\d+\b|'[^']*'", "", reason)[:80]


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """All tensors that the model returns."""
    settings = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    # Some forwards draw random numbers: they must be the same before and after a fold.
    with torch.no_grad(), same_random():
        return [t for t in tree_flatten(model(**batch, **settings))[0] if isinstance(t, Tensor)]


def eager_error(model: nn.Module, analysis: Analysis, batch: dict[str, Tensor]) -> float:
    """Relative change of what the model computes in float64 when all groups are folded."""
    model = copy.deepcopy(model).double()
    if hasattr(model, "set_experts_implementation"):  # the others know no float64
        model.set_experts_implementation("eager")
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    expected = outputs(model, batch)
    analysis.fold(model)
    return max(relative_error(a, b) for a, b in zip(outputs(model, batch), expected, strict=True))


def survey(name: str) -> Row:
    """Build, analyze, prove and fold the model ``name``; whatever fails is in the row."""
    row, started = Row(name), time.perf_counter()
    step = "build"
    try:
        model = CATALOG[name].build()
        step = "inputs"
        batch = CATALOG[name].batch(model)
        step = "eager"
        outputs(model, batch)
        step = "capture"
        analysis = awqc.analyze(model, batch)
        row.rung, row.linears = analysis.capture.rung, len(analysis.linears)
        row.refusals = {n: r for n, r in analysis.linears.items() if isinstance(r, str)}
        row.grouped = {n for n, r in analysis.linears.items() if isinstance(r, ScaleGroup)}
        row.nodes, read = len(analysis.graph.nodes), factors(analysis.graph)
        row.sizes = {
            n: math.prod(shape(node)) for n, node in analysis.graph.parameters().items() if n in read
        }
        row.unseen = {n: op for n, op in read.items() if n not in analysis.linears}
        step = "prove"
        row.fold = analysis.prove(batch)
        step = "fold"
        row.eager = _or_nan(lambda: eager_error(model, analysis, batch))
    except Exception as error:  # noqa: BLE001  # a survey reports what fails and goes on
        kind = "" if isinstance(error, AwqcError) else "CRASH "
        lines = str(error).strip().splitlines() or [""]
        row.failure = f"{kind}{step}: {type(error).__name__}: {lines[0][:300]}"
    row.seconds = time.perf_counter() - started
    return row


def _or_nan(measure: object) -> float:
    assert callable(measure)
    try:
        return float(measure())
    except (
        RuntimeError,
        ValueError,
    ):  # a forward that makes float32 tensors of its own does not run in float64
        return float("nan")


def chosen(patterns: Iterable[str]) -> list[str]:
    """Names of the catalog that match one of the shell-style patterns; all without any."""
    patterns = list(patterns)
    return [n for n in CATALOG if not patterns or any(fnmatch.fnmatchcase(n, p) for p in patterns)]


def main(arguments: list[str]) -> None:
    """The command line."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    verbose = "-v" in arguments
    rows = []
    for name in chosen(a for a in arguments if a != "-v"):
        rows.append(survey(name))
        print(rows[-1], flush=True)
        if verbose:
            for parameter, why in [*rows[-1].refusals.items(), *rows[-1].unseen.items()]:
                print(f"    {parameter}: {why}")
    whole = [r for r in rows if not r.failure]
    print(
        f"\n{len(rows)} models, {len(whole)} captured, equal to eager and folded; "
        f"{sum(r.share >= 0.9 for r in whole)} with 90% of their parameters grouped, "
        f"{sum(not r.fold < 1e-9 for r in whole)} with an unsound fold; {sum(r.seconds for r in rows):.0f} s"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
