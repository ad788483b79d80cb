"""The compiler on a CUDA device: the same decisions and the same function as on the CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import awqc
from awqc import QuantConfig
from awqc.capture import relative_error
from awqc.errors import ConfigError
from awqc.memory import MemoryLimit, enforced
from tests import mixtures, models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIG = QuantConfig(group_size=32)


def test_compile_save_and_load_on_the_device(
    tiny_llama: LlamaForCausalLM, token_ids: Tensor, tmp_path: Path
) -> None:
    config = replace(CONFIG, propagate_dtype="float32")  # the same arithmetic, but for the order of sums
    on_cpu = awqc.compile(tiny_llama, token_ids, backend="reference", config=config)
    on_gpu = awqc.compile(tiny_llama, token_ids, config=config, device="cuda")
    assert {t.device.type for t in on_gpu.state_dict().values()} == {"cuda"}
    assert {t.device.type for t in tiny_llama.state_dict().values()} == {"cpu"}
    assert on_gpu.report.proof["relative_error"] < 1e-9
    found, expected = on_gpu(token_ids[:1].cuda()).logits.cpu(), on_cpu(token_ids[:1]).logits
    original = tiny_llama(token_ids[:1]).logits
    # Sums in another order may turn single codes over, which is far less than quantization itself does.
    assert relative_error(found, expected) < 0.5 * relative_error(expected, original)
    tokens = on_gpu.generate(token_ids[:1, :8].cuda(), max_new_tokens=8, do_sample=False)
    saved = on_gpu.save(tmp_path / "out")
    again = awqc.load(saved, device="cuda", dtype=torch.float32)
    # Dense tensors are stored in half precision: eleven bits each.
    assert relative_error(again(token_ids[:1].cuda()).logits.cpu(), found) < 16 * 2.0**-11
    assert tokens.shape == (1, 16)


def test_a_half_precision_load_generates(
    tiny_llama: LlamaForCausalLM, token_ids: Tensor, tmp_path: Path
) -> None:
    saved = awqc.compile(tiny_llama, token_ids, config=CONFIG, device="cuda").save(tmp_path / "out")
    model = awqc.load(saved, device="cuda")
    assert {t.dtype for t in model.parameters()} == {torch.float16}
    assert torch.isfinite(model(token_ids[:1].cuda()).logits).all()


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("limit", [None, "200MB"])
def test_a_compile_onto_disk_on_the_device(name: str, limit: str | None, tmp_path: Path) -> None:
    model = models.llama() if name == "llama" else mixtures.build(name)
    model.save_pretrained(tmp_path / "model")
    ids = mixtures.token_ids(1, 16, 64)
    found = awqc.compile_to(
        tmp_path / "model", tmp_path / "out", ids, config=CONFIG, device="cuda", max_memory=limit
    )
    assert list(found.report.quantized())
    assert not [what for _, what in found.report.notes if "ran out of memory" in what]
    loaded = awqc.load(tmp_path / "out", device="cuda", dtype=torch.float32)
    with torch.no_grad():
        error = relative_error(loaded(ids[:1].cuda()).logits.cpu(), model(ids[:1]).logits)
    assert error < 0.5  # 4 bits and random weights: far from another model


def test_what_max_memory_allows_is_all_that_is_taken() -> None:
    device, size = torch.device("cuda"), 1 << 30
    limit = MemoryLimit(size)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with enforced(limit, device):
        kept = torch.empty(size // 2 - before, dtype=torch.uint8, device=device)
        torch.empty(size // 4, dtype=torch.uint8, device=device)
        torch.empty(size // 3, dtype=torch.uint8, device=device)  # what was freed is given back first
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(size // 2 + 1, dtype=torch.uint8, device=device)
    said = r"1\.1 GB of memory on cuda:0, which max_memory allows"
    with pytest.raises(ConfigError, match=said), enforced(limit, device):
        torch.empty(size, dtype=torch.uint8, device=device)
    assert torch.empty(size, dtype=torch.uint8, device=device).numel() > kept.numel()
