"""The code of a node's kernels."""

from __future__ import annotations

import pytest

from awqc.errors import ConfigError
from awqc.inspection.code import code
from awqc.inspection.subject import Subject
from awqc.kernels import nvrtc

NAME = "model.layers.0.mlp.down_proj"


@pytest.mark.skipif(not nvrtc.available(), reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")
def test_the_kernel_of_a_linear(outlined: Subject) -> None:
    text = code(outlined, NAME, "ptx")
    assert text.startswith(f"// marlin_small.cu:small of {NAME}, grid (")
    assert ".target sm_90a" in text
    assert ".entry small(" in text


def test_routines_of_libraries_have_no_code_here(loaded: Subject) -> None:
    with pytest.raises(ConfigError, match=r"runs \S+ on cpu, which is no GPU code"):
        code(loaded, NAME, "sass")


def test_a_node_that_there_is_not(loaded: Subject) -> None:
    with pytest.raises(ConfigError, match=r"no node and no quantized linear is called 'layers.0.mlp.down'"):
        code(loaded, "layers.0.mlp.down", "ptx")
