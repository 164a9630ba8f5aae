"""The page in a real browser: it draws, cancels, is refused, survives a broken stream, and breaks
none of its rules.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from pipelines.serving.page import FILES, POLICY
from tests.helpers.one_process import FORBIDDEN, LONG, Platform
from tests.helpers.waiting import wait_until

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


expect.set_options(timeout=30_000)
PIXELS = """images => images.map(image => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL();
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: the page is not tried")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=QUIET)
        yield started
        started.close()


@dataclass
class Visit:
    """An open page, and what the browser complained of."""

    page: Page
    complaints: list[str] = field(default_factory=list)

    def enter(self, served: Platform) -> None:
        self.page.goto(served.url)
        self.page.get_by_label("API key").fill(served.key)
        self.page.get_by_role("button", name="Use this key").click()
        expect(self.page.get_by_label("What shall be drawn?")).to_be_focused()

    def draw(self, prompt: str, steps: int | None = None) -> None:
        if steps is not None:
            more = self.page.locator("#more")
            if more.get_attribute("open") is None:
                self.page.get_by_text("More settings").click()
            self.page.get_by_label("Steps").fill(str(steps))
        self.page.get_by_label("What shall be drawn?").fill(prompt)
        self.page.keyboard.press("Control+Enter")


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    page = context.new_page()
    found = Visit(page)
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    # What the server refuses is in the console as well; everything else is a complaint, violations
    # of the policy too.
    page.on(
        "console",
        lambda line: (
            found.complaints.append(line.text) if line.type in ("error", "warning") else None
        ),
    )
    yield found
    context.close()
    assert found.complaints == []


def test_the_page_draws_and_keeps_what_it_has_drawn(served: Platform, visit: Visit) -> None:
    visit.enter(served)
    page = visit.page
    visit.draw("a red circle left of a blue square")
    card = page.get_by_role("article", name="a red circle left of a blue square")
    picture = card.get_by_role("button", name="Enlarge picture 1")
    expect(picture).to_be_visible()
    expect(card.locator(".facts")).to_contain_text(
        re.compile(r"16 × 16 · 4 steps · guidance 2 · seed " r"\d+")
    )
    picture.click()
    expect(page.get_by_role("dialog", name="Picture")).to_be_visible()
    page.keyboard.press("Escape")
    card.get_by_role("button", name="As code").click()
    page.get_by_role("button", name="Python").click()
    expect(page.locator("#snippet")).to_contain_text("client.images.generate(")
    page.keyboard.press("Escape")
    # The same seed and settings again give the same picture.
    card.get_by_role("button", name="Use these settings").click()
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("button", name="Enlarge picture 1")).to_have_count(2)
    shown = page.locator(".frame img").evaluate_all(PIXELS)
    assert shown[0] == shown[1]
    # Its settings with another seed are another picture, without a word being typed.
    card.first.get_by_role("button", name="Draw another").click()
    expect(page.get_by_role("button", name="Enlarge picture 1")).to_have_count(3)
    shown = page.locator(".frame img").evaluate_all(PIXELS)
    assert len(set(shown)) == 2
    page.reload()
    expect(page.get_by_role("button", name="Enlarge picture 1")).to_have_count(3)
    page.get_by_role("button", name="Forget all pictures").click()
    expect(page.get_by_text("Your pictures appear here.")).to_be_visible()
    page.get_by_role("button", name="two green triangles").click()
    example = page.get_by_role("article", name="two green triangles")
    expect(example.get_by_role("button", name="Enlarge picture 1")).to_be_visible()


def test_the_page_cancels(served: Platform, visit: Visit) -> None:
    visit.enter(served)
    visit.page.evaluate(f"document.getElementById('steps').max = {LONG}")
    before = served.flow.stages.denoiser.engine.counts.cancelled  # type: ignore[attr-defined]
    visit.draw("a green cube", steps=LONG)
    card = visit.page.get_by_role("article", name="a green cube")
    expect(card.locator(".state")).to_contain_text("Step")
    expect(card.get_by_role("img", name="preview")).to_be_visible()
    card.get_by_role("button", name="Cancel").click()
    expect(card.get_by_role("alert")).to_have_text("Cancelled.")
    engine = served.flow.stages.denoiser.engine  # type: ignore[attr-defined]
    wait_until(lambda: engine.counts.cancelled == before + 1, 30)


def test_the_page_takes_up_what_it_was_drawing_when_it_was_left(
    served: Platform, visit: Visit
) -> None:
    visit.enter(served)
    page = visit.page
    page.evaluate(f"document.getElementById('steps').max = {LONG}")
    visit.draw("a circle", steps=LONG)
    card = page.get_by_role("article", name="a circle")
    expect(card.locator(".state")).to_contain_text("Step")
    page.reload()
    expect(card.get_by_role("button", name="Cancel")).to_be_visible()
    expect(card.locator(".state")).to_contain_text("Step")
    card.get_by_role("button", name="Cancel").click()
    expect(card.get_by_role("alert")).to_have_text("Cancelled.")
    page.reload()
    expect(page.get_by_text("Your pictures appear here.")).to_be_visible()


def test_the_page_says_why_it_was_refused(served: Platform, visit: Visit) -> None:
    visit.enter(served)
    visit.draw(f"{FORBIDDEN} in a field")
    card = visit.page.get_by_role("article", name=f"{FORBIDDEN} in a field")
    expect(card.get_by_role("alert")).to_contain_text("The safety checks refused this.")
    expect(card.locator("img")).to_have_count(0)
    expect(card.get_by_role("button", name="Use these settings")).to_be_visible()
    expect(card.get_by_role("button", name="Try again")).to_have_count(0)


def test_the_page_goes_on_after_a_broken_stream(served: Platform, visit: Visit) -> None:
    """The first stream ends in the middle of an event, the second is refused; the third brings the
    picture once.
    """
    tries: list[str] = []

    def break_two(route: Route) -> None:
        tries.append(route.request.url)
        if len(tries) > 2:
            route.continue_()
        elif len(tries) == 2:
            route.fulfill(
                status=503,
                json={"error": {"message": "x", "type": "server_error", "code": "worker_lost"}},
            )
        else:
            route.fulfill(
                status=200,
                content_type="text/event-stream",
                body='id: 1\nevent: job.queued\ndata: {"type":"job.queued","position":0}\n\nid: '
                "2\nevent: job",
            )

    visit.page.route("**/events*", break_two)
    visit.enter(served)
    visit.draw("a blue sphere")
    card = visit.page.get_by_role("article", name="a blue sphere")
    expect(card.get_by_role("button", name="Enlarge picture 1")).to_be_visible(timeout=15_000)
    assert [url.rpartition("=")[2] for url in tries] == ["0", "1", "1"]
    assert [text for text in visit.complaints if "503" not in text] == []
    visit.complaints.clear()


def test_a_wrong_key_is_said_and_no_key_is_kept(served: Platform, visit: Visit) -> None:
    visit.page.goto(served.url)
    visit.page.get_by_label("API key").fill("lidit_wrong")
    visit.page.keyboard.press("Enter")
    expect(visit.page.get_by_role("alert")).to_contain_text("not known")
    assert visit.page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [
        0,
        0,
        "",
    ]
    assert [text for text in visit.complaints if "401" not in text] == []
    visit.complaints.clear()


def test_the_page_brings_everything_itself(served: Platform) -> None:
    for path in FILES:
        answer = served.call("GET", path, key=None)
        assert answer.status == 200
        assert answer.headers["content-security-policy"] == POLICY
        for place in re.findall(rb"(?:https?:)?//[a-z][^\s'\"<>)]*", answer.body):
            assert place == b"http://www.w3.org/2000/svg", place
