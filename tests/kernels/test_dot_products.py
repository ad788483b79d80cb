"""The LLVM code of dot products: for every instruction set it becomes what it is made for."""

from __future__ import annotations

import re
from itertools import product

import pytest

from awqc.kernels import llvm
from awqc.kernels.dot_products import TILE, TYPES, source

pytestmark = pytest.mark.skipif(llvm.missing() is not None, reason=f"awqc's own CPU kernel {llvm.missing()}")
#: The instruction of each set that multiplies bytes, in the registers it has.
INSTRUCTION = {
    "avx512vnni": r"vpdpbusd.*%zmm",
    "avxvnni": r"\{vex\}\s+vpdpbusd.*%ymm",
    "avx2": r"vpmaddubsw.*%ymm",
}


def test_every_set_has_its_tile() -> None:
    assert {isa.name for isa in llvm.ISAS} == set(TILE) == set(INSTRUCTION)


@pytest.mark.parametrize("isa", llvm.ISAS, ids=lambda isa: isa.name)
def test_it_becomes_the_instructions_it_is_made_for(isa: llvm.Isa) -> None:
    """Also on a machine that could not run them: two digits of four groups of codes for each row."""
    text = llvm.assembly(source(isa.name, "float32", "float16", "float32"), isa)
    rows = sum(range(1, TILE[isa.name] + 1))
    halves = 1 if isa.name == "avx512vnni" else 2
    assert len(re.findall(INSTRUCTION[isa.name], text)) == rows * 2 * 4 * halves
    assert ("%zmm" in text) == (isa.name == "avx512vnni")


@pytest.mark.parametrize(("x_type", "scale_type"), product(TYPES, TYPES))
def test_every_dtype_compiles(x_type: str, scale_type: str) -> None:
    """Without a function of a library that the machine would have to have."""
    for isa in llvm.ISAS:
        text = source(isa.name, x_type, scale_type, x_type)
        assert not re.findall(r"\b[A-Z]+_[A-Z_]+\b", re.sub(r";.*", "", text)), "a word was not replaced"
        code = llvm.assembly(text, isa)
        assert "linear:" in code
        assert "$__" not in code


@pytest.mark.parametrize("isa", llvm.ISAS, ids=lambda isa: isa.name)
def test_sums_stay_in_registers(isa: llvm.Isa) -> None:
    """In the loop over channels of every tile, no vector is put on the stack."""
    text = llvm.assembly(source(isa.name, "float32", "float16", "float32"), isa)
    for body in re.findall(r"\ntile_\d+:(.*?)\n\s*retq", text, re.DOTALL):
        blocks = re.split(r"\n\.L\w+:", body)
        (loop,) = [block for block in blocks if re.search(INSTRUCTION[isa.name], block)]
        assert not re.search(r"vmov\w+\s+%[yz]mm\d+, -?\d*\(%r[sb]p\)", loop)
