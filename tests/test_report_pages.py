"""The report and the live view in Chromium: without a network, by mouse and by keyboard, for every reader."""

import contextlib
import json
import os
import threading
import time
from pathlib import Path

import pytest
import uvicorn
from studies import grid, study

from jaxcost.cost.ledger import Ledger
from jaxcost.study import report
from jaxcost.study.watch import create_app

pytestmark = pytest.mark.browser

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
STUDIES = {"search": study(), "grid": grid(), "one": study(1), "many": study(500)}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The address of the report of each of the studies."""
    found = {}
    for name, made in STUDIES.items():
        path = tmp_path_factory.mktemp(name) / "report.html"
        path.write_text(report.texts(made, Path("runs/study"))["report.html"])
        found[name] = path.as_uri()
    return found


def violations(page):
    """What axe-core finds in the page as it is."""
    from axe_playwright_python.sync_playwright import Axe

    results = Axe().run(page)
    return results.generate_report() if results.violations_count else ""


def shown(page, table="recipes"):
    """Names of the rows of a table that are to be seen, in their order."""
    return page.locator(f"#{table} tbody tr:visible th").all_text_contents()


def points(page):
    return page.locator("#chart .point").evaluate_all("all => all.map((one) => one.dataset.key)")


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("name", STUDIES)
def test_it_fits_the_screen_and_asks_for_nothing(page, reports, name, size):
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.set_viewport_size(size)
    page.goto(reports[name])
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert len(points(page)) == len(shown(page)) == len(STUDIES[name]["rows"])
    drawn = page.locator("#chart svg").bounding_box()
    assert drawn["x"] >= 0 and drawn["x"] + drawn["width"] <= size["width"] and drawn["height"] >= 200
    assert asked == [reports[name]] and not said
    assert page.evaluate("window.harmed") is None


def test_harm_is_on_the_first_screen_of_a_phone(page, reports):
    page.set_viewport_size(PHONE)
    page.goto(reports["search"])
    box = page.locator(".flag").bounding_box()
    assert box["y"] + box["height"] < PHONE["height"] * 0.75
    assert page.locator(".answer").bounding_box()["y"] < box["y"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["search", "grid"])
def test_axe_finds_nothing(page, reports, name, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size(PHONE)
    page.goto(reports[name])
    page.locator("#chart .point").first.hover()
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    assert not violations(page)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


def test_tables_sort_by_mouse_and_by_keyboard(page, reports):
    page.goto(reports["search"])
    start = shown(page)
    disk = page.locator("#recipes th[data-key=checkpoint_bytes]")
    disk.get_by_role("button").click()
    assert shown(page) == start[::-1] and disk.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")
    assert shown(page) == start and disk.get_attribute("aria-sort") == "descending"
    page.locator("#recipes th[data-key=name] button").focus()
    page.keyboard.press("Space")
    assert shown(page) == ["control", "cut_1", "cut_2", "cut_3"] and disk.get_attribute("aria-sort") is None


def test_what_is_unknown_is_sorted_last_either_way(page, reports):
    page.goto(reports["search"])
    button = page.locator("#trials th[data-key=predicted_score] button")
    for _ in range(2):
        button.click()
        assert set(shown(page, "trials")[-2:]) == {"control", "cut_1"}


def test_finding_narrows_table_and_picture(page, reports):
    page.goto(reports["many"])
    page.get_by_label("Find").fill("CUT_49")
    assert shown(page) == ["cut_49", *(f"cut_{number}" for number in range(490, 500))]
    assert sorted(points(page)) == sorted(shown(page)) and page.get_by_role("status").inner_text() == "11 of 500 shown"
    page.get_by_label("Find").fill("prune 7% of A & B")
    assert shown(page) == ["cut_7"]
    page.get_by_label("Find").fill("nothing such")
    assert not points(page) and "No recipe to show" in page.locator("#chart").inner_text()
    page.get_by_label("Find").fill("")
    page.get_by_label("on the joint front alone").focus()
    page.keyboard.press("Space")
    assert shown(page) == ["control", *(f"cut_{number}" for number in range(2, 500, 2))]


def test_the_axes_switch_and_with_them_the_front(page, reports):
    page.goto(reports["search"])
    axis = page.get_by_role("combobox", name="Cost")
    labels = axis.locator("option").all_text_contents()
    for cost in ("money", "bytes on disk", "latency", "energy", "FLOPs"):
        assert any(cost in label for label in labels), cost
    assert all(label.endswith(("(measured)", "(compiled)", "(estimated)", "(counted)")) for label in labels)
    front = "all => all.map((one) => one.dataset.key)"
    best = page.locator("#chart .point.front")
    assert set(best.evaluate_all(front)) == {"control", "cut_2", "cut_3"}
    axis.focus()
    axis.select_option(label="time of a training step, ms (measured)")
    assert set(best.evaluate_all(front)) == {"control", "cut_2"}
    assert "time of a training step, ms (measured)" in page.locator("#chart").inner_text()
    assert "against time of a training step" in page.locator("#chart svg").get_attribute("aria-label")


def test_points_are_told_by_the_pointer_and_lead_to_their_rows(page, reports):
    page.goto(reports["search"])
    tip = page.locator(".tip")
    page.locator("[data-key=cut_1] .halo").hover()
    assert "cut_1\nprune 1% of A & B_1\n2.010 bits/byte (2.008 to 2.014 over 3 seeds)" in tip.inner_text()
    assert "bytes on disk, MB (measured): 6.8" in tip.inner_text() and "Flagged" in tip.inner_text()
    page.mouse.move(0, 0)
    assert tip.is_hidden()
    page.locator("[data-key=cut_2] .halo").click()
    assert page.locator("#recipes tr[aria-current]").locator("th").inner_text() == "cut_2"


def test_points_are_walked_by_the_arrow_keys(page, reports):
    page.goto(reports["search"])
    page.get_by_role("combobox", name="Cost").focus()
    page.keyboard.press("Tab")
    focused = "document.activeElement.dataset.key"
    walked = [page.evaluate(focused)]
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "Home", "End"):
        page.keyboard.press(key)
        walked.append(page.evaluate(focused))
    assert walked == ["cut_3", "cut_2", "cut_1", "control", "control", "cut_1", "cut_3", "control"]
    assert page.locator(".tip").inner_text().startswith("control")
    assert "control" in page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.keyboard.press("Enter")
    assert page.locator("#recipes tr[aria-current] th").inner_text() == "control"
    page.keyboard.press("Escape")
    assert page.locator(".tip").is_hidden()
    page.keyboard.press("Tab")
    assert page.evaluate(focused) is None, "one stop for the Tab key, however many points"


def test_the_tip_stays_on_a_phone_s_screen(page, reports):
    page.set_viewport_size(PHONE)
    page.goto(reports["search"])
    for name in ("control", "cut_3"):
        page.locator(f"[data-key={name}] .halo").hover()
        box = page.locator(".tip").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]


def test_without_scripts_all_figures_are_there(chromium, reports):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(reports["search"])
    assert shown(page) == ["control", "cut_1", "cut_2", "cut_3"] and page.get_by_label("Find").is_hidden()
    assert "pareto.svg beside this page" in page.locator("main").inner_text()
    context.close()


def test_on_paper_everything_is_open_and_controls_are_gone(page, reports):
    page.emulate_media(media="print", color_scheme="dark")
    page.goto(reports["search"])
    assert page.locator("nav").is_hidden() and page.get_by_label("Find").is_hidden()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    count = "document.querySelectorAll('details:not([open])').length"
    closed = page.evaluate(count)
    page.evaluate("addEventListener('beforeprint', () => { window.closed_on_paper = " + count + "; })")
    assert closed and page.pdf()[:5] == b"%PDF-"
    assert page.evaluate("window.closed_on_paper") == 0 and page.evaluate(count) == closed


def test_tables_for_papers_are_in_the_page(page, reports):
    page.goto(reports["search"])
    with page.expect_download() as started:
        page.get_by_role("link", name="tables.tex").click()
    assert started.value.suggested_filename == "tables.tex"
    assert Path(started.value.path()).read_text() == report.texts(study(), Path("runs/study"))["tables.tex"]


@contextlib.contextmanager
def served(folder):
    """The address of the live view of a folder."""
    server = uvicorn.Server(uvicorn.Config(create_app(folder), port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


def test_the_live_view_follows_a_study_that_starts_later(page, tmp_path):
    folder = tmp_path / "study"
    page.set_viewport_size(PHONE)
    with served(folder) as address:
        page.goto(address)
        page.get_by_text("Nothing is written there yet").wait_for()
        (folder / "base").mkdir(parents=True)
        (folder / "base" / "experiment.json").write_text(json.dumps({"training": {"steps": 40}}))
        (folder / "base" / "steps.jsonl").write_text('{"step": 3, "loss": 5.5, "tokens_per_second": 100.0}\n')
        page.get_by_text("3 of 40").wait_for()
        ledger = Ledger(folder / "ledger.jsonl")
        ledger.charge(seconds=100, tokens=5000)
        ledger.record(0, event="base", score=2.1, unit="nats per label", heading="nats/label")
        ledger.charge(seconds=50, tokens=1000)
        ledger.record(1, recipe="<b>cut</b>", score=2.05)
        page.locator("#lines tr").nth(1).wait_for()
        assert page.locator("#lines th").all_text_contents() == ["<b>cut</b>", "base"]
        assert page.locator("#seconds").inner_text() == "150 s" and page.locator("#usd").inner_text() == "unknown"
        assert page.locator("#chart .point").count() == 2
        assert page.locator("#score").inner_text() == "nats/label"
        assert "nats per label, held out (measured)" in page.locator("#chart").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert not violations(page)
        with open(folder / "ledger.jsonl", "a") as file:
            file.write('{"step": 2, "sco')
        (folder / "base" / "steps.jsonl").write_text('{"step": 40, "loss": 5.0, "tokens_per_second": 100.0}\n')
        page.get_by_text("40 of 40").wait_for()
        assert page.locator("#lines tr").count() == 2
        (folder / "report.html").write_text("<!doctype html><title>report</title>")
        (folder / "study.json").write_text("{}")
        page.get_by_role("link", name="read the report").wait_for()
        later = time.time() + 5
        os.utime(folder / "ledger.jsonl", (later, later))
        page.get_by_text("Running, or stopped").wait_for()
    page.get_by_text("does not answer").wait_for()
