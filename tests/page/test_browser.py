"""The page as a person uses it, at the width of a phone and of a desk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from awqc.page.costs import read_costs
from awqc.page.graphs import LayerGraph
from awqc.page.render import render
from tests.page.reports import synthetic
from tests.page.test_costs import document, written

CELLS = "#heat rect.cell"


def names(page: Any) -> list[str]:
    return [text.replace("\n", "") for text in page.locator("#table tbody .name").all_inner_texts()]


def open_text(page: Any) -> None:
    """Browsers say that it has opened a moment after it has."""
    page.locator("#text summary").click()
    page.locator("#text-lines div").first.wait_for()


def test_it_fits_its_window_and_says_what_it_is_about(page: Any, width: int) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.inner_text("h1") == "a model & <its> report"
    figures = page.inner_text(".figures")
    for text in ("3.10 kB", "40.60", "0.0191 nats", "same first token in 91.3%"):
        assert text in figures.replace("\N{NO-BREAK SPACE}", " ")


def test_every_pass_has_its_seconds(page: Any) -> None:
    rows = page.locator(".steps li").all()
    found = {row.locator(".name").inner_text(): row.locator(".seconds").inner_text() for row in rows}
    assert found == {
        "capture": "2.00 s",
        "canonicalize": "10.0 ms",
        "calibrate": "5.50 s",
        "their-own": "0.50 s",
    }


def test_the_heat_map_has_a_cell_for_each_linear_before_and_after(page: Any) -> None:
    assert page.locator(CELLS).count() == 2 * 3 * 6
    report = synthetic(3)
    row = report.linears["net.blocks.1.attn.q.weight"]
    label = page.locator('[aria-label^="net.blocks.1, attn.q, as stored"]').get_attribute("aria-label")
    assert row.error is not None
    assert float(label.rpartition(" ")[2].rstrip("%")) / 100 == pytest.approx(row.error, rel=0.05)


def test_a_click_on_a_cell_chooses_its_layer(page: Any) -> None:
    page.locator('[aria-label^="net.blocks.2, attn.o, as stored"]').click()
    assert page.locator("#layer-choice option:checked").inner_text() == "net.blocks.2"
    assert page.inner_text("#detail h3") == "net.blocks.2.attn.o"
    assert page.locator("#heat .chosen").count() == 2


def test_cells_can_be_clicked_one_after_the_other(page: Any) -> None:
    """No tip stays in the way."""
    for layer, kind in ((0, "attn.k"), (0, "attn.v"), (1, "attn.k"), (1, "attn.q"), (0, "attn.q")):
        page.locator(f'[aria-label^="net.blocks.{layer}, {kind}, as stored"]').click(timeout=5000)
        assert page.inner_text("#detail h3") == f"net.blocks.{layer}.{kind}"


def test_cells_are_walked_with_arrow_keys(page: Any, width: int) -> None:
    assert page.locator(f'{CELLS}[tabindex="0"]').count() == 1
    page.locator(f'{CELLS}[tabindex="0"]').focus()
    page.keyboard.press("ArrowRight" if width == 1440 else "ArrowDown")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith(
        "net.blocks.1, attn.q"
    )
    page.keyboard.press("Enter")
    assert page.inner_text("#detail h3") == "net.blocks.1.attn.q"


def test_from_the_upper_map_down_into_the_lower(page: Any, width: int) -> None:
    page.locator('[aria-label^="net.blocks.0, mlp.down, rounded"]').focus()
    page.keyboard.press("ArrowDown" if width == 1440 else "ArrowRight")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith(
        "net.blocks.0, attn.q, as stored"
    )


def test_a_layer_is_drawn_as_a_graph(page: Any) -> None:
    boxes = {box.get_attribute("data-kind") for box in page.locator("#flow .box").all()}
    assert boxes == {"norm", "attn.q", "attn.k", "attn.v", "attn.o", "norm2", "mlp.up", "mlp.down"}
    assert page.locator("#flow path.edge").count() == 3 + 1 + 1
    assert page.locator("#flow .edge-label").all_text_contents() == ["softmax"]


def test_boxes_open_with_the_keyboard(page: Any) -> None:
    page.locator('#flow [data-kind="norm"]').focus()
    page.keyboard.press("Enter")
    assert page.inner_text("#detail h3") == "net.blocks.0.norm"
    assert "activation, ratio 0.3" in page.inner_text("#detail")
    assert page.locator('#detail svg[aria-label^="Search loss"] circle').count() == 11 + 1
    assert page.evaluate("document.activeElement.dataset.kind") == "norm"


def test_a_linear_without_a_group_says_why(page: Any) -> None:
    page.locator('#flow [data-kind="mlp.down"]').click()
    assert "aten.gelu lets no scale through" in page.inner_text("#detail")


def test_layers_are_turned_like_pages(page: Any) -> None:
    page.locator("#layer-next").click()
    page.locator("#layer-next").click()
    assert page.locator("#layer-choice option:checked").inner_text() == "net.blocks.2"
    assert page.locator("#layer-next").is_disabled()
    page.locator("#layer-choice").select_option(label="outside of the layers")
    assert page.inner_text("#detail h3") == "head"
    assert "computes the model's output" in page.inner_text("#detail")


def test_the_difference_of_a_layer_opens(page: Any) -> None:
    open_text(page)
    assert page.locator("#text-lines .del").all_text_contents() == [
        "\N{MINUS SIGN}\N{NO-BREAK SPACE}q_0: f32[4, 128] = aten.linear(norm_0, net.blocks.0.attn.q.weight)"
    ]
    assert page.locator("#text-lines .add").count() == 1
    page.get_by_text("After", exact=True).click()
    assert page.locator("#text-lines div").all_text_contents() == [
        "norm_0: f32[4, 128] = aten.mul(x_0, net.blocks.0.norm.weight)",
        "q_0: f32[4, 128] = awqc.qlinear(norm_0, net.blocks.0.attn.q.codes)",
    ]
    page.locator("#layer-next").click()
    assert "q_1" in page.inner_text("#text-lines")


def test_lines_of_the_chosen_box_are_marked_and_no_others(page: Any) -> None:
    open_text(page)
    assert page.locator("#text-lines .about").count() == 2
    page.locator('#flow [data-kind="norm"]').click()
    assert page.locator("#text-lines .about").all_text_contents() == [
        " \N{NO-BREAK SPACE}norm_0: f32[4, 128] = aten.mul(x_0, net.blocks.0.norm.weight)"
    ]


def test_the_table_sorts(page: Any) -> None:
    in_order = names(page)
    assert in_order[:2] == ["net.blocks.0.attn.q", "net.blocks.0.attn.k"]
    report = synthetic(3)
    by_error = sorted(report.quantized(), key=lambda row: -(row.error or 0))
    heading = page.locator("th").get_by_role("button", name="Stored")
    heading.click()
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    assert names(page) == [*(row.name for row in by_error), "head"]
    heading.click()
    assert names(page) == [*(row.name for row in reversed(by_error)), "head"]
    heading.click()
    assert names(page) == in_order
    assert page.locator("th[aria-sort]").count() == 0


def test_the_table_is_searched_and_filtered(page: Any) -> None:
    page.locator("#search").fill("blocks.1 ATTN")
    assert names(page) == [f"net.blocks.1.attn.{part}" for part in "qkvo"]
    assert page.inner_text("#page-range") == "1–4 of 4 linears"
    page.locator("#search").fill("gelu")
    assert names(page) == [f"net.blocks.{i}.mlp.down" for i in range(3)]
    page.locator("#search").fill("nothing like it")
    assert page.inner_text("#page-range") == "No linear matches"
    page.locator("#search").fill("")
    page.locator("#decision").select_option("kept")
    assert names(page) == ["head"]


def test_a_row_opens_and_leads_to_its_layer(page: Any) -> None:
    page.locator("#table tbody .name").nth(7).click()
    more = page.locator("tr.more")
    assert "compensated" in more.inner_text()
    more.get_by_role("button", name="Show in net.blocks.1").click()
    assert page.inner_text("#detail h3") == "net.blocks.1.attn.k"
    page.locator("#table tbody .name").nth(7).click()
    assert page.locator("tr.more").count() == 0


def test_dark_is_what_the_system_prefers_until_somebody_chooses(page: Any) -> None:
    def paper() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    def cell() -> str:
        return str(page.evaluate(f"getComputedStyle(document.querySelector('{CELLS}')).fill"))

    assert paper() == "rgb(251, 250, 247)"
    light = cell()
    page.emulate_media(color_scheme="dark")
    assert paper() == "rgb(21, 24, 27)"
    assert cell() != light
    page.wait_for_function("document.getElementById('theme').textContent == 'Switch to Light colours'")
    page.locator("#theme").click()
    assert paper() == "rgb(251, 250, 247)"
    assert cell() == light
    assert page.locator("#theme").text_content() == "Switch to Dark colours"


def test_the_keyboard_reaches_everything_in_the_order_of_the_page(page: Any) -> None:
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "document.activeElement.closest('header, section')?.id ?? document.activeElement.className"
            )
        )
        if reached[-1] == "facts":
            break
    assert list(dict.fromkeys(reached)) == ["skip", "", "error", "layer", "linears", "facts"]
    # One stop for the whole heat map.
    assert reached.count("error") == 1


def test_everything_that_is_used_has_a_name(page: Any) -> None:
    unnamed = page.evaluate(
        """[...document.querySelectorAll("button, select, input, [role=button], [role=region]")].filter((e) =>
        !(e.getAttribute("aria-label") || e.getAttribute("aria-labelledby") || e.labels?.length ||
          e.textContent.trim())).map((e) => e.outerHTML)"""
    )
    assert unnamed == []


def test_many_rows_are_shown_a_page_at_a_time(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "mixture.html"
    file.write_text(render(synthetic(4, experts=128), "a mixture"), encoding="utf-8")
    page = browser.new_page()
    page.goto(file.as_uri())
    assert page.inner_text("#page-range") == "1–25 of 1,553 linears"
    assert page.locator("#table tbody tr").count() == 25
    # Experts of a kind are one cell, and one box.
    assert page.locator(CELLS).count() == 2 * 4 * 7
    assert "×128" in page.text_content('#flow [data-kind="moe.experts.*.down"]')
    page.locator('#flow [data-kind="moe.experts.*.down"]').click()
    assert "Largest errors" in page.inner_text("#detail")
    page.locator("#page-next").click()
    assert page.inner_text("#page-range") == "26–50 of 1,553 linears"
    page.close()


def test_a_report_without_anything_opens(browser: Any, tmp_path: Path) -> None:
    from awqc.report import Report

    file = tmp_path / "empty.html"
    file.write_text(render(Report(), "nothing"), encoding="utf-8")
    page = browser.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(file.as_uri())
    assert page.locator("#linears").is_hidden()
    assert wrong == []
    page.close()


def test_a_bias_is_in_the_box_of_its_linear_and_experts_show_their_tokens(
    browser: Any, tmp_path: Path
) -> None:
    report = synthetic(2)
    row = report.linears["net.blocks.0.mlp.up.weight"]
    row.expert_count, row.expert_tokens, row.borrowing = 4, [40, 30, 20, 3], 1
    graphs = {
        "net.blocks.0": LayerGraph(
            edges=[("net.blocks.0.attn.v.bias", "net.blocks.0.attn.o.weight", "softmax")]
        )
    }
    file = tmp_path / "experts.html"
    file.write_text(render(report, "experts", graphs=graphs), encoding="utf-8")
    page = browser.new_page()
    page.goto(file.as_uri())
    assert page.locator('#flow [data-kind="attn.v.bias"]').count() == 0
    assert "×4" in page.text_content('#flow [data-kind="mlp.up"]')
    page.locator('#flow [data-kind="mlp.up"]').click()
    bars = page.locator('#detail svg[aria-label="Calibration tokens of 4 experts: 3 to 40"] rect')
    heights = [float(bar.get_attribute("height")) for bar in bars.all()]
    assert heights == sorted(heights, reverse=True)
    assert heights[3] / heights[0] == pytest.approx(3 / 40, abs=0.03)
    assert "4 of 128 × 256" in page.inner_text("#detail")
    page.close()


def test_times_are_shown_at_any_width(browser: Any, tmp_path: Path, width: int) -> None:
    """Stages and nodes; the widest kernel's name does not push the page out of its window."""
    costs = read_costs(written(tmp_path, document()))
    file = tmp_path / "times.html"
    file.write_text(render(synthetic(2), "a model", costs=costs), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("#time table").count() == 2
    assert "up 2" in " ".join(page.inner_text("#time").split()) or width < 641
    assert "66.7%" in page.inner_text("#time")
    assert page.locator("#time .wide").first.is_visible() == (width > 640)
    page.locator('nav a[href="#time"]').click()
    page.close()
