"""The page in a real Chromium, and what must hold of its text before any browser sees it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect, sync_playwright

from sdpo_conformance import run
from sdpo_conformance.matrix.single import single_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, headless."""
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH, so the page is tested in no browser: apt-get install chromium")
    with sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


class Opened:
    """A page with what it logged and asked the network for."""

    def __init__(self, browser: Any, path: Path, address: str = "", **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self.page = self.context.new_page()
        self.trouble: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri() + address)

    def cell(self, id: str, name: str) -> Any:
        return self.page.locator(f'button.cell[aria-label^="{id}, {name}:"]')

    def focused(self) -> str:
        label: str = self.page.evaluate("document.activeElement.getAttribute('aria-label') || ''")
        return label

    def shown_ids(self) -> list[str]:
        ids: list[str] = self.page.eval_on_selector_all(
            "tr[data-id]", "rows => rows.filter(row => row.offsetParent).map(row => row.dataset.id)"
        )
        return ids


@pytest.fixture
def opened(browser: Any, full_page: Path) -> Iterator[Any]:
    pages: list[Opened] = []

    def call(address: str = "", **context: Any) -> Opened:
        pages.append(Opened(browser, full_page, address, **context))
        return pages[-1]

    yield call
    for one in pages:
        trouble = one.trouble
        one.context.close()
        assert trouble == []


def test_the_page_names_nothing_outside_itself(full_page: Path) -> None:
    text = full_page.read_text(encoding="utf-8")
    markup = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.S)
    assert not re.search(r"""(src|href|action)\s*=\s*["']?(https?:|//)|@import|url\(""", markup)
    assert text.count("<script") == 2, "the data and the one program"
    assert "default-src 'none'" in text


def test_it_is_self_contained_and_hostile_text_stays_text(opened: Any) -> None:
    one = opened()
    assert one.requests == [one.page.url]
    assert one.page.title() == "SDPO conformance matrix"
    one.page.locator("button.head").last.click()
    one.page.keyboard.press("Escape")
    one.page.locator('tr[data-id="IS-2"] .cell').last.click()
    assert "<img src=x" in one.page.locator("dialog .expected").inner_text()
    assert one.page.locator("img").count() == 0
    assert one.page.title() == "SDPO conformance matrix"


def test_every_status_is_on_the_page_with_a_sign_of_its_own(opened: Any) -> None:
    one = opened()
    signs = one.page.eval_on_selector_all(
        "button.cell", "cells => Object.fromEntries(cells.map(cell => [cell.dataset.status, cell.textContent]))"
    )
    assert set(signs) == {
        "passed",
        "failed",
        "expected failure",
        "unexpected pass",
        "not judged",
        "not offered",
        "not installed",
        "could not run",
        "internal error",
    }
    assert len(set(signs.values())) == len(signs)


def test_a_failed_cell_opens_example_diagnosis_and_reproduction(opened: Any) -> None:
    one = opened()
    one.cell("IS-2", "mypkg.loss").click()
    dialog = one.page.locator("dialog")
    text = dialog.inner_text()
    assert dialog.locator(".expected").inner_text() == "0.33847"
    assert dialog.locator(".got").inner_text() == "0.06769"
    assert "B=1 T=2 V=4 K=2" in text
    assert "dropped-importance-sampling" in text
    assert 'print("shows it")' in text
    with one.page.expect_download() as saved:
        dialog.get_by_role("button", name="save IS-2.py").click()
    assert Path(saved.value.path()).read_text() == '"""IS-2"""\nprint("shows it")\n'
    with one.page.expect_download() as saved:
        dialog.get_by_role("button", name="save IS-2.safetensors").click()
    assert Path(saved.value.path()).read_bytes() == b"\x00\x01\x02"
    assert saved.value.suggested_filename == "IS-2.safetensors"


def test_a_head_opens_the_run(opened: Any) -> None:
    one = opened()
    head = one.page.get_by_role("button", name="mypkg.loss").first
    assert "dropped-importance-sampling" in head.inner_text()
    head.click()
    text = one.page.locator("dialog").inner_text()
    for words in ("mypkg 1.2.3", "NOT CONFORMING", "profile quick, seed 0", "torch 2.13.0", "float16: it says so"):
        assert words in text
    one.page.keyboard.press("Escape")
    one.page.get_by_role("button", name="adapters.gone").first.click()
    assert "pip install gone" in one.page.locator("dialog").inner_text()


def test_filters(opened: Any) -> None:
    one = opened()
    everything = one.shown_ids()
    one.page.get_by_label("family").select_option("IS")
    assert {id.rsplit("-", 1)[0] for id in one.shown_ids()} == {"IS"}
    one.page.get_by_role("checkbox", name="failed", exact=False).first.check()
    assert one.shown_ids() == ["IS-2", "IS-6"]
    assert one.page.get_by_role("status").inner_text() == f"2 of {len(everything)} requirements"
    assert "aside" in (one.cell("IS-2", "reference").get_attribute("class") or "")
    one.page.get_by_label("family").select_option("")
    one.page.get_by_label("level").select_option("SHOULD")
    assert one.shown_ids() == ["NUM-8"]
    assert one.page.url.endswith("#level=SHOULD&status=failed")
    one.page.get_by_label("family").select_option("LP")
    assert one.shown_ids() == []
    assert one.page.get_by_text("No requirement matches").is_visible()
    one.page.get_by_role("button", name="reset").click()
    expect(one.page.locator(".shown")).to_have_text("")  # the page's policy allows no evaluated wait
    assert one.shown_ids() == everything


def test_an_address_brings_filters_and_cell_back(opened: Any) -> None:
    one = opened("#family=IS&status=failed&cell=IS-2%40mypkg.loss")
    assert one.page.locator("dialog h2").inner_text() == "IS-2 · mypkg.loss"
    one.page.keyboard.press("Escape")
    assert one.shown_ids() == ["IS-2", "IS-6"]
    assert one.focused().startswith("IS-2, mypkg.loss")
    assert one.page.url.endswith("#family=IS&status=failed")


@pytest.mark.parametrize("address", ["#family=nothing&level=x&cell=IS-2%40nobody", "#cell=%5D%22&status=odd", "#%%%"])
def test_an_address_that_names_nothing_shows_everything(opened: Any, address: str) -> None:
    one = opened(address)
    assert len(one.shown_ids()) == one.page.locator("tr[data-id]").count()
    assert not one.page.locator("dialog").is_visible()


def test_by_keyboard_alone(opened: Any) -> None:
    one = opened()
    assert one.page.eval_on_selector_all("table button[tabindex='0']", "found => found.length") == 1
    for _ in range(40):
        one.page.keyboard.press("Tab")
        if one.focused().startswith("GJS-1, reference"):
            break
    assert one.focused().startswith("GJS-1, reference")
    one.page.keyboard.press("ArrowRight")
    assert one.focused().startswith("GJS-1, mypkg.loss")
    for key in ("ArrowDown", "ArrowDown", "ArrowUp"):
        one.page.keyboard.press(key)
    assert one.focused().startswith("GJS-2, mypkg.loss")
    one.page.keyboard.press("Enter")
    assert one.page.locator("dialog h2").inner_text() == "GJS-2 · mypkg.loss"
    one.page.keyboard.press("Escape")
    assert one.focused().startswith("GJS-2, mypkg.loss")
    one.page.keyboard.press("End")
    assert one.focused().startswith("GJS-2, hostile")
    one.page.keyboard.press("Control+Home")
    assert one.page.evaluate("document.activeElement.className").startswith("head")
    one.page.keyboard.press("ArrowDown")
    assert one.page.evaluate("document.activeElement.className") == "fold"
    one.page.keyboard.press("Enter")
    assert "GJS-1" not in one.shown_ids()
    one.page.keyboard.press("ArrowDown")
    one.page.keyboard.press("ArrowDown")
    assert one.focused().startswith("RKL-1, reference")


def test_the_focused_cell_is_not_hidden_behind_the_sticky_edges(opened: Any) -> None:
    one = opened(viewport={"width": 390, "height": 700})
    one.cell("GJS-1", "reference").focus()
    for key in ["ArrowDown"] * 60 + ["ArrowUp"] * 30 + ["ArrowRight"] * 6 + ["ArrowLeft"] * 3:
        one.page.keyboard.press(key)
        covered = one.page.evaluate(
            """() => { const box = document.activeElement.getBoundingClientRect();
            const top = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
            return !document.activeElement.contains(top); }"""
        )
        assert not covered, one.focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_text_can_be_read(opened: Any, scheme: str, width: int) -> None:
    """WCAG AA: 4.5 to 1 for every text on what is really behind it."""
    one = opened(color_scheme=scheme, viewport={"width": width, "height": 800})
    one.cell("IS-2", "mypkg.loss").click()
    poor = one.page.evaluate(CONTRAST)
    assert poor == []


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92
    : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => { for (let at = element; at; at = at.parentElement) {
    const color = rgba(getComputedStyle(at).backgroundColor); if (color[3] === 255) return color; }
    return [255, 255, 255]; };
  const poor = new Set();
  for (const element of document.querySelectorAll("body *")) {
    if (!element.offsetParent || element.closest(".aside")) continue;
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || !parseFloat(getComputedStyle(element).fontSize)) continue;
    const [a, b] = [light(rgba(getComputedStyle(element).color)), light(behind(element))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.add(element.className + ": " + element.textContent.slice(0, 30));
  }
  return [...poor];
}"""


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run of a loss that drops the ratio, with hostile text in its name."""
    folder = tmp_path_factory.mktemp("single")
    report = run("defect:dropped-importance-sampling", profile="quick", only=["IS-2"], jobs=1, out=folder / "run")
    hostile = {**report.results, "implementation": "<script>alert(1)</script>"}
    hostile["diagnosis"] = {**hostile["diagnosis"], "lines": ["<img src=x onerror=alert(1)>"]}
    page = folder / "page.html"
    page.write_text(single_page(hostile, report.folder), encoding="utf-8")
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_one_run_says_its_verdict_and_shows_the_tensors(
    browser: Any, single: Path, width: int, scheme: Any
) -> None:
    shown = Opened(browser, single, viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = shown.page
    assert page.evaluate(CONTRAST) == []
    expect(page.get_by_role("region", name="Verdict")).to_contain_text("NOT CONFORMING to CLaaS 1.0: ")
    expect(page.get_by_role("region", name="Verdict")).to_contain_text("<img src=x onerror=alert(1)>")
    rows = page.get_by_role("region", name="Tensors").locator("details[open] tbody tr")
    wrong = rows.filter(has_text="✗").locator("th").all_inner_texts()
    assert "distill_loss" in wrong
    assert "kl_reg" not in wrong
    ratio = rows.filter(has_text="importance ratio r").locator("td").nth(1)
    assert 0 < float(ratio.inner_text()) <= 5
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    overlapping = page.evaluate(
        "[...document.querySelectorAll('.tensors details[open] tr')].filter(row => [...row.cells].some("
        "cell => cell.scrollWidth > cell.clientWidth + 1)).length"
    )
    assert overlapping == 0
    assert shown.trouble == []
    shown.context.close()


@pytest.mark.parametrize("width", [320, 390, 800])
def test_a_narrow_window_scrolls_the_table_not_the_page(opened: Any, width: int) -> None:
    one = opened(viewport={"width": width, "height": 740})
    assert one.page.evaluate("document.documentElement.scrollWidth") <= width
    one.cell("IS-2", "mypkg.loss").click()
    box = one.page.locator("dialog").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert one.page.evaluate("document.querySelector('dialog').scrollWidth") <= width


def test_without_script_the_table_still_tells(opened: Any) -> None:
    one = opened(java_script_enabled=False)
    assert one.page.locator("button.cell.failed").count() >= 3
    assert one.page.get_by_text("everything is in matrix.json").is_visible()
    assert not one.page.locator("form.filters").is_visible()
