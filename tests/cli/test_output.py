"""Progress bars and consoles of the command line."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from awqc.cli import output


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 100 columns in place of stderr."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(output, "stderr", lambda: console)
    return stream


def test_a_loop_moves_a_bar(screen: io.StringIO) -> None:
    with output.Bars("reading") as bars:
        assert "reading" in shown(bars)
        seen = []
        for item in bars.track(["a", "b", "c", "d"], "calibrating"):
            seen.append(item)
            assert "calibrating" in shown(bars)
            assert f"{25 * (len(seen) - 1)}%" in shown(bars)
            assert "left" in shown(bars)
            assert "reading" not in shown(bars)
        assert seen == ["a", "b", "c", "d"]
        assert "calibrating" not in shown(bars)
        assert "working" in shown(bars)
        assert "%" not in shown(bars)
        assert "left" not in shown(bars)
        bars.now("writing")
        assert "writing" in shown(bars)
    assert screen.getvalue()


def test_a_count_moves_a_bar(screen: io.StringIO) -> None:
    with output.Bars("reading") as bars:
        advance = bars.count("sampling")
        assert "sampling" not in shown(bars)
        advance(30, 40)
        assert "sampling" in shown(bars)
        assert "75%" in shown(bars)
        advance(40, 40)
        assert "sampling" not in shown(bars)


def test_an_error_in_a_loop_leaves_the_terminal_in_order(screen: io.StringIO) -> None:
    with pytest.raises(ZeroDivisionError), output.Bars("reading") as bars:
        next(iter(bars.track([1, 2], "calibrating"))) / 0
    assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h") == 1


def test_nothing_is_drawn_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with output.Bars("reading") as bars:
        assert list(bars.track([1, 2], "calibrating")) == [1, 2]
        bars.now("writing")
    assert capsys.readouterr() == ("", "")


def test_results_are_not_wrapped_at_the_default_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    output.stdout().print("x" * 100)
    assert capsys.readouterr().out == "x" * 100 + "\n"


def shown(bars: output.Bars) -> str:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    with console.capture() as capture:
        console.print(bars._progress.get_renderable())
    return capture.get()
