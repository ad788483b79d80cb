"""How a forward is traced: in evaluation mode, on fake weights, without caches, quietly."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
import torch._functorch.partitioners  # the first export would load these in the middle of a compile
import torch.export
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_map, tree_map_only

from awqc.capture.nests import open_dataclasses
from awqc.errors import CaptureError
from awqc.storage.source import swapped_tensors

#: Forward arguments that would make the graph stateful or its output a tuple.
_SETTINGS = {"use_cache": False}
_RESULTS = (Tensor, int, float, bool, str, torch.SymInt, torch.SymFloat, torch.SymBool)
#: What torch.export says on its way to an exception, which is all that a rung of the ladder needs.
_LOUD = ("torch.export._trace", "torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")


def accepted_settings(module: nn.Module) -> dict[str, Any]:
    """Arguments that every call of the forward is given."""
    parameters = inspect.signature(module.forward).parameters
    return {k: v for k, v in _SETTINGS.items() if k in parameters}


def reason(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


class Fakes:
    """Fake tensors of one mode that stand for weights and inputs.

    Args:
        dtype: of everything that is floating point; None keeps each one's own.
        device: where they pretend to be.
    """

    def __init__(self, dtype: torch.dtype | None, device: torch.device | str) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.dtype, self.device = dtype, device

    def weight(self, tensor: Tensor) -> Tensor:
        """A fake of a parameter or buffer."""
        # Buffers too, since the graph's weights are all handed out in one dtype: casting a model to half
        # precision casts its tables along.
        cast = self.dtype is not None and tensor.is_floating_point()
        with self.mode:
            new = torch.empty(tensor.shape, dtype=self.dtype if cast else tensor.dtype, device=self.device)
            return nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new

    def inputs(self, arguments: Any) -> Any:
        """Fakes of all tensors in ``arguments``; everything else is passed on."""
        with self.mode:
            return tree_map_only(
                Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=self.device), arguments
            )


def export(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    fakes: Fakes,
    prepare: Callable[[], None] = lambda: None,
) -> torch.export.ExportedProgram:
    """Trace ``module(*args, **kwargs)`` without its weights.

    Args:
        prepare: called when everything is in place; what it assigns to modules is gone afterwards.

    Raises:
        CaptureError: if the forward cannot be traced; the cause is chained.
    """
    fake_args, fake_kwargs = fakes.inputs((tuple(args), dict(kwargs)))
    with evaluation_mode(module), swapped_tensors(module, fakes.weight), torch.no_grad():
        prepare()
        _only_known_results(module)
        try:
            with quick_tracing(), quiet(), _no_idle_casts():
                return torch.export.export(module, fake_args, fake_kwargs, strict=False)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(
                f"{type(module).__name__} could not be traced by torch.export: {reason(error)}"
            ) from error


def _only_known_results(module: nn.Module) -> None:
    """Let the forward of ``module`` return None for what torch.export does not take, such as caches."""
    forward = module.forward

    @functools.wraps(forward)
    def known(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        open_dataclasses(result)
        return tree_map(lambda leaf: leaf if isinstance(leaf, _RESULTS) else None, result)

    module.__dict__["forward"] = known


@contextmanager
def quiet() -> Iterator[None]:
    """What torch logs of a trace that fails is not shown: the exception says it."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


@contextmanager
def _no_idle_casts() -> Iterator[None]:
    """A module that casts itself to the dtype that it has is left alone: torch would have to swap its
    parameters for that, which it cannot while they are traced."""
    apply = nn.Module._apply

    def checked(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        tensors = [*self.parameters(recurse), *self.buffers(recurse)]
        if all((new := fn(t)).dtype == t.dtype and new.device == t.device for t in tensors):
            return self
        return apply(self, fn, recurse)

    nn.Module._apply = checked  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = apply  # type: ignore[method-assign]


@contextmanager
def quick_tracing() -> Iterator[None]:
    """Within the block there is no garbage collection, nodes have no stack traces, and graphs that are made
    or changed are turned into Python code when they are first called. Tracing makes many small objects, all
    of them alive: looking through them again and again takes up to a third of its time; code for graphs that
    the next pass of torch.export changes takes a quarter, and the traces, which nothing reads, a tenth."""
    enabled, recompile, names = gc.isenabled(), fx.GraphModule.recompile, vars(fx.proxy)
    traceback = names["CapturedTraceback"]
    gc.disable()
    fx.GraphModule.recompile = _later(recompile)  # type: ignore[method-assign, assignment]
    names["CapturedTraceback"] = _NoTraceback
    try:
        yield
    finally:
        fx.GraphModule.recompile = recompile  # type: ignore[method-assign]
        names["CapturedTraceback"] = traceback
        if enabled:
            gc.enable()


def _later(recompile: Callable[[fx.GraphModule], Any]) -> Callable[[fx.GraphModule], None]:
    """``recompile``, put off until the module is called."""

    def put_off(module: fx.GraphModule) -> None:
        spec = getattr(module.graph._codegen, "pytree_info", None)
        if spec is not None:  # how arguments and results nest, which others ask for
            module._in_spec, module._out_spec = spec.in_spec, spec.out_spec

        def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            recompile(self)
            return self.forward(*args, **kwargs)

        type(module).forward = forward

    return put_off


class _NoTraceback:
    """In the place of torch's: where a node was made is not looked up."""

    @staticmethod
    def extract() -> type[_NoTraceback]:
        """As torch's, without a stack."""
        return _NoTraceback

    @staticmethod
    def summary() -> None:
        """No frames."""


@contextmanager
def same_random() -> Iterator[None]:
    """What is drawn within the block is the same every time; the state outside is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Dropout and caches off within the block; after it, every submodule is as it was: its mode, and what
    a forward has assigned to it or registered on it."""
    before = {child: dict(child.__dict__) for child in module.modules()}
    entries = {
        child: {name: dict(value) for name, value in attributes.items() if isinstance(value, dict)}
        for child, attributes in before.items()
    }
    # A forward without the argument asks its config.
    configs = {id(c): c for child in before if (c := child.__dict__.get("config")) is not None}
    caching = [c for c in configs.values() if getattr(c, "use_cache", None) is True]
    # nn.TransformerEncoder has a second way to run, which leaves masked positions out of its result.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    results = register_module_forward_hook(lambda module, args, result: open_dataclasses(result))
    module.eval()
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        results.remove()
        for config in caching:
            config.use_cache = True
        for child, attributes in before.items():
            child.__dict__.clear()
            child.__dict__.update(attributes)
            for name, items in entries[child].items():
                child.__dict__[name].clear()
                child.__dict__[name].update(items)
