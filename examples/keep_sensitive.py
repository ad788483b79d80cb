"""A pass of one's own: linears that the common scheme would hurt most get 8 bits.

From the command line:

    awqc compile MODEL --calib TEXT.txt --format compressed-tensors -o OUT \\
        --before 'clip-weights=examples/keep_sensitive.py:KeepSensitive(threshold=0.008)'
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import awqc
from awqc.observers.statistics import Statistics
from awqc.quantization.loss import output_loss
from awqc.quantization.schemes import Schemes
from awqc.quantized import minmax_grid


@dataclass(frozen=True)
class KeepSensitive(awqc.Pass):
    """More bits for a linear whose output error ``tr(E H E^T) / tr(W H W^T)`` exceeds ``threshold``.

    ``E`` is the error of rounding its weight ``W`` to nearest, ``H`` the Gram matrix of its inputs: the
    error is exact over all calibration tokens, and nothing has to be run to know it.
    """

    name: ClassVar[str] = "keep-sensitive"
    scope: ClassVar = "stage"
    requires: ClassVar[tuple[type, ...]] = (Statistics, Schemes)

    threshold: float = 0.01
    bits: int = 8

    def run(self, graph: awqc.Graph, context: awqc.Context) -> None:
        assert context.stage is not None
        schemes = graph.facts[Schemes]
        for observer in context.stage.observers:
            gram = graph.facts[Statistics][observer.node].gram
            for linear in observer.linears:
                scheme, weight = schemes[linear.parameter], linear.weight(graph.weights[linear.parameter])
                error = minmax_grid(weight, scheme).nearest(weight) - weight
                if output_loss(error, gram) > self.threshold * output_loss(weight, gram):
                    schemes[linear.parameter] = replace(scheme, bits=self.bits)
                    context.report.linears[linear.parameter].notes.append(f"sensitive: {self.bits} bits")


def main(threshold: float = 0.008) -> None:
    """Compile the model that ships with awqc, most linears to 4 bits and the sensitive ones to 8."""
    from rich import print

    from awqc.demo import CALIBRATION_TEXT, MODEL_PATH
    from awqc.tables import linears

    pipeline = awqc.Pipeline.default().insert_before("clip-weights", KeepSensitive(threshold))
    model = awqc.compile(MODEL_PATH, CALIBRATION_TEXT, pipeline=pipeline)
    print(linears(model.report))


if __name__ == "__main__":
    main()
