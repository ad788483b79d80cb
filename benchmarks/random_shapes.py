"""Random legal shapes through a kernel, against float64 arithmetic, each twice for the same bits.

    python benchmarks/random_shapes.py marlin --count 2000 --seconds 60 --seed 1
    python benchmarks/random_shapes.py triton --count 300 --seconds 140 --each 6

Every problem that a kernel's own ``legal()`` accepts counts: rows, channels, group size, zero points or
not, bits, dtypes of activations and scales, bias, tokens, and for experts how the router shares them out. A
failure is printed with the numbers that repeat it. The last line is the summary; the exit status tells
failures.

Triton compiles for a second or two for every new combination of dtypes, groups, tiles and raggedness. With
``--each N`` a shape is followed by up to N - 1 others that run the same machine code.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from awqc.kernels.hardware import Hardware, hardware
from awqc.kernels.launch import Code, launches
from awqc.kernels.qexperts import qexperts
from awqc.kernels.qlinear import dequantize
from awqc.kernels.registry import kernels

#: Class names of kernels by the name on the command line, and the op whose result they compute.
KERNELS = {
    "marlin": ("qlinear", "Marlin"),
    "exllama": ("qlinear", "ExLlama"),
    "triton": ("qlinear", "TritonGemm"),
    "experts": ("qexperts", "TritonExperts"),
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SCALES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
#: Shapes that are drawn at most to find the others of ``--each``.
DRAWS = 2000


@dataclass(frozen=True)
class Case:
    """What decides a problem."""

    n: int
    k: int
    tokens: int
    bits: int
    group_size: int
    zero_point: bool
    bias: bool
    dtype: str
    scales: str
    experts: int
    seed: int

    @property
    def lead(self) -> tuple[int, ...]:
        """Dimensions before those of a matrix."""
        return (self.experts,) if self.experts else ()

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return 1 if self.group_size == -1 else -(-self.k // self.group_size)


def draw(random_: random.Random, seed: int, experts: bool) -> Case:
    """A problem: small and ragged, or of the size of a layer."""
    few = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 100, 128]
    return Case(
        n=random_.choice([random_.randint(1, 300), random_.randint(1, 3000), 64 * random_.randint(1, 96)]),
        k=random_.choice(
            [random_.randint(1, 600), 8 * random_.randint(1, 300), 128 * random_.randint(1, 40)]
        ),
        tokens=random_.choice([*few, *few, 130, 300, 513, 1100, 2100]),
        bits=random_.choice([2, 3, 4, 4, 4]),
        group_size=random_.choice([-1, 32, 64, 96, 128, 128, 256]),
        zero_point=random_.random() < 0.6,
        bias=not experts and random_.random() < 0.4,
        dtype=random_.choice(list(DTYPES)),
        scales=random_.choice(["fp16", "fp16", "bf16", "fp32"]),
        experts=random_.choice([1, 2, 7, 8, 32]) if experts else 0,
        seed=seed,
    )


def problem(
    case: Case, device: torch.device
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...], Tensor | None]:
    """Input, ends of experts' rows, codes with scales and zeros, bias."""
    generator = torch.Generator(device).manual_seed(case.seed)
    shape = (*case.lead, case.n, case.groups)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=device)

    codes = (uniform(*case.lead, case.n, case.k) * 2**case.bits).to(torch.uint8)
    scales = (uniform(*shape) * 0.02 + 0.01).to(SCALES[case.scales])
    zeros = torch.full(shape, 2 ** (case.bits - 1), dtype=torch.uint8, device=device)
    if case.zero_point:
        zeros = (uniform(*shape) * 2**case.bits).to(torch.uint8)
    x = torch.randn(case.tokens, case.k, generator=generator, device=device).to(DTYPES[case.dtype])
    bias = uniform(case.n).to(x.dtype) if case.bias else None
    ends = None
    if case.experts:
        # Some have no rows, and some rows belong to nobody.
        cuts = (uniform(case.experts) * (case.tokens + 1)).to(torch.int32).sort().values
        ends = cuts.clamp_(max=case.tokens)
    return x, ends, (codes, scales, zeros), bias


def codes_of(kernel: Any, case: Case, at: Hardware) -> list[Code | None]:
    """The machine code that a problem runs on ``at``, by everything that decides it."""

    def empty(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    x = empty(case.tokens, case.k, dtype=DTYPES[case.dtype])
    scales = empty(*case.lead, case.n, case.groups, dtype=SCALES[case.scales])
    codes = empty(*case.lead, case.n, case.k, dtype=torch.uint8)
    bias = empty(case.n, dtype=x.dtype) if case.bias else None
    tensors, constants = kernel.pack(codes, scales, scales.byte(), bias, case.bits, case.group_size)
    ends = [empty(case.experts, dtype=torch.int32)] if case.experts else []
    found = launches(kernel.op, at, (x, *ends, *tensors.values(), *constants), x)
    return [launch.code for launch in found]


def raggedness(case: Case) -> tuple[int, int]:
    """Powers of two that divide rows and channels, as far as a kernel may care: 16 to 128 and 16 to 256."""
    return max(8, math.gcd(case.n, 128)), max(8, math.gcd(case.k, 256))


@dataclass
class Problems:
    """Random problems that a kernel takes.

    Args:
        kernel: a class of the registry.
        experts: whether its weights are those of experts.
        device: where it runs.
        source: of random numbers.
        most_work: products of a problem, at most.
        skipped: problems that were drawn and not taken.
    """

    kernel: Any
    experts: bool
    device: torch.device
    source: random.Random
    most_work: float = math.inf
    skipped: int = 0

    def takes(self, case: Case) -> bool:
        """Whether it is legal, and small enough."""
        dtype, work = DTYPES[case.dtype], case.n * case.k * max(case.tokens, 4 * case.experts)
        reason = self.kernel.legal(case.n, case.k, case.bits, case.group_size, dtype, self.device)
        return reason is None and work <= self.most_work

    def draw(self) -> Case:
        """Any problem."""
        while not self.takes(case := draw(self.source, self.source.randrange(2**31), self.experts)):
            self.skipped += 1
        return case

    def alike(self, case: Case) -> Iterator[Case]:
        """Others that run the same machine code as ``case``: with other rows, channels, tokens, bits, zero
        points and shares of experts. A single group is compiled for the channels that it has."""
        kept = {name: getattr(case, name) for name in ("group_size", "bias", "dtype", "scales", "experts")}
        if case.groups == 1:
            kept["k"] = case.k
        at = hardware(self.device)
        codes = codes_of(self.kernel, case, at)
        for _ in range(DRAWS):
            other = replace(draw(self.source, self.source.randrange(2**31), self.experts), **kept)
            same = raggedness(other) == raggedness(case) and self.takes(other)
            if same and codes_of(self.kernel, other, at) == codes:
                yield other

    def all(self, each: int) -> Iterator[Case]:
        """Problems without end, ``each`` that run the same machine code after each other where there are."""
        while True:
            case = self.draw()
            yield case
            if each > 1:
                yield from itertools.islice(self.alike(case), each - 1)


def excess(
    found: Tensor, case: Case, x: Tensor, ends: Tensor | None, parts: tuple[Tensor, ...], bias: Tensor | None
) -> float:
    """How far the worst element is over what independent roundings allow: see the conformance tests.

    Activations, scales, zero terms and weights are rounded to the dtype once each at most, sums are float32,
    the result is rounded before the bias and after it.
    """
    codes, scales, zeros = parts
    if ends is None:
        weight = dequantize(codes, scales, zeros, case.group_size, torch.float64)
        want = x.double() @ weight.t()
        energy = (x.double().square() @ weight.square().t()).sqrt()
    else:
        want = qexperts(x.double(), ends, codes, scales.double(), zeros, case.group_size)
        most = (scales.double().amax() * 2**case.bits) ** 2
        energy = (x.double().square().sum(1, keepdim=True) * most).sqrt().expand_as(want)
    own, sums = torch.finfo(x.dtype).eps / 2, case.k**0.5 * torch.finfo(torch.float32).eps / 2
    offset = torch.zeros((), dtype=torch.float64, device=x.device) if bias is None else bias.double()
    bound = (8 * own + 80 * sums) * energy + 2 * own * (want.abs() + offset.abs())
    return float(((found.double() - want - offset).abs() - bound).max()) if found.numel() else 0.0


def check(kernel: Any, case: Case, device: torch.device) -> str | None:
    """What is wrong, in one line; None if nothing is."""
    x, ends, parts, bias = problem(case, device)
    tensors, constants = kernel.pack(*parts, bias, case.bits, case.group_size)
    operands = (x, *([ends] if case.experts else []), *tensors.values(), *constants)
    found = kernel.op(*operands)
    if kernel.__name__ == "Marlin" and parts[1].dtype == torch.float32:  # it says so: they are rounded
        parts = (parts[0], parts[1].half(), parts[2])
    over = excess(found, case, x, ends, parts, bias)
    if not over <= 0:  # not a number counts too
        return f"an element is {over:.3g} over its bound"
    if not torch.equal(found, kernel.op(*operands)):
        return "not the same bits twice"
    return None


def failures() -> tuple[type[Exception], ...]:
    """What a kernel that does not run raises; Triton has errors of its own."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    from triton.errors import TritonError

    return (RuntimeError, TritonError)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kernel", choices=list(KERNELS))
    parser.add_argument("--count", type=int, default=500, help="legal shapes to try")
    parser.add_argument("--seconds", type=float, default=60.0, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=1, help="shapes, at most, that run the same machine code")
    parser.add_argument("--most-work", type=float, default=4e10, help="products of a problem, at most")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    op, name = KERNELS[options.kernel]
    kernel, device = kernels(op)[name], torch.device(options.device)
    source, began = random.Random(options.seed), time.monotonic()
    problems = Problems(kernel, op == "qexperts", device, source, options.most_work)
    tried, failed = 0, 0
    for case in itertools.islice(problems.all(options.each), options.count):
        if time.monotonic() - began > options.seconds:
            break
        tried += 1
        try:
            wrong = check(kernel, case, device)
        except failures() as error:
            wrong = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if wrong:
            failed += 1
            named = ", ".join(f"{f.name}={v!r}" for f, v in zip(fields(case), astuple(case), strict=True))
            print(f"FAILED {options.kernel}: {wrong}: Case({named})", flush=True)
            if "CUDA error" in wrong or "LaunchError" in wrong:
                break  # the device does not answer after such an error
    seconds = time.monotonic() - began
    print(f"{options.kernel}: {tried} shapes, {failed} failed, {problems.skipped} skipped, {seconds:.0f} s")
    return 1 if failed or not tried else 0


if __name__ == "__main__":
    sys.exit(main())
