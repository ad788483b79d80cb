"""Exit codes, messages and start-up of the ``awqc`` command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import awqc
from awqc.cli.main import app
from awqc.errors import VerifyError

Invoke = Callable[..., Any]
ROOT = Path(__file__).parents[2]


def python(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def raising(error: BaseException) -> Callable[..., None]:
    def run(*_: Any) -> None:
        raise error

    return run


def test_help_and_the_package_itself_need_no_torch() -> None:
    code = (
        "import sys\n"
        "import awqc\n"
        "from awqc.cli.main import app\n"
        "try: app(['compile', '--help'])\n"
        "except SystemExit as end: print(end.code)\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])\n"
    )
    stdout, stderr = python("-c", code).communicate(timeout=60)
    assert stdout.splitlines()[-2:] == ["0", "[]"], stderr


def test_every_public_name_is_there() -> None:
    assert set(awqc._MODULES) == set(awqc.__all__)
    for name in awqc.__all__:
        assert getattr(awqc, name).__name__ == name
    assert set(awqc.__all__) <= set(dir(awqc))
    with pytest.raises(AttributeError, match="module 'awqc' has no attribute 'nothing'"):
        getattr(awqc, "nothing")  # noqa: B009 - mypy would be right to refuse the attribute


def test_the_version(invoke: Invoke) -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"awqc {awqc.__version__}\n")


def test_as_a_module() -> None:
    process = python("-m", "awqc", "compile", "nowhere", "-o", "out")
    stdout, stderr = process.communicate(timeout=120)
    message = "nowhere is not a directory: give a local Hugging Face model directory, or a module in memory"
    assert (process.returncode, stdout, stderr) == (1, "", f"error: {message}\n")


@pytest.mark.parametrize(
    "arguments", [["compile"], ["compile", "model"], ["quantize"], ["eval", "model", "--window", "many"]]
)
def test_wrong_usage(invoke: Invoke, arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (VerifyError("pass 'x' broke\nthe graph"), 1, "error: pass 'x' broke the graph\n"),
        (KeyboardInterrupt(), 130, "interrupted: nothing half-written is left behind\n"),
        (
            ZeroDivisionError("by zero"),
            70,
            "error: unexpected ZeroDivisionError: by zero\n"
            "This is a fault in awqc or in a pass or backend of yours; --debug shows where.\n",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_in_the_middle_of_a_compile(
    model: Path,
    options: list[Any],
    invoke: Invoke,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
    debug: bool,
) -> None:
    monkeypatch.setattr("awqc.passes.clip_weights.ClipWeights.run", raising(error))
    result = invoke("compile", model, *options, "-o", tmp_path / "out", *(["--debug"] if debug else []))
    assert result.exit_code == code
    assert result.stderr.endswith(message)
    assert result.stderr.startswith("Traceback (most recent call last):") is debug
    assert debug or result.stderr == message
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_the_checkpoint_is_written(
    model: Path, options: list[Any], invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr("awqc.checkpoints.write.write_sharded", raising(KeyboardInterrupt()))
        result = invoke("compile", model, *options, "-o", out, "--overwrite")
    journal = tmp_path / "out.journal"
    assert (result.exit_code, result.stdout) == (130, "")
    assert f"finished stages are in {journal}; the same command continues from there" in result.stderr
    assert sorted(tmp_path.iterdir()) == [out, journal]
    assert [file.name for file in out.iterdir()] == ["config.json"]
    assert invoke("compile", model, *options, "-o", out, "--overwrite").exit_code == 0
    assert list(tmp_path.iterdir()) == [out]
    assert "continued after" in (out / "awqc_report.json").read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is no signal to a process there")
def test_a_real_ctrl_c(model: Path, options: list[Any], tmp_path: Path) -> None:
    file, reached, out = tmp_path / "slow.py", tmp_path / "reached", tmp_path / "out"
    file.write_text(
        "import time, pathlib\n"
        "from dataclasses import dataclass\n"
        "import awqc\n"
        "@dataclass(frozen=True)\n"
        "class Slow(awqc.Pass):\n"
        "    name = 'slow'\n"
        "    scope = 'stage'\n"
        "    def run(self, graph, context):\n"
        f"        pathlib.Path({str(reached)!r}).touch()\n"
        "        time.sleep(60)\n"
    )
    arguments = ["compile", model, *options, "-o", out, "--before", f"clip-weights={file}:Slow"]
    process = python("-m", "awqc", *map(str, arguments))
    try:
        deadline = time.monotonic() + 120
        while not reached.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, stdout) == (130, "")
    assert stderr == "interrupted: nothing half-written is left behind\n"
    assert not out.exists()


def test_backends(invoke: Invoke) -> None:
    document = json.loads(invoke("backends", "--json").stdout)
    assert document["device"] == "cpu"
    assert document["backends"]["reference"] == {"priority": 0, "refuses": None}
    lines = invoke("backends").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(document["backends"])
    assert lines[0].split()[:2] == ["backend", "priority"]


def test_options_are_spelled_in_small_letters() -> None:
    import typer

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    spelled = {name for command in commands.values() for p in command.params for name in p.opts}
    assert {"--device", "--dtype", "--bits"} <= spelled
    assert [name for name in spelled if name.startswith("--") and name != name.lower()] == []
