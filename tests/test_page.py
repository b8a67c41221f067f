"""The chat page in Chromium: what is typed is answered as it comes, stopped when asked, refused in so many words."""

import hashlib
import re
import time

import pytest
from serving import slots
from test_api import idle, serving, text_of

pytestmark = pytest.mark.browser


def opened(page, port, tokens):
    page.goto(f"http://127.0.0.1:{port}/")
    page.locator("#temperature").fill("0")
    page.locator("#tokens").fill(str(tokens))
    return page


def say(page, text):
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")


def test_an_answer_comes_as_it_is_written(page):
    with serving() as (port, _):
        opened(page, port, 12)
        page.locator("#model option").wait_for(state="attached")
        # What the page makes of a stream is looked at each time that it changes.
        page.evaluate(
            """() => {
                window.seen = [];
                const look = () => document.querySelectorAll(".assistant").forEach((box) => seen.push(box.textContent));
                new MutationObserver(look).observe(document.getElementById("log"), {childList: true, subtree: true});
            }"""
        )
        say(page, "hello wo")
        page.locator("#figures", has_text="12 tokens").wait_for()
        want, figures = text_of("hello wo", 12), page.locator("#figures").text_content()
        assert page.locator(".user").text_content() == "hello wo" and page.locator("#prompt").input_value() == ""
        assert page.locator(".assistant").text_content() == want
        seen = page.evaluate("seen")
        assert len(set(seen)) > 2 and all(want.startswith(text) for text in seen)
        assert "tokens/s" in figures and "a million tokens" in figures
        assert page.locator(".error").count() == 0


def test_stop_ends_the_answer_and_frees_the_slot(page, monkeypatch):
    decode = slots().decode

    def slow(*arguments):
        time.sleep(0.2)
        return decode(*arguments)

    monkeypatch.setattr(slots(), "decode", slow)
    with serving() as (port, model):
        opened(page, port, 80)
        say(page, "abc")
        page.locator(".assistant", has_text=re.compile(".{4}", re.DOTALL)).wait_for()
        assert page.locator("#send").is_disabled()
        page.locator("#stop").click()
        page.locator("#send:enabled").wait_for()
        assert idle(model) and page.locator("#stop").is_disabled()
        begun = page.locator(".assistant").text_content()
        want = text_of("abc", 80)
        assert want.startswith(begun.rstrip("\ufffd")) and len(begun) < len(want)
        assert page.locator(".error").count() == 0
        page.locator("#tokens").fill("8")
        say(page, "x")
        page.locator("#figures", has_text="8 tokens,").wait_for()
        assert page.locator(".assistant").nth(1).text_content() == text_of("x", 8)


def test_what_is_refused_is_said_on_the_page(page):
    with serving(keys=(hashlib.sha256(b"a-long-secret").digest(),)) as (port, _):
        opened(page, port, 1000)
        page.locator(".error", has_text="The API key is missing or unknown").wait_for()
        page.locator("#key").fill("a-long-secret")
        say(page, "abc")
        page.locator(".error", has_text="more than the 96 that the model takes").wait_for()
        page.locator("#tokens").fill("4")
        say(page, "abc")
        page.locator("#figures", has_text="4 tokens").wait_for()
        assert page.locator(".assistant").text_content() == text_of("abc", 4)
        page.context.set_offline(True)
        say(page, "abc")
        page.locator(".error", has_text="fetch").wait_for()
        assert page.locator("#send").is_enabled()
