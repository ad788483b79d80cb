"""From a pass of one's own to its effect: the graph's difference, the error of every linear, and a page.

python examples/see_your_pass.py          # writes see_your_pass.html
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import awqc
from awqc.comparison import Compiled, compare
from awqc.demo import CALIBRATION_TEXT, MODEL_PATH
from awqc.observers.statistics import Statistics
from awqc.page import render
from awqc.page.graphs import layer_graphs
from awqc.page.layers import Layers
from awqc.quantization.schemes import Schemes
from awqc.text import diff_text


@dataclass(frozen=True)
class FinerGroups(awqc.Pass):
    """Groups of ``group_size`` for linears of whose inputs one channel is ``peak`` times the average."""

    name: ClassVar[str] = "finer-groups"
    scope: ClassVar = "stage"
    requires: ClassVar[tuple[type, ...]] = (Statistics, Schemes)

    peak: float = 8.0
    group_size: int = 32

    def run(self, graph: awqc.Graph, context: awqc.Context) -> None:
        assert context.stage is not None
        for observer in context.stage.observers:
            energy = graph.facts[Statistics][observer.node].gram.diagonal()
            if energy.max() > self.peak * energy.mean():
                for linear in observer.linears:
                    scheme = graph.facts[Schemes][linear.parameter]
                    graph.facts[Schemes][linear.parameter] = replace(scheme, group_size=self.group_size)


def main(page: Path = Path("see_your_pass.html"), samples: int = 4) -> None:
    """Compile the model that ships with awqc without the pass and with it; show what became different."""
    usual = awqc.Pipeline.default()
    pipelines = (usual, usual.insert_before("clip-weights", FinerGroups()))
    text = {"calib": CALIBRATION_TEXT, "max_calib_samples": samples}
    models = [awqc.compile(MODEL_PATH, pipeline=pipeline, **text) for pipeline in pipelines]
    print(diff_text(*(model.graph.text() for model in models)))

    a, b = (Compiled(page, model.report, None) for model in models)
    for one in compare(a, b).linears:
        print(f"{one.name:45} {one.a.error:.2e} -> {one.b.error:.2e}  {one.a.bytes} -> {one.b.bytes} bytes")

    layers = Layers(row.name for row in b.report.linears.values())
    graphs = layer_graphs(layers, *(model.graph.graph for model in models))
    page.write_text(render(b.report, "With finer groups", graphs=graphs))


if __name__ == "__main__":
    main()
