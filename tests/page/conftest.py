"""A page in a headless Chromium: skipped, with the reason, where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from awqc.page.graphs import LayerGraph
from awqc.page.render import render
from tests.page.reports import synthetic

#: As Debian, Ubuntu and Google call it.
NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        there = [path for name in NAMES if (path := shutil.which(name))]
        own = running.chromium.executable_path
        found = own if Path(own).exists() else next(iter(there), None)
        if found is None:
            pytest.skip("no Chromium: apt install chromium, or playwright install chromium")
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        opened = running.chromium.launch(executable_path=found, args=quiet)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, each with the text of its graph."""
    from awqc.page.evaluation import Measured

    graphs = {
        f"net.blocks.{i}": LayerGraph(
            edges=[(f"net.blocks.{i}.attn.v.weight", f"net.blocks.{i}.attn.o.weight", "softmax")],
            diff=[
                f" norm_{i}: f32[4, 128] = aten.mul(x_{i}, net.blocks.{i}.norm.weight)",
                f"-q_{i}: f32[4, 128] = aten.linear(norm_{i}, net.blocks.{i}.attn.q.weight)",
                f"+q_{i}: f32[4, 128] = awqc.qlinear(norm_{i}, net.blocks.{i}.attn.q.codes)",
            ],
        )
        for i in range(3)
    }
    file = tmp_path_factory.mktemp("page") / "report.html"
    measured = [Measured("text.txt", 1000, 40.6, 40.29, 0.0191, 0.913)]
    file.write_text(render(synthetic(3), "a model & <its> report", measured, graphs), encoding="utf-8")
    return file


@pytest.fixture(params=[390, 1440], ids=["phone", "desktop"])
def width(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def page(browser: Any, page_file: Path, width: int) -> Iterator[Any]:
    """The page, opened; it must ask for nothing and complain of nothing."""
    size = {"width": width, "height": 900}
    # Without motion, so that nothing moves on while it is clicked.
    context = browser.new_context(viewport=size, color_scheme="light", reduced_motion="reduce")
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(page_file.as_uri())
    yield opened
    context.close()
    assert wrong == []
    assert [url for url in asked if not url.startswith("data:")] == [page_file.as_uri()]
