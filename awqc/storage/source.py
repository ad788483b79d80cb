"""Where a model comes from: a module in memory, or a Hugging Face directory read tensor by tensor."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from awqc.checkpoints import open_checkpoint
from awqc.errors import CheckpointError, ConfigError
from awqc.storage.disk_names import Piece, disk_names, match_stored, read_pieces

#: What a model may be for, the most telling first, where its config does not name its class.
_KINDS = ("ForImageTextToText", "ForCausalLM", "ForSeq2SeqLM", "ForSpeechSeq2Seq", "ForMaskedLM", "")
#: Elements of a tensor that is too large to be made only to be thrown away.
_LARGE = 1 << 24
#: What modules call to draw initial values.
_RANDOM = frozenset(
    name
    for name in (*dir(nn.init), "random_", "bernoulli_", "exponential_", "log_normal_")
    if name.endswith("_") and not name.endswith("__")
)


@dataclass
class ModelSource:
    """A model whose weights may still be on disk.

    Args:
        module: the user's module, or a skeleton with its parameters on ``meta``.
        read: the source tensor of a parameter or buffer name.
        path: the directory it came from, if any.
        stored_as: parameter name -> what it is stored as in the checkpoint files; for the rest, what
            transformers would store it as counts.
        dtype: floating-point dtype that most parameters are stored in.
        notes: what a reader of the report must know about how the model was read.
        stand_ins: gives values for checks of whole graphs where those of :attr:`read` do not fit.
        has_values: False for a model whose weights are nowhere, which can be traced but not run.
    """

    module: nn.Module
    read: Callable[[str], Tensor]
    path: Path | None = None
    stored_as: Mapping[str, list[Piece]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    notes: list[str] = field(default_factory=list)
    has_values: bool = True
    stand_ins: Callable[[str, torch.dtype | None], Tensor] | None = None

    @property
    def config(self) -> Any:
        """The module's Hugging Face config, or None."""
        return getattr(self.module, "config", None)

    @property
    def half(self) -> torch.dtype:
        """The 16-bit dtype that checkpoints made from this model state: its own, or float16."""
        return self.dtype if self.dtype in (torch.float16, torch.bfloat16) else torch.float16

    def materialized(
        self, max_memory: Mapping[int | str, int] | None = None, folder: Path | None = None
    ) -> nn.Module:
        """The module with its weights, in float32 when they have to be read first.

        Args:
            max_memory: bytes by device number or ``"cpu"``: what does not fit there is read from ``folder``
                whenever it is needed, and weights are in the dtype that they are stored in.
        """
        if not any(tensor.is_meta for _, tensor in named_tensors(self.module)):
            return self.module
        cls: Any = type(self.module)
        if max_memory is None:
            model: nn.Module = cls.from_pretrained(self.path, dtype=torch.float32)
        else:
            divided = {"device_map": "auto", "max_memory": dict(max_memory), "offload_folder": folder}
            model = cls.from_pretrained(self.path, dtype=self.dtype, **divided)
        return model.eval()

    def tokenizer(self) -> Any:
        """The tokenizer that lies beside the model.

        Raises:
            ConfigError: if there is none or it cannot be loaded.
        """
        if self.path is None:
            raise ConfigError(
                "a model in memory carries no tokenizer: pass tokenizer=... or token ids as calib"
            )
        return load_tokenizer(self.path)

    def stored(self, name: str) -> list[Piece]:
        """What checkpoints store the tensor ``name`` of the module as."""
        if name in self.stored_as:
            return self.stored_as[name]
        return self._saved_as.get(name, [Piece(name)])

    def on_disk(self, name: str) -> str:
        """The name under which checkpoints store the tensor ``name`` of the module."""
        if name in self.stored_as or name in self._saved_as:
            return self.stored(name)[0].name
        module, _, part = name.rpartition(".")
        return f"{self.module_on_disk(module)}.{part}" if module else name

    def module_on_disk(self, name: str) -> str:
        """The prefix under which checkpoints store the tensors of the module ``name``."""
        pieces = self.stored(f"{name}.weight")
        return (pieces[0].name if len(pieces) == 1 else f"{name}.weight").removesuffix(".weight")

    @functools.cached_property
    def _saved_as(self) -> dict[str, list[Piece]]:
        return {} if self.stored_as else disk_names(self.module)

    def names(self) -> list[str]:
        """Names of all parameters and buffers, one per storage."""
        return [name for name, _ in named_tensors(self.module)]

    def buffers(self) -> list[str]:
        """Those of :meth:`names` that are no parameters."""
        return [name for name, t in named_tensors(self.module) if not isinstance(t, nn.Parameter)]


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a model directory; code that the directory may hold is not run.

    Raises:
        ConfigError: if there is none or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{path} holds no tokenizer that transformers can load ({error}): copy the tokenizer's files "
            "there, or pass tokenizer=... or token ids"
        ) from error


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers (non-persistent ones too), each storage under its first name only."""
    seen: set[int] = set()
    for group in (
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in group:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor


def aliases(module: nn.Module) -> dict[str, str]:
    """Every other name of a tied tensor -> its first name."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for group in (
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in group:
            canonical = first.setdefault(id(tensor), name)
            if canonical != name:
                tied[name] = canonical
    return tied


def open_source(model: nn.Module | str | Path) -> ModelSource:
    """A source for a module, or for a directory with ``config.json`` and safetensors.

    Raises:
        CheckpointError: if the directory is missing, damaged or disagrees with its config.
    """
    if isinstance(model, nn.Module):
        return from_module(model)
    return from_directory(Path(model))


def from_module(module: nn.Module) -> ModelSource:
    """A module in memory; its own tensors are read, never changed."""
    tensors = dict(named_tensors(module))

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        if tensor.is_meta:
            raise ConfigError(
                f"parameter {name!r} is on the meta device and has no values: awqc.analyze accepts such a "
                "model, awqc.compile needs one with weights or a checkpoint directory"
            )
        return tensor.detach()

    path = getattr(getattr(module, "config", None), "_name_or_path", "") or ""
    dtypes = [t.dtype for t in tensors.values() if t.is_floating_point()]
    directory = Path(path) if path and Path(path).is_dir() else None
    return ModelSource(
        module,
        read,
        directory,
        dtype=max(set(dtypes), key=dtypes.count, default=torch.float32),
        has_values=not any(t.is_meta for t in tensors.values()),
    )


def skeleton(path: Path) -> nn.Module:
    """The module that ``path/config.json`` describes: parameters on ``meta``, buffers real.

    Raises:
        CheckpointError: if there is no config that transformers can read.
    """
    import transformers
    from accelerate import init_empty_weights

    _check_directory(path)
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} has no config that transformers can read ({error}): give a directory written by "
            "save_pretrained, with config.json and *.safetensors"
        ) from error
    cls = _model_class(config)
    # Buffers are small and not all of them are stored in the files, so they are computed for real.
    with init_empty_weights(include_buffers=False), _NoRandomValues():
        build = getattr(cls, "_from_config", None) or cls.from_config
        module = build(config, dtype=torch.float32)
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    if (path / "generation_config.json").is_file():
        # Where a chat model ends its turns, among other things.
        module.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return module.eval()


def _model_class(config: Any) -> Any:
    """The class that a config names, or else the one that transformers has for such a config."""
    import transformers

    architecture = next(iter(config.architectures or ()), "")
    auto = (getattr(transformers, f"AutoModel{kind}") for kind in _KINDS)
    known = (cls for cls in auto if type(config) in cls._model_mapping)
    return getattr(transformers, architecture, None) or next(known, transformers.AutoModelForCausalLM)


class _NoRandomValues(TorchFunctionMode):
    """Drawing random values for a tensor without storage does nothing: torch takes milliseconds for it.
    Large memory without values is not even asked for: it is a parameter's, and goes to ``meta`` anyway."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _RANDOM:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        if func is torch.empty and kwargs.get("device") is None:
            size = kwargs.get("size", args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
            if math.prod(size) >= _LARGE:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


def from_directory(path: Path) -> ModelSource:
    """A checkpoint directory; each tensor is read from its file when it is needed."""
    _check_directory(path)
    checkpoint = open_checkpoint(path)
    if checkpoint.format is not None:
        raise CheckpointError(
            f"{path} is already quantized ({checkpoint.format}): awqc compiles float checkpoints; "
            "use awqc.load to run this one"
        )
    module, files = skeleton(path), checkpoint.tensors
    tensors = dict(named_tensors(module))
    wanted = [n for n, t in tensors.items() if t.is_meta]
    stored = match_stored(wanted, module, list(files), aliases(module))
    missing = [name for name in wanted if name not in stored]
    if missing:
        return _through_transformers(path, module, missing)
    for name, pieces in stored.items():
        expected = [piece.shape(tuple(tensors[name].shape)) for piece in pieces]
        for piece, shape in zip(pieces, expected, strict=True):
            if tuple(files.info(piece.name).shape) != shape:
                raise CheckpointError(
                    f"{path}: tensor {piece.name!r} has shape {tuple(files.info(piece.name).shape)}, but "
                    f"config.json describes {shape}: config and weights belong to different models"
                )

    def read(name: str) -> Tensor:
        if name not in stored:
            return tensors[name]
        return read_pieces(stored[name], tuple(tensors[name].shape), files.read)

    dtypes = [files.info(piece.name).dtype for pieces in stored.values() for piece in pieces]
    return ModelSource(module, read, path, stored, max(set(dtypes), key=dtypes.count, default=torch.float32))


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a directory: give a local Hugging Face model directory, or a module in memory"
        )


def _through_transformers(path: Path, module: nn.Module, missing: list[str]) -> ModelSource:
    """Checkpoints whose stored names transformers converts while loading: read whole, and said so."""
    cls: Any = type(module)
    model, info = cls.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    absent = sorted(set(info["missing_keys"]) - set(aliases(model)))
    if absent:
        raise CheckpointError(
            f"{path} lacks {len(absent)} tensor(s) that its config asks for, such as {absent[0]!r}: "
            "the checkpoint is incomplete or belongs to another config"
        )
    source = from_module(model.eval())
    note = (
        f"read whole through transformers: {len(missing)} parameters, such as {missing[0]!r}, are stored "
        "under other names"
    )
    return ModelSource(source.module, source.read, path, notes=[note])


@contextmanager
def swapped_tensors(module: nn.Module, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block every parameter and buffer of ``module`` is ``replace(tensor)``, ties kept."""
    swapped: dict[int, Tensor] = {}
    saved: list[tuple[dict[str, Any], str, Tensor]] = []
    for child in module.modules():
        for store in (child._parameters, child._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    saved.append((store, name, tensor))
                    if id(tensor) not in swapped:
                        swapped[id(tensor)] = replace(tensor)
    try:
        for holder, name, tensor in saved:
            holder[name] = swapped[id(tensor)]
        yield
    finally:
        for holder, name, tensor in saved:
            holder[name] = tensor
