"""Passes as they are written on the command line, and the pipeline edited with them.

PASS      a class, and its options in parentheses where they differ from the defaults:
          examples/keep_sensitive.py:KeepSensitive(share=0.2)     a file
          my_package.passes:MyPass                                an importable module
          round-weights(method="nearest")                         a pass of awqc
          my-pass                                                 a pass that an installed package registers

PLACE     NAME=PASS, NAME being a pass of the pipeline
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from awqc.errors import ConfigError
from awqc.pipeline import Pass, Pipeline, third_party_passes

_EXAMPLE = "clip-weights=examples/keep_sensitive.py:KeepSensitive"


def edit(
    pipeline: Pipeline,
    before: Sequence[str] = (),
    after: Sequence[str] = (),
    replace: Sequence[str] = (),
    without: Sequence[str] = (),
) -> Pipeline:
    """``pipeline`` with passes inserted, replaced and removed, in this order.

    Args:
        pipeline: what to start from.
        before, after, replace: places, ``NAME=PASS``.
        without: names of passes.

    Raises:
        ConfigError: if a pass cannot be found or made.
        PipelineError: if the pipeline has no pass of a name.
    """
    for place in before:
        pipeline = pipeline.insert_before(*_place("--before", place, pipeline))
    for place in after:
        pipeline = pipeline.insert_after(*_place("--after", place, pipeline))
    for place in replace:
        pipeline = pipeline.replace(*_place("--replace", place, pipeline))
    for name in without:
        pipeline = pipeline.remove(name)
    return pipeline


def _place(option: str, text: str, pipeline: Pipeline) -> tuple[str, Pass]:
    name, equals, spelled = text.partition("=")
    if not equals or not spelled or "(" in name:
        raise ConfigError(f"{option} {text}: write NAME=PASS, for example {option} {_EXAMPLE}")
    return name, make_pass(spelled, pipeline)


def make_pass(spelled: str, pipeline: Pipeline) -> Pass:
    """The pass that ``spelled`` describes; ``pipeline`` knows awqc's own by name.

    Raises:
        ConfigError: if there is no such class, or it has no such options.
    """
    where, parenthesis, arguments = spelled.partition("(")
    cls = _class(where, pipeline)
    options = _options(spelled, arguments) if parenthesis else {}
    try:
        return cls(**options)
    except TypeError as error:
        raise ConfigError(f"pass {spelled}: {error}") from error


def _class(where: str, pipeline: Pipeline) -> type[Pass]:
    source, colon, name = where.rpartition(":")
    if not colon:
        known = {p.name: type(p) for p in pipeline} | third_party_passes()
        if name not in known:
            raise ConfigError(
                f"no pass is called {name!r}: there are {', '.join(known)}; of one of your own write "
                "module:Class or file.py:Class"
            )
        return known[name]
    found = getattr(_module(where, source), name, None)
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise ConfigError(f"pass {where}: {source} has no class {name} derived from awqc.Pass")
    return found


def _module(where: str, source: str) -> ModuleType:
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        # Not under the file's own name, which may be that of an installed module.
        spec = importlib.util.spec_from_file_location(f"awqc_pass:{source}", source)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their module up while they are made.
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    except (ImportError, FileNotFoundError) as error:
        raise ConfigError(f"pass {where}: {source} cannot be imported: {error}") from error


def _options(spelled: str, arguments: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"options({arguments}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ConfigError(
            f"pass {spelled}: write options as Class(name=value, ...), values being numbers, quoted strings, "
            "True, False, None or tuples of these"
        ) from error
