"""How long the page of a very large report takes to be there: ``python benchmarks/page.py``.

80 layers with 416 experts each: 100,161 linears, 33,520 scale groups. Needs playwright and a Chromium.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))

from awqc.page import render
from tests.page.reports import synthetic

#: From the beginning of the navigation to the end of the load event, in milliseconds.
LOADED = "performance.getEntriesByType('navigation')[0].loadEventEnd"
SEARCH = """() => {
    const search = document.getElementById("search"), start = performance.now();
    search.value = "experts 12";
    search.dispatchEvent(new Event("input"));
    return performance.now() - start;
}"""
SORT = """() => {
    const start = performance.now();
    document.querySelectorAll("th button")[4].click();
    return performance.now() - start;
}"""


def main(layers: int = 80, experts: int = 416, repeats: int = 3) -> None:
    """Render once, load a few times, and print the best of each."""
    report = synthetic(layers, experts)
    start = time.perf_counter()
    page = render(report, "A very large mixture")
    rendered = time.perf_counter() - start
    times = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as running:
        file = Path(folder) / "page.html"
        file.write_text(page, encoding="utf-8")
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(repeats):
            tab = browser.new_page(viewport={"width": 1440, "height": 900})
            tab.goto(file.as_uri())
            times.append([tab.evaluate(what) for what in (LOADED, SEARCH, SORT)])
            tab.close()
        browser.close()
    loaded, search, sort = (min(column) for column in zip(*times, strict=True))
    print(f"{len(report.linears):,} linears, {len(report.groups):,} groups: {len(page) / 1e6:.1f} MB")
    print(f"written in {rendered:.1f} s, loaded in {loaded / 1e3:.2f} s")
    print(f"first search {search:.0f} ms, sort {sort:.0f} ms")


if __name__ == "__main__":
    main()
