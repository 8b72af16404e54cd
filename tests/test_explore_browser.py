"""The explorer's page, as a person meets it: in a real browser, with eyes, keyboard and screen reader."""

from __future__ import annotations

import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

import doubles
from genembed import Budget, ConvergeStop, Embedder, Pooling, load
from genembed.index import Index, Passage
from genembed.serve.app import create_app
from genembed.serve.explore import Exploration, explore
from genembed.serve.limits import Limits
from genembed.serve.service import Service

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
KEY = "a-key"
TEXT = "What is a business trip?"
PASSAGES = [
    Passage(text, text.replace(" ", "-"), f"about {text}")
    for text in ("business trips", "fasting glucose", "a stitch in time", "the language of models", "a claim", "x", "step by step")
]
RULE = ConvergeStop(threshold=0.98, max_steps=6)
INSTRUCTION = "Find similar texts."
DESKTOP, PHONE = {"width": 1200, "height": 900}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def models(folder_of: Callable[[str], Path]) -> dict[str, Embedder]:
    preset = replace(doubles.PREFIX, halt=RULE, pooling=Pooling(kind="mean", prompt_weight=0.1))  # its vectors move
    budget = Budget(pack_weights=False)
    return {
        "first": load(folder_of("bert"), preset=preset, dtype="float64", budget=budget),
        "second": load(folder_of("qwen2"), dtype="float64", budget=budget),
    }


@pytest.fixture(scope="module")
def index(models: dict[str, Embedder], tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index.build(tmp_path_factory.mktemp("index") / "texts", models["first"], PASSAGES)


@contextmanager
def served(models: dict[str, Embedder], index: Index | None, api_key: str | None = None) -> Iterator[str]:
    """Serve the first model and the others beside it, and yield the address."""
    service = Service(models["first"], name="first", limits=Limits(batch_tokens=512, request_bytes=8192, steps=6))
    also = {name: model for name, model in models.items() if name != "first"}
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(service, api_key=api_key, grace=5.0, also=also, index=index), log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="module")
def address(models: dict[str, Embedder], index: Index) -> Iterator[str]:
    with served(models, index) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no browser to look at the page with: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def looking(browser: Browser, address: str, **emulated: Any) -> Iterator[Page]:
    """Open the page in a fresh profile, and fail if it complains or asks anybody else for anything."""
    context = browser.new_context(**({"viewport": DESKTOP} | emulated))
    page = context.new_page()
    asked, complaints = list[str](), list[str]()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    try:
        yield page
    finally:
        context.close()
    assert [url for url in asked if not url.startswith(address)] == []
    assert [text for text in complaints if "status of 4" not in text] == []


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with looking(browser, address) as page:
        yield page


def run(page: Page, text: str = TEXT, instruction: str = "") -> None:
    expect(page.locator("footer")).to_contain_text("first: 32 dimensions")
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_label("Instruction").first.fill(instruction)
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("status")).to_contain_text("Done", timeout=30_000)


def part(page: Page, title: str) -> Locator:
    return page.locator("section.part").filter(has=page.get_by_role("heading", name=title))


def seen(models: dict[str, Embedder], index: Index | None, instruction: str | None = None, name: str = "first") -> Exploration:
    return explore(models[name], TEXT, instruction, 6, 5, index, 3)


def test_the_soft_tokens_stand_there_step_by_step_with_their_weights(page: Page, models: dict[str, Embedder]) -> None:
    run(page)
    rows = page.get_by_role("table", name="Likeliest tokens").locator("tbody tr")
    steps = seen(models, None).steps[1:]
    expect(rows).to_have_count(len(steps))
    for row, step in enumerate(steps):
        tokens = [word.token.strip() or f'"{word.token}"' for word in step.spoken]
        assert rows.nth(row).locator(".token").all_inner_texts() == tokens
        assert rows.nth(row).locator(".share").all_inner_texts() == [f"{word.probability:.3f}" for word in step.spoken]
        bars = rows.nth(row).locator(".bar").evaluate_all("bars => bars.map(bar => parseFloat(getComputedStyle(bar, '::before').width))")
        assert bars == sorted(bars, reverse=True)
        assert bars[0] > 0


def test_the_tokens_of_a_step_share_the_width_of_their_table(page: Page) -> None:
    """Five of them stood in the left half of it, and long ones were broken into two lines."""
    run(page)
    table, last = (page.locator(where).first.bounding_box() for where in (".tokens", ".tokens li:last-child"))
    assert table is not None
    assert last is not None
    assert abs(table["x"] + table["width"] - last["x"] - last["width"]) < 2


def test_the_curve_says_what_its_table_says(page: Page, models: dict[str, Embedder]) -> None:
    run(page)
    known = seen(models, None)
    assert known.halted is not None
    stability = part(page, "Stability")
    expect(stability.get_by_role("img", name=f"The model halts at step {known.halted} of 6")).to_be_visible()
    expect(stability.get_by_text(f"halts at {known.halted}", exact=True)).to_be_visible()
    expect(stability.get_by_text("threshold 0.98", exact=True)).to_be_visible()
    table = page.get_by_role("table", name="Cosine of consecutive embeddings")
    expect(table).to_be_hidden()
    stability.get_by_text("The values as a table").click()
    cells = [row.locator("td").all_inner_texts() for row in table.locator("tbody tr").all()]
    for cell, step in zip(cells, known.steps[2:], strict=True):
        assert step.stability is not None
        assert float(cell[0]) == pytest.approx(step.stability, abs=6e-4)
        assert cell[1] == ("yes" if step.stability >= RULE.threshold else "no")
    expect(table.locator("tr.halted th")).to_have_text(re.compile(rf"{known.halted}\s*halts"))
    above = stability.locator("circle.stable").count()
    assert above == sum((step.stability or 0) >= RULE.threshold for step in known.steps)


def test_points_above_the_threshold_are_drawn_above_its_line(page: Page) -> None:
    run(page)
    line = float(page.locator("line.threshold").get_attribute("y1") or 0)
    for point in page.locator("circle.point").all():
        stable = "stable" in (point.get_attribute("class") or "").split()
        assert (float(point.get_attribute("cy") or 0) <= line) == stable


def test_the_cost_is_said_in_operations_and_passes(page: Page, models: dict[str, Embedder]) -> None:
    run(page)
    known = seen(models, None)
    whole, end = known.steps[0].operations, known.steps[6].operations
    assert whole is not None
    assert end is not None
    line = page.locator(".cost")
    expect(line).to_contain_text(f"{known.tokens} prompt tokens; 6 steps: {end / 1e3:.0f} kFLOP, {end / whole:.2f} passes")
    expect(line).to_contain_text(f"halted at {known.halted}: ")


def test_the_nearest_passages_are_shown_with_a_mark_for_what_changed(page: Page, models: dict[str, Embedder], index: Index) -> None:
    run(page, instruction=INSTRUCTION)
    orders = [[hit.reference for hit in step.hits or ()] for step in seen(models, index, INSTRUCTION).steps]
    groups = [order for k, order in enumerate(orders) if k == 0 or order != orders[k - 1]]
    assert len(groups) > 1, "the double has to change its mind for this test"
    items = page.locator(".found > li")
    expect(items).to_have_count(len(groups))
    for place, order in enumerate(groups):
        names = items.nth(place).locator(".name").all_inner_texts()
        for name, reference in zip(names, order, strict=True):
            before = groups[place - 1] if place else order
            mark = "new" if reference not in before else ""
            was = before.index(reference) - order.index(reference) if reference in before else 0
            mark = f"{'up' if was > 0 else 'down'} from {before.index(reference) + 1}" if was else mark
            assert name.split() == [reference, *mark.split()]


def test_two_instructions_stand_side_by_side(page: Page) -> None:
    page.get_by_label("Compare with a second reading").check()
    page.get_by_label("Instruction").nth(1).fill(INSTRUCTION)
    page.get_by_label("Model").nth(1).select_option("first")
    run(page)
    titles = page.get_by_role("article").get_by_role("heading", level=2)
    expect(titles).to_have_text(["First reading: first, read bare", f"Second reading: first, {INSTRUCTION}"])
    first, second = (page.get_by_role("article").nth(place).bounding_box() for place in (0, 1))
    assert first is not None
    assert second is not None
    assert (first["y"], first["width"]) == (second["y"], second["width"])
    assert first["x"] + first["width"] < second["x"]
    said = [page.get_by_role("article").nth(place).locator(".phases li").all_inner_texts() for place in (0, 1)]
    own = [page.get_by_role("article").nth(place).locator(".phases li.own").all_inner_texts() for place in (0, 1)]
    assert own == [[token for token in said[0] if token not in said[1]], [token for token in said[1] if token not in said[0]]]
    assert own != [[], []]


def test_two_models_stand_side_by_side(page: Page, models: dict[str, Embedder]) -> None:
    page.get_by_label("Compare with a second reading").check()
    expect(page.get_by_label("Model").nth(1)).to_have_value("second")
    run(page)
    second = page.get_by_role("article").nth(1)
    expect(second.get_by_role("heading", level=2)).to_have_text("Second reading: second, read bare")
    known = seen(models, None, name="second").steps[1].spoken
    assert second.locator("tr .tokens").first.locator(".token").all_inner_texts() == [
        word.token.strip() or f'"{word.token}"' for word in known
    ]
    expect(second).to_contain_text("The index was made by first: its vectors do not compare with those of second.")


def test_without_an_index_the_page_says_how_to_get_one(browser: Browser, models: dict[str, Embedder]) -> None:
    with served({"first": models["first"]}, None) as address, looking(browser, address) as page:
        expect(page.locator("#model-a")).to_be_hidden()
        run(page)
        expect(part(page, "Nearest passages")).to_contain_text("start the server with --index")


def test_a_server_with_a_key_asks_for_it_and_takes_no_other(browser: Browser, models: dict[str, Embedder]) -> None:
    with served({"first": models["first"]}, None, api_key=KEY) as address, looking(browser, address) as page:
        field = page.get_by_label("Key of this server")
        expect(field).to_be_focused()
        expect(page.get_by_role("alert")).to_have_text("This server asks for a key.")
        page.keyboard.type("another")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("That is not the key of this server.")
        field.fill(KEY)
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_contain_text("The model halts at step", timeout=30_000)
        expect(field).to_be_hidden()
        expect(page.get_by_role("alert")).to_be_empty()


def test_all_of_it_can_be_done_from_the_keyboard_and_the_focus_is_seen(page: Page) -> None:
    expect(page.locator("footer")).to_contain_text("first: 32 dimensions")
    reached = []
    for _ in range(6):
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        reached.append(focused.get_attribute("id") or focused.inner_text())
        assert focused.evaluate("one => parseFloat(getComputedStyle(one).outlineWidth)") >= 2
    assert reached == ["text", "model-a", "instruction-a", "compare", "steps", "Run"]
    page.get_by_label("Text", exact=True).focus()
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status")).to_contain_text("The model halts at step", timeout=30_000)
    expect(page.get_by_label("Text", exact=True)).to_be_focused()


def test_a_refusal_is_announced_in_the_servers_words(page: Page) -> None:
    expect(page.locator("footer")).to_contain_text("first: 32 dimensions")
    page.get_by_label("Text", exact=True).fill("a" * 10_000)
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_have_text("the request is longer than 8192 bytes; send several.")
    run(page)
    expect(page.get_by_role("alert")).to_be_empty()


def test_a_text_that_was_cut_is_said_to_be(page: Page) -> None:
    run(page, text=TEXT * 40)
    expect(page.get_by_role("article")).to_contain_text("The text was too long: it was cut to 64 tokens.")


def test_markup_is_shown_and_not_obeyed(page: Page) -> None:
    instruction = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>"
    run(page, instruction=instruction)
    expect(page.locator("h2 q")).to_have_text(instruction)
    assert page.locator("#results img, #results b").count() == 0
    assert page.title() == "genembed: what a model says to itself"


def test_a_phone_shows_one_column_and_nothing_to_the_right_of_it(browser: Browser, address: str) -> None:
    with looking(browser, address, viewport=PHONE, has_touch=True, is_mobile=True) as page:
        page.get_by_label("Compare with a second reading").check()
        run(page, instruction="A_very_long_word_" * 3)
        for summary in page.locator("summary").all():
            summary.click()
        assert page.locator("html").evaluate("one => one.scrollWidth") == PHONE["width"]
        first, second = (page.get_by_role("article").nth(place).bounding_box() for place in (0, 1))
        assert first is not None
        assert second is not None
        assert first["x"] == second["x"]
        assert second["y"] >= first["y"] + first["height"]
        button = page.get_by_role("button", name="Run").bounding_box()
        assert button is not None
        assert button["height"] >= 44


CONTRAST = """one => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => channels(colour).slice(0, 3).map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, place) => sum + value * [0.2126, 0.7152, 0.0722][place], 0);
  let behind = one;
  while (channels(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const pair = [luminance(getComputedStyle(one).color), luminance(getComputedStyle(behind).backgroundColor)].sort((a, b) => b - a);
  return (pair[0] + 0.05) / (pair[1] + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them_in_light_and_dark(scheme: Any, browser: Browser, address: str) -> None:
    with looking(browser, address, color_scheme=scheme, reduced_motion="reduce") as page:
        run(page, instruction=INSTRUCTION)
        background = page.locator("body").evaluate("one => getComputedStyle(one).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background))) < 384) == (scheme == "dark")
        for where in ("h1", "header p", "label", "button", ".hint", "#status", "h2", ".cost", ".cost strong", ".part > p", "summary"):
            assert page.locator(where).first.evaluate(CONTRAST) >= 4.5, where
        for where in (".badge", ".share", "tr.halted .token", "tr.halted .share", "tr.after .token", ".mark.new", ".score", ".summary"):
            assert page.locator(where).first.evaluate(CONTRAST) >= 4.5, where
        assert page.locator("button").evaluate("one => getComputedStyle(one).transitionDuration") == "0s"
