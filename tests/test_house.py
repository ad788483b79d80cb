"""House rules, enforced: what may know what, what is spelled where, and that nothing goes untested."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it along
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
#: Folders that live at the top level and are subpackages of ``awqc``.
LINKED = ("passes", "backends", "kernels")
#: Source files by path from the root, those behind links once only.
SOURCES = {
    file.relative_to(ROOT).as_posix(): file
    for folder in ("awqc", *LINKED)
    for file in sorted((ROOT / folder).rglob("*.py"))
    if not (folder == "awqc" and file.relative_to(ROOT).parts[1] in LINKED)
}
TREES = {source: ast.parse(file.read_text(encoding="utf-8")) for source, file in SOURCES.items()}


def nodes(*kinds: type[ast.AST]) -> Iterator[tuple[str, str, ast.AST]]:
    """Every node of these kinds: its source, ``source:line`` and the node."""
    for source, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, kinds):
                yield source, f"{source}:{getattr(node, 'lineno', 0)}", node


def module_name(source: str) -> str:
    parts = Path(source).with_suffix("").parts
    parts = parts if parts[0] == "awqc" else ("awqc", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_the_sources_are_found() -> None:
    """So that the tests below are about something."""
    assert {"awqc/scaleflow/flow.py", "awqc/rules/__init__.py", "passes/lower.py", "backends/cpu.py"} <= set(
        SOURCES
    )
    assert "awqc/passes/lower.py" not in SOURCES


# -- no architecture by name -------------------------------------------------------------------------------

#: Model types of transformers that are ordinary words, one of them of torch.fx.
WORDS = {"align", "bit", "clip", "codegen", "ctrl", "git"}
#: The demo ships one model, and says which.
SHIPS_A_MODEL = {"awqc/demo/__init__.py", "awqc/cli/demo.py"}


def spellings(model_type: str) -> str:
    """``gpt_neox`` also as ``GPT-NeoX``, and ``gpt2`` as ``GPT-2``."""
    return r"[-_ .]?".join(re.findall(r"[a-z]+|\d+", model_type))


ARCHITECTURE = re.compile(
    rf"(?<![a-z0-9])({'|'.join(spellings(n) for n in CONFIG_MAPPING_NAMES if n not in WORDS)})(?![a-z0-9])",
    re.IGNORECASE,
)


def test_no_architecture_is_named() -> None:
    """Not even in a comment: what holds for one by name does not hold by structure."""
    assert [
        f"{source}:{number}: {match.group()}"
        for source, file in SOURCES.items()
        if source not in SHIPS_A_MODEL
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        for match in ARCHITECTURE.finditer(line)
    ] == []


@pytest.mark.parametrize("text", ["llama", "Gemma's 1 + w", "GPT-2", "gpt2", "if kind == 'qwen2':"])
def test_names_of_architectures_are_recognized(text: str) -> None:
    assert ARCHITECTURE.search(text)


@pytest.mark.parametrize("text", ["4-bit", "clip-weights", "Ctrl-C", "bits", "exllama"])
def test_ordinary_words_are_not(text: str) -> None:
    assert not ARCHITECTURE.search(text)


#: Parts of the names that modules have in transformers.
MODULE_NAME = re.compile(
    r"(?<![a-z])(q|k|v|o|qkv|gate|up|down|gate_up|in|out|c|query|dense)_(proj|attn|fc)|lm_head|self_attn|"
    r"embed_tokens|layernorm|fc[12]\b|\bwte\b|\bexperts?\b|^model_type$"
)


def test_no_module_is_picked_by_its_name() -> None:
    """Neither by a string nor as an attribute. Prose, which has spaces, may give examples."""
    names = [
        *((where, n.value) for _, where, n in nodes(ast.Constant) if isinstance(n.value, str)),
        *((where, n.attr) for _, where, n in nodes(ast.Attribute)),
    ]
    assert [f"{where}: {name}" for where, name in names if " " not in name and MODULE_NAME.search(name)] == []


# -- who may know whom -------------------------------------------------------------------------------------


def imports() -> Iterator[tuple[str, str]]:
    """Source, and full name of what it imports: ``awqc.views.linear``, ``torch``."""
    for source, where, node in nodes(ast.Import, ast.ImportFrom):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{where}: relative import"
            yield from ((source, f"{node.module}.{alias.name}") for alias in node.names)
        else:
            yield from ((source, alias.name) for alias in node.names)


def within(name: str, *modules: str) -> bool:
    return any(name == m or name.startswith(f"{m}.") for m in modules)


def may_import(source: str, name: str) -> bool:
    folder = source.partition("/")[0]
    if folder == "kernels":
        return within(name, "awqc.kernels")
    if folder == "backends":
        known = ("awqc.kernels", "awqc.backends", "awqc.backend", "awqc.quantized", "awqc.errors")
        return within(name, *known)
    if folder == "passes":
        # The files with their references define the canonical ops.
        above = ("awqc.kernels", "awqc.backends", "awqc.api", "awqc.driver", "awqc.cli")
        canonical = ("awqc.kernels.qlinear", "awqc.kernels.qexperts")
        return name in canonical or not within(name, *above)
    if source.startswith("awqc/inspection/") and within(name, "awqc.kernels"):
        return True  # it is about them
    return source == "awqc/driver.py" or not within(name, *(f"awqc.{linked}" for linked in LINKED))


def test_imports_do_not_climb() -> None:
    """Kernels know torch; backends know kernels; passes know awqc; awqc knows passes in the driver only."""
    assert [
        f"{source} imports {name}"
        for source, name in imports()
        if within(name, "awqc") and not may_import(source, name)
    ] == []


def test_kernels_know_torch_alone() -> None:
    models = ("transformers", "accelerate", "safetensors", "datasets")
    assert [(s, name) for s, name in imports() if s.startswith("kernels/") and within(name, *models)] == []


def test_the_library_does_not_know_its_command_line() -> None:
    line = {s for s in SOURCES if s.startswith("awqc/cli/")} | {"awqc/__main__.py"}
    assert [
        f"{source} imports {name}"
        for source, name in imports()
        if source not in line
        and (within(name, "awqc.cli", "typer") or (within(name, "rich") and source != "awqc/tables.py"))
    ] == []


# -- how nodes are read ------------------------------------------------------------------------------------


def may_subscript(source: str, node: ast.Subscript) -> bool:
    if source == "awqc/views.py":
        return True
    if source.startswith("awqc/rules/"):
        return ast.unparse(node.value) == "op.args"
    return source == "awqc/scaleflow/flow.py" and isinstance(node.slice, ast.Slice)


def test_operands_are_read_in_the_typed_views() -> None:
    """``node.args[i]`` is spelled in ``awqc/views.py`` alone. Scale rules read their op's operands by
    position, ``op.args[i]``, and whoever replays a movement passes on what follows the tensor, a slice."""
    assert [
        f"{where}: {ast.unparse(node)}"
        for source, where, node in nodes(ast.Subscript)
        if isinstance(node.value, ast.Attribute)
        and node.value.attr == "args"
        and not may_subscript(source, node)
    ] == []


# -- errors ------------------------------------------------------------------------------------------------


def test_no_error_is_swallowed() -> None:
    """Whoever catches everything raises again."""
    swallowed = []
    for _, where, node in nodes(ast.ExceptHandler):
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = {"BaseException" if name is None else ast.unparse(name) for name in caught}
        if names & {"Exception", "BaseException"} and not any(isinstance(n, ast.Raise) for n in node.body):
            swallowed.append(where)
    assert swallowed == []


def test_nothing_that_is_read_is_executed() -> None:
    """Checkpoints are data: no pickle is opened and no code of theirs is run."""
    executed = []
    for _, where, node in nodes(ast.Call):
        called = ast.unparse(node.func)
        trusts = {k.arg: ast.unparse(k.value) for k in node.keywords}.get("trust_remote_code", "False")
        if called in ("eval", "exec", "torch.load") or within(called, "pickle") or trusts != "False":
            executed.append(f"{where}: {ast.unparse(node)}")
    assert executed == []


# -- size and words ----------------------------------------------------------------------------------------

LONGEST = 400


def test_files_are_short_or_say_why_not() -> None:
    """The reason stands in the first lines: "Longer than 400 lines because ..."."""
    reason = f"longer than {LONGEST} lines because "
    lines = {source: file.read_text(encoding="utf-8").splitlines() for source, file in SOURCES.items()}
    assert [
        s for s, ls in lines.items() if len(ls) > LONGEST and reason not in " ".join(ls[:12]).lower()
    ] == []


def undocumented(source: str) -> Iterator[str]:
    """Public names without a docstring; a method may inherit that of what it overrides."""
    module = importlib.import_module(module_name(source))
    if not module.__doc__ and TREES[source].body:
        yield source
    for name, item in vars(module).items():
        own = getattr(item, "__module__", None) == module.__name__
        if name.startswith("_") or not own or not (inspect.isclass(item) or inspect.isfunction(item)):
            continue
        if not inspect.getdoc(item):
            yield f"{source}: {name}"
        for part, member in vars(item).items() if inspect.isclass(item) else ():
            called = inspect.isfunction(member) or isinstance(member, (property, staticmethod, classmethod))
            if not part.startswith("_") and called and not inspect.getdoc(getattr(item, part)):
                yield f"{source}: {name}.{part}"


def test_everything_public_is_documented() -> None:
    runs_when_imported = "awqc/__main__.py"
    assert [name for s in SOURCES if s != runs_when_imported for name in undocumented(s)] == []


# -- everything is tested ----------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", LINKED)
def test_every_file_has_a_test_file(folder: str) -> None:
    names = {Path(source).stem for source in SOURCES if source.startswith(f"{folder}/")}
    tested = {file.stem.removeprefix("test_") for file in (ROOT / "tests" / folder).glob("test_*.py")}
    assert names - tested == set()


def test_every_pass_is_named_after_its_file() -> None:
    from awqc.pipeline import Pass

    found = {}
    for source in SOURCES:
        if source.startswith("passes/"):
            module = importlib.import_module(module_name(source))
            classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Pass)]
            (own,) = [c for c in classes if c.__module__ == module.__name__]
            found[Path(source).stem.replace("_", "-")] = own.name
    assert all(file == name for file, name in found.items())


# -- packaging ---------------------------------------------------------------------------------------------

SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


@pytest.mark.parametrize("folder", LINKED)
def test_the_links_are_intact(folder: str) -> None:
    """Without them ``awqc.passes`` is found only where awqc is installed."""
    link = ROOT / "awqc" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..", folder)
    # With one, the repository root on sys.path would shadow the package "kernels" of Hugging Face.
    assert not (ROOT / folder / "__init__.py").exists()


def test_every_package_is_listed() -> None:
    """setuptools would leave out what is not."""
    folders = {Path(source).parent.as_posix().replace("/", ".") for source in SOURCES}
    packages = sorted(f if within(f, "awqc") else f"awqc.{f}" for f in folders)
    assert sorted(SETUPTOOLS["packages"]) == packages
    assert SETUPTOOLS["package-dir"] == {"awqc": "awqc", **{f"awqc.{linked}": linked for linked in LINKED}}


def test_nothing_else_is_importable_from_the_root() -> None:
    """A checkout on the path brings one name, as the wheel does."""
    assert {p.name for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()} == {"awqc"}
