"""The chat page in a real browser: what a reader does, and what a model's text may not do."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from leanseek.data.tokenizer import Tokenizer
from tests.runs import tokenizer
from tests.served import Scripted, Served, served, until

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="the chat page's tests need Debian's chromium"
)
EVIL = (
    "<img src=x onerror=\"document.title='x'\"> <script>document.title='x'</script> [a](javascript:document.title='x')"
)


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    return tokenizer()


@pytest.fixture(scope="module")
def service(vocabulary: Tokenizer) -> Iterator[Served]:
    with served(Scripted(vocabulary, context=4096)) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "CI must have chromium"
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, service: Served) -> Iterator[Any]:
    """A fresh reader; whatever the page complains of, or asks of anybody else, is a failure."""
    context = browser.new_context(viewport={"width": 1100, "height": 760})
    page = context.new_page()
    page.set_default_timeout(8000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda sent: None if sent.url.startswith(service.url) else wrong.append(sent.url))
    page.goto(service.url)
    page.wait_for_selector("#model:not(:empty)")
    yield page
    context.close()
    assert wrong == []


def says(service: Served, script: str, pause: float = 0.0) -> None:
    assert isinstance(service.engine, Scripted)
    service.engine.script, service.engine.pause = script, pause


def send(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.keyboard.press("Enter")


def answered(page: Any, text: str, count: int = 1) -> None:
    page.wait_for_function(
        "([text, count]) => { const all = document.querySelectorAll('.assistant:not(.writing) > .text');"
        "return all.length === count && all[count - 1].innerText.includes(text) }",
        arg=[text, count],
    )


def test_a_chat_is_streamed_rendered_and_kept(page: Any, service: Served) -> None:
    says(service, "<think>hm</think>**Bold** words\n\n```python\nx = 1\n```\n", 0.01)
    send(page, "the old wall")
    page.wait_for_selector(".assistant.writing")
    answered(page, "Bold words")
    assert page.inner_text(".assistant strong") == "Bold"
    assert page.inner_text(".code-top span") == "python"
    assert page.text_content(".code pre") == "x = 1\n"
    assert not page.is_visible(".assistant .thoughts > div")
    page.click(".assistant .thoughts summary")
    assert page.inner_text(".assistant .thoughts > div") == "hm"
    assert "tokens" in page.inner_text(".assistant .stats")
    assert "per second" in page.inner_text(".assistant .stats")
    page.reload()
    answered(page, "Bold words")
    assert page.inner_text(".user .text") == "the old wall"
    assert page.inner_text("#list .current .open") == "the old wall"


def test_stop_answer_again_and_edit(page: Any, service: Served) -> None:
    says(service, "word " * 300, 0.02)
    send(page, "first")
    page.wait_for_function("() => document.querySelector('.assistant .text').innerText.includes('word')")
    page.keyboard.press("Escape")
    page.wait_for_selector(".assistant:not(.writing)")
    assert "stopped" in page.inner_text(".assistant .stats")
    until(lambda: service.pages_used == 0)
    says(service, "another")
    page.click(".assistant button[aria-label='Answer again']")
    answered(page, "another")
    says(service, "to the second")
    page.press("#input", "ArrowUp")
    page.fill(".edit textarea", "second")
    page.keyboard.press("Enter")
    answered(page, "to the second")
    assert page.inner_text(".user .text") == "second"
    assert page.locator(".message").count() == 2


def test_chats_are_begun_renamed_and_deleted(page: Any, service: Served) -> None:
    says(service, "yes")
    send(page, "one")
    answered(page, "yes")
    page.keyboard.press("Control+k")
    assert page.is_visible("#empty")
    send(page, "two")
    answered(page, "yes")
    assert page.locator("#list .open").all_inner_texts() == ["two", "one"]
    page.hover("#list li >> nth=1")
    page.click("button[aria-label='Rename one']")
    page.fill("#list input", "eins")
    page.keyboard.press("Enter")
    page.hover("#list li >> nth=0")
    page.click("button[aria-label='Delete two']")
    assert page.locator("#list .open").all_inner_texts() == ["eins"]
    page.click("#toast button")
    assert page.locator("#list .open").all_inner_texts() == ["two", "eins"]


def test_a_models_text_cannot_act(page: Any, service: Served) -> None:
    says(service, EVIL)
    send(page, EVIL)
    answered(page, "onerror")
    assert page.locator(".message :is(img, script, iframe, [onerror], a[href^=javascript])").count() == 0
    assert page.title() != "x"


def test_settings_go_along(page: Any, service: Served) -> None:
    says(service, "a b c d e f g h")
    page.click("#tune")
    page.fill("#system", "Be short.")
    page.fill("#max_tokens", "3")
    page.keyboard.press("Escape")
    with page.expect_request("**/v1/chat/completions") as sent:
        send(page, "so")
    body = sent.value.post_data_json
    assert body["max_tokens"] == 3
    assert body["messages"][0] == {"role": "system", "content": "Be short."}
    page.wait_for_selector(".assistant:not(.writing)")
    assert "3 tokens" in page.inner_text(".assistant .stats")


def test_a_phone_needs_no_scrolling_sideways_and_dark_is_dark(browser: Any, service: Served) -> None:
    says(service, "| a | b |\n|---|---|\n| " + "long " * 40 + " | x |\n\n```\n" + "y" * 300 + "\n```\n")
    context = browser.new_context(viewport={"width": 360, "height": 640}, color_scheme="dark")
    page = context.new_page()
    page.goto(service.url)
    send(page, "w" * 200)
    answered(page, "long")
    widest = page.evaluate(
        "Math.max(document.documentElement.scrollWidth, document.querySelector('.main').scrollWidth)"
    )
    assert widest <= 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 24, 27)"
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(250, 248, 244)"
    page.click("#menu")
    page.wait_for_selector("#side.shown")
    context.close()


def test_everything_to_press_has_a_name(page: Any, service: Served) -> None:
    says(service, "yes")
    send(page, "one")
    answered(page, "yes")
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea')].filter((node) => "
        "!node.getAttribute('aria-label') && !node.textContent.trim() && !node.labels?.length).map((n) => n.outerHTML)"
    )
    assert nameless == []
