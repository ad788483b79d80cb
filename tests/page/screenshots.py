"""Screenshots of a page, for people to look at: ``python tests/page/screenshots.py PAGE.html FOLDER``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WINDOWS = {"desk": (1440, 1000), "phone": (390, 844)}
#: Where the window is scrolled to.
PARTS = {"overview": "h1", "error": "#error", "layer": "#layer", "linears": "#linears", "time": "#time"}


def main(page: Path, folder: Path) -> None:
    """Write ``WINDOW-SCHEME-PART.png`` for every window, light and dark."""
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for window, (width, height) in WINDOWS.items():
            for scheme in ("light", "dark"):
                size = {"width": width, "height": height}
                tab = browser.new_page(viewport=size, color_scheme=scheme, reduced_motion="reduce")
                tab.goto(page.absolute().as_uri())
                tab.locator("#text summary").click()
                tab.locator("#text-lines div").first.wait_for()
                for part, place in PARTS.items():
                    if not tab.locator(place).count():
                        continue  # a page without measured kernels has no times
                    tab.locator(place).evaluate(
                        "e => e.scrollIntoView()" if place != "h1" else "() => scrollTo(0, 0)"
                    )
                    tab.screenshot(path=folder / f"{window}-{scheme}-{part}.png")
                tab.close()
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
