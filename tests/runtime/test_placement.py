"""Models divided among devices and disk: the same tokens as undivided, and clear refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import compute_module_sizes
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import awqc
from awqc import QuantConfig
from awqc.backend import Backend, LinearShape, PackedLinear
from awqc.errors import AwqcError, BackendError, CheckpointError, ConfigError
from awqc.quantized import QuantizedWeight
from awqc.runtime.compiled import CompiledModel
from awqc.runtime.placement import Placement, compute_places, on
from tests import mixtures, models

CONFIG = QuantConfig(group_size=32)
#: A device map of a model of two layers, with something everywhere.
MAP = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


def _mixture() -> Any:
    name = next(iter(mixtures.MIXTURES))
    return mixtures.build(name)


MODELS = {
    "dense": models.llama,
    "tied": lambda: models.llama(tie_word_embeddings=True),
    "biases": models.qwen2,
    "experts": _mixture,
}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = MODELS[request.param]()
    compiled = awqc.compile(model, mixtures.token_ids(1), backend="reference", config=CONFIG)
    return compiled.save(tmp_path_factory.mktemp("saved") / "out", "awqc")


def tokens(model: nn.Module, device: str = "cpu") -> Tensor:
    ids = mixtures.token_ids(2, 1, 8).to(device)
    return model.generate(ids, max_new_tokens=8, do_sample=False).cpu()  # type: ignore[operator]


def on_meta(model: nn.Module) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if tensor.is_meta}


def in_memory(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_parts_on_disk_give_the_same_tokens(checkpoint: Path, tmp_path: Path, backend: str) -> None:
    whole = awqc.load(checkpoint, backend)
    divided = awqc.load(checkpoint, backend, device_map=MAP, offload_folder=tmp_path / "off")
    names = on_meta(divided)
    assert any(name.startswith("model.layers.0.") for name in names)
    assert not any(name.startswith("model.layers.1.") for name in names)
    held = in_memory(divided)
    assert torch.equal(tokens(divided), tokens(whole))
    assert in_memory(divided) == held  # what was brought in has been let go


def test_a_limit_decides_what_goes_to_disk(checkpoint: Path, tmp_path: Path) -> None:
    whole = awqc.load(checkpoint)
    size = in_memory(whole)
    limit = int(0.9 * size)
    divided = awqc.load(checkpoint, device_map="auto", max_memory={"cpu": limit}, offload_folder=tmp_path)
    assert on_meta(divided)
    assert in_memory(divided) < limit
    assert torch.equal(tokens(divided), tokens(whole))
    assert awqc.load(checkpoint, device_map="auto", max_memory={"cpu": 4 * size}).graph is not None


def test_weights_on_disk_can_be_looked_at(checkpoint: Path, tmp_path: Path) -> None:
    whole = awqc.load(checkpoint, "reference")
    divided = awqc.load(checkpoint, "reference", device_map={"": "disk"}, offload_folder=tmp_path)
    for name, module in {**divided.quantized_linears(), **divided.quantized_experts()}.items():
        assert module.device.type == "cpu"
        assert torch.equal(module.dequantize(), whole.get_submodule(name).dequantize())  # type: ignore[operator]
    name, linear = next(iter(divided.quantized_linears().items()))
    assert torch.equal(linear.weight.sum(), whole.quantized_linears()[name].weight.sum())


def test_every_implementation_of_experts_runs_from_disk(tmp_path: Path) -> None:
    model = _mixture()
    path = awqc.compile(model, mixtures.token_ids(1), backend="reference", config=CONFIG).save(
        tmp_path / "out"
    )
    whole = awqc.load(path)
    divided = awqc.load(path, device_map={"": "disk"}, offload_folder=tmp_path / "off")
    ids = mixtures.token_ids(2, 2)
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        for each in (whole, divided):
            each.set_experts_implementation(implementation)  # type: ignore[operator]
        with torch.no_grad():
            assert torch.equal(divided(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_sizes_are_known_before_anything_is_packed(
    checkpoint: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from awqc.storage import loading

    seen: list[int] = []

    def places(sized: nn.Module, *_: object) -> Placement:
        assert all(tensor.is_meta for tensor in sized.state_dict().values())
        sizes: Any = compute_module_sizes(sized)
        seen.append((sizes[0] if isinstance(sizes, tuple) else sizes)[""])
        return on(torch.device("cpu"))

    monkeypatch.setattr(loading, "compute_places", places)
    loaded = awqc.load(checkpoint, backend, device_map="auto")
    assert seen == [in_memory(loaded)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_memory": {"cpu": "1GB"}}, "give device_map='auto' too"),
        ({"device_map": "everywhere"}, "choose one of auto, balanced"),
        ({"device_map": "auto", "max_memory": {"cpu": "much"}}, "max_memory cannot be used: .*much"),
        ({"device_map": {"": "disk"}}, "give offload_folder"),
        ({"device_map": {"model": "cpu"}}, "device_map cannot be used: .*lm_head"),
    ],
)
def test_refusals(options: dict[str, Any], said: str, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        awqc.load(checkpoint, **options)


def test_what_a_divided_model_cannot_do_says_so(checkpoint: Path, tmp_path: Path) -> None:
    divided = awqc.load(checkpoint, device_map=MAP, offload_folder=tmp_path)
    with pytest.raises(CheckpointError, match="load it without device_map"):
        divided.save(tmp_path / "again")
    with pytest.raises(ConfigError, match="load it without device_map"):
        _ = divided.graph


class Opaque(Backend):
    """Packs into a layout that has no memory to move."""

    name = "opaque"

    def refuses(self, shape: LinearShape) -> str | None:
        return "runs on the CPU" if shape.device.type != "cpu" else None

    def pack(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        tensors = {"w": torch.eye(4).to_sparse(), "b": bias}
        return PackedLinear(torch.ops.aten.linear.default, tensors)

    def unpack(self, packed: PackedLinear, shape: LinearShape) -> tuple[QuantizedWeight, Tensor | None]:
        raise AssertionError("not asked for")


def test_packed_weights_that_cannot_move_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"'opaque' packs cannot be moved.*choose another"):
        awqc.load(checkpoint, Opaque(), device_map={"": "disk"}, offload_folder=tmp_path)


def test_a_move_to_a_device_that_the_backend_does_not_run_on(tiny_llama: LlamaForCausalLM) -> None:
    model: CompiledModel = awqc.compile(tiny_llama, mixtures.token_ids(1), backend="cpu", config=CONFIG)
    linear = next(iter(model.quantized_linears().values()))
    assert linear.backend.name == "cpu"
    with pytest.raises(BackendError, match=r"packed for cpu by backend 'cpu' cannot move to cuda:0.*device="):
        linear._check_move(torch.device("cuda", 0))
    model.to("cpu")


def test_what_shares_a_tensor_stays_together() -> None:
    model = models.llama(tie_word_embeddings=True)
    places = {**dict.fromkeys(MAP, 0), "lm_head": 1}
    where = r"'lm_head.weight' on cuda:1, 'model.embed_tokens.weight' on cuda:0"
    with pytest.raises(
        ConfigError, match=rf"^device_map divides one tensor: {where}: give these modules the"
    ):
        compute_places(model, places, None, torch.device("cuda", 0), None)
    together = compute_places(model, {**places, "lm_head": 0}, None, torch.device("cuda", 0), None)
    assert set(together.places.values()) == {0}


def test_a_full_disk_is_an_error_of_ours(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("awqc.runtime.placement.save_tensors", full)
    with pytest.raises(AwqcError, match="No space left on device; offload to another folder"):
        awqc.load(checkpoint, device_map={"": "disk"}, offload_folder=tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_gpu_and_host_memory(checkpoint: Path, tmp_path: Path) -> None:
    whole = awqc.load(checkpoint, device="cuda")
    size = in_memory(whole)
    divided = awqc.load(
        checkpoint,
        device_map="auto",
        max_memory={0: int(0.7 * size), "cpu": int(0.5 * size)},
        offload_folder=tmp_path,
    )
    assert on_meta(divided)
    assert {linear.device.type for linear in divided.quantized_linears().values()} == {"cuda"}
    assert torch.equal(tokens(divided, "cuda"), tokens(whole, "cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", ["auto", "triton", "exllama", "reference"])
def test_two_gpus(checkpoint: Path, backend: str) -> None:
    places = {**dict.fromkeys(MAP, 0), "model.layers.1": 1, "model.norm": 1}
    whole, divided = (
        awqc.load(checkpoint, backend, **how) for how in ({"device": "cuda"}, {"device_map": places})
    )
    assert {tensor.device.index for tensor in divided.state_dict().values()} == {0, 1}
    assert torch.equal(tokens(divided, "cuda"), tokens(whole, "cuda"))
