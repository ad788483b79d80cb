"""Quantized weights with every code equally likely, for tests of how they are stored."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from awqc.quantized import QuantizedWeight, Scheme


def random_weight(n: int, k: int, scheme: Scheme, seed: int = 0) -> QuantizedWeight:
    """A weight ``(N, K)`` with random codes, positive scales and, if asymmetric, random zero points."""
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(k)
    codes = torch.randint(0, scheme.levels, (n, k), generator=generator).to(torch.uint8)
    scales = (torch.rand(n, groups, generator=generator) + 0.01).to(torch.float16)
    if scheme.zero_point:
        zeros = torch.randint(0, scheme.levels, (n, groups), generator=generator).to(torch.uint8)
        zeros[0, 0] = 0  # never all in the middle, which would make the weight symmetric
    else:
        zeros = torch.full((n, groups), scheme.levels // 2, dtype=torch.uint8)
    return QuantizedWeight(codes, scales, zeros, scheme)


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    """Equal bit for bit, dtypes and scheme included."""
    pairs = ((one.codes, other.codes), (one.scales, other.scales), (one.zeros, other.zeros))
    return one.scheme == other.scheme and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@st.composite
def weights(
    draw: st.DrawFn, *, bits: st.SearchStrategy[int], n_multiple: int, ragged: bool
) -> QuantizedWeight:
    """Small weights of all shapes that a format accepts."""
    n = n_multiple * draw(st.integers(1, 4))
    group = draw(st.sampled_from([-1, 8, 16, 32]))
    if ragged:
        k = draw(st.integers(1, 70))
    else:
        k = (8 if group == -1 else group) * draw(st.integers(1, 4))
    scheme = Scheme(draw(bits), group, draw(st.booleans()))
    return random_weight(n, k, scheme, draw(st.integers(0, 1000)))
