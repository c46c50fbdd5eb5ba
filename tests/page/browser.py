"""The page /inbox in a real browser, on a real server: `make test-page`.

It needs Chromium, and Node.js for axe-core, and says so where they are missing.
"""

import re
import shutil
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

import storage
from tests.page import people
from tests.server import BOUND, ROOT, wait_until

CHROMIUM = shutil.which("chromium")
AXE = Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"
AGENT = "agent:se:cret-é"
USER, _, TOKEN = AGENT.partition(":")
PHONE = {"width": 360, "height": 740}
# What a stranger may be called; none of it may do anything but be seen.
IMAGE = "<img src=x onerror=\"document.title='owned'\">"
OVERRIDE = "\u202eeman a ton si siht\u2067 (admin) \u202e"
LONG = "W" * 256

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
expect.set_options(timeout=1000 * BOUND)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
        with closing(playwright.chromium.launch(**options)) as browser:
            yield browser


@pytest.fixture
def server(make_server):
    return make_server(LIVECHAT_AGENT=AGENT).wait()


@pytest.fixture
def make_tab(browser):
    """Return a function that opens the page of a server in a browser of its own.

    In the end each has to have had no script error, no violation of its policy, no cookie, and no
    request to anywhere else or with the agent's token in its URL.
    """
    tabs = []

    def make(server, path="/inbox", **options):
        context = browser.new_context(**options)
        tab = context.new_page()
        tab.set_default_timeout(1000 * BOUND)
        tab.errors, tab.urls, tab.home = [], [], f"http://127.0.0.1:{server.port}"
        tab.on("pageerror", lambda error: tab.errors.append(str(error)))
        tab.on("console", lambda message: tab.errors.append(message.text))
        tab.on("request", lambda request: tab.urls.append(request.url))
        tab.goto(f"{tab.home}{path}")
        tabs.append(tab)
        return tab

    yield make
    for tab in tabs:
        # Chromium itself reports an answer of 401 and the like.
        assert [text for text in tab.errors if not text.startswith("Failed to load")] == []
        assert tab.context.cookies() == []
        for url in tab.urls:
            assert url.startswith((f"{tab.home}/", "data:image/svg+xml,"))
            assert "cret" not in url
        tab.context.close()


@pytest.fixture
def inbox(make_tab):
    """Return a function that signs in."""

    def inbox(server, **options):
        tab = make_tab(server, **options)
        sign_in(tab)
        return tab

    return inbox


def sign_in(tab, token=TOKEN):
    tab.get_by_label("User id").fill(USER)
    tab.get_by_label("Token").fill(token)
    tab.get_by_role("button", name="Sign in").click()


def rows(tab):
    return tab.locator("#list tr")


def names(tab):
    return tab.locator("#list .name").all_text_contents()


def searches(tab):
    return [url for url in tab.urls if "visitors.search" in url]


def fill(server, visitors):
    """Register many at once, by SQL, beside the running service."""
    statement = (
        "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < :visitors)"
        " INSERT INTO visitor (id, token, username, name, ts, updated, search, fields)"
        " SELECT printf('%017d', n), 'token' || n, 'guest-' || n, printf('Visitor %06d', n),"
        " :at + n, :at + n, 'visitor ' || printf('%06d', n) || char(0) || 'guest-' || n, '{}' FROM n"
    )
    given = {"visitors": visitors, "at": 1_656_482_701_392}
    with closing(storage.Database(str(server.database))) as database:
        database.write(lambda connection: connection.execute(statement, given).fetchall())


# ---- signing in ----


def test_without_an_agent_the_page_gives_the_line_and_goes_on_when_it_was_run(
    make_server, make_tab
):
    server = make_server().wait()
    tab = make_tab(server)
    line = tab.locator("#setup-line").text_content()
    agent = re.fullmatch(r"LIVECHAT_AGENT=(agent:[0-9a-f]{32}) make run", line)[1]
    tab.reload()
    expect(tab.locator("#setup-line")).to_have_text(line)
    assert server.stop() == 0
    make_server(LIVECHAT_AGENT=agent, PORT=str(server.port)).wait()
    expect(tab.get_by_text("Nobody has registered yet")).to_be_visible()


def test_a_browser_comes_from_the_root_to_the_page_and_signs_in_for_the_tab(server, make_tab):
    server.register("a", name="John Doe")
    tab = make_tab(server, "/")
    assert tab.url == f"{tab.home}/inbox"
    sign_in(tab, "wrong")
    expect(tab.get_by_role("alert").filter(has_text="does not take")).to_be_visible()
    expect(tab.get_by_label("Token")).to_be_focused()
    sign_in(tab)
    expect(rows(tab)).to_have_count(1)
    assert tab.title() == "1 visitor"
    tab.reload()
    expect(rows(tab)).to_have_count(1)
    with closing(tab.context.new_page()) as other:
        other.goto(tab.url)
        expect(other.get_by_role("button", name="Sign in")).to_be_visible()
    tab.get_by_role("button", name="Sign out").click()
    expect(tab.get_by_role("button", name="Sign in")).to_be_visible()
    assert "John Doe" not in tab.content()
    assert tab.evaluate("[sessionStorage.length, localStorage.length]") == [0, 0]
    tab.reload()
    expect(tab.get_by_role("button", name="Sign in")).to_be_visible()


# ---- the list ----


def test_the_line_of_an_empty_database_registers_who_appears_by_themselves(server, inbox):
    tab = inbox(server)
    line = tab.locator("#curl").text_content()
    assert subprocess.run(line, shell=True, capture_output=True).returncode == 0
    expect(rows(tab)).to_have_count(1)
    assert names(tab) == ["Jane Doe"]
    expect(rows(tab)).to_contain_text("jane.doe@example.com")
    expect(tab.locator("#empty")).to_be_hidden()


def test_whatever_happens_is_seen_without_a_reload(server, inbox):
    server.register("a", name="First", department="Sales", phone="+1")
    tab = inbox(server)
    expect(rows(tab)).to_have_count(1)
    server.register("b", name="Second")
    expect(rows(tab)).to_have_count(2)
    assert names(tab) == ["Second", "First"]
    expect(rows(tab).first).to_have_class("new")
    expect(tab.locator("#news")).to_have_text("1 more visitor")
    server.register("a", name="Renamed")
    expect(rows(tab).last.locator(".name")).to_have_text("Renamed")
    command = [sys.executable, "manage.py", "erase", "--db", str(server.database), "b"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    expect(rows(tab)).to_have_count(1)
    expect(tab.locator("#total")).to_have_text("1")


def test_the_list_is_fetched_when_the_statistics_have_changed_and_not_else(server, inbox):
    server.register("a")
    tab = inbox(server)
    expect(rows(tab)).to_have_count(1)
    polls = len(tab.urls)
    wait_until(lambda: tab.wait_for_timeout(50) or len(tab.urls) >= polls + 3, "three polls")
    assert len(searches(tab)) == 1


def test_times_are_relative_and_exact_on_hover(server, inbox):
    _, answer = server.register("a")
    tab = inbox(server)
    when = rows(tab).locator("time")
    expect(when).to_have_text(re.compile("now|seconds? ago"))
    assert when.get_attribute("datetime") == answer["visitor"]["ts"]
    assert re.fullmatch(r"\d+ \w+ 20\d\d, \d\d:\d\d:\d\d \S+", when.get_attribute("title"))


def test_a_search_waits_until_the_typing_pauses(server, inbox):
    for name in ("Amara", "Bjarne", "Amadeus"):
        server.register(name, name=name)
    tab = inbox(server)
    expect(rows(tab)).to_have_count(3)
    before = len(searches(tab))
    tab.clock.install()
    tab.clock.pause_at(datetime.now(UTC) + timedelta(seconds=10))
    for letter in "ama":
        tab.get_by_label("Search").press_sequentially(letter)
        tab.clock.run_for(200)
    assert len(searches(tab)) == before
    tab.clock.run_for(100)
    expect(rows(tab)).to_have_count(2)
    assert names(tab) == ["Amadeus", "Amara"]
    assert len(searches(tab)) == before + 1
    tab.clock.resume()
    tab.get_by_label("Search").fill("nobody <b>")
    expect(tab.get_by_text("Nobody matches nobody <b>.")).to_be_visible()
    tab.get_by_label("Search").fill("")
    expect(rows(tab)).to_have_count(3)


def test_it_sorts_by_the_list_of_orders_and_by_the_heads_of_the_columns(server, inbox):
    for name in ("B", "C", "A"):
        server.register(name, name=name)
    tab = inbox(server)
    expect(rows(tab)).to_have_count(3)

    def shown(*wanted):
        wait_until(lambda: tab.wait_for_timeout(20) or names(tab) == list(wanted), "that order")

    shown("A", "C", "B")
    when = tab.get_by_role("columnheader", name="Registered")
    assert when.get_attribute("aria-sort") == "descending"
    tab.get_by_label("Sort by").select_option("Oldest first")
    shown("B", "C", "A")
    assert when.get_attribute("aria-sort") == "ascending"
    head = tab.get_by_role("columnheader", name="Visitor")
    head.get_by_role("button").click()
    shown("A", "B", "C")
    assert head.get_attribute("aria-sort") == "ascending"
    assert when.get_attribute("aria-sort") is None
    head.get_by_role("button").click()
    shown("C", "B", "A")
    assert head.get_attribute("aria-sort") == "descending"
    assert tab.get_by_label("Sort by").input_value() == '{"name":-1}'


def test_100_000_visitors_are_paged_and_searched(server, inbox):
    fill(server, 100_000)
    tab = inbox(server)
    expect(tab.locator("#total")).to_have_text("100,000")
    expect(tab.get_by_text("1 to 25 of 100,000")).to_be_visible()
    assert tab.get_by_role("button", name="Previous").is_disabled()
    tab.get_by_role("button", name="Next").click()
    expect(tab.get_by_text("26 to 50 of 100,000")).to_be_visible()
    tab.get_by_role("button", name="Last").click()
    expect(tab.get_by_text("99,976 to 100,000 of 100,000")).to_be_visible()
    assert names(tab)[-1] == "Visitor 000001"
    assert tab.get_by_role("button", name="Next").is_disabled()
    tab.get_by_label("Search").fill("guest-7777")
    expect(tab.get_by_text("1 to 11 of 11")).to_be_visible()


def test_a_page_whose_visitors_are_erased_gives_way_to_the_one_before(server, inbox):
    for number in range(26):
        server.register(f"t{number}")
    tab = inbox(server)
    tab.get_by_role("button", name="Next").click()
    expect(tab.get_by_text("26 to 26 of 26")).to_be_visible()
    assert server.request("DELETE", "/api/v1/livechat/visitor/t0")[0] == 200
    expect(tab.get_by_text("1 to 25 of 25")).to_be_visible()


def test_the_chart_shows_30_days_and_its_numbers_are_there_as_text(server, inbox):
    for number in range(3):
        server.register(f"t{number}")
    tab = inbox(server)
    chart = tab.get_by_role("img", name="3 in all, 3 at most on one day, 3 today")
    expect(chart).to_be_visible()
    assert chart.locator("g").count() == 30
    tab.get_by_text("as numbers").click()
    expect(tab.locator("#days tr")).to_have_count(30)
    assert tab.locator("#days tr").first.locator("td").last.text_content() == "3"


# ---- one visitor ----


def test_a_visitor_is_opened_copied_and_erased_after_a_confirmation_that_names_whom(server, inbox):
    fields = [{"key": "address", "value": "Rocket.Chat street", "overwrite": True}]
    given = {"name": "John Doe", "email": "john.doe@email.com", "phone": "+37265783468"}
    given |= {"username": "kim.jane", "department": "Support", "customFields": fields}
    _, answer = server.register("secret-token", **given)
    server.register("other", name="Other")
    tab = inbox(server)
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.get_by_role("button", name="John Doe").click()
    dialog = tab.get_by_role("dialog", name="John Doe")
    for text in (*[value for value in given.values() if isinstance(value, str)], "online"):
        expect(dialog.get_by_role("cell", name=text, exact=True)).to_be_visible()
    custom = dialog.get_by_role("row", name="address")
    expect(custom).to_contain_text("Rocket.Chat street")
    expect(dialog).to_contain_text(answer["visitor"]["_id"])
    assert "secret-token" not in tab.content()
    dialog.get_by_role("button", name="Copy Email").click()
    assert tab.evaluate("navigator.clipboard.readText()") == "john.doe@email.com"
    custom.get_by_role("button").click()
    assert tab.evaluate("navigator.clipboard.readText()") == "Rocket.Chat street"

    dialog.get_by_role("button", name="Erase").click()
    confirm = tab.get_by_role("alertdialog")
    for text in ("John Doe", "john.doe@email.com", "cannot be undone"):
        expect(confirm).to_contain_text(text)
    confirm.get_by_role("button", name="Keep").click()
    expect(dialog).to_be_visible()
    assert server.query("SELECT count(*) FROM visitor") == [[2]]
    dialog.get_by_role("button", name="Erase").click()
    confirm.get_by_role("button", name="Erase").click()
    expect(rows(tab)).to_have_count(1)
    expect(dialog).to_be_hidden()
    assert names(tab) == ["Other"]
    expect(tab.locator("#news")).to_have_text("John Doe is erased.")
    held = b"".join(file.read_bytes() for file in server.database.parent.glob("livechat.db*"))
    assert b"john.doe@email.com" not in held


def test_an_open_visitor_follows_what_happens_to_it(server, inbox):
    server.register("a", name="Before")
    tab = inbox(server)
    tab.get_by_role("button", name="Before").click()
    expect(tab.get_by_role("dialog").get_by_role("cell", name="Before")).to_be_visible()
    server.register("a", name="After")
    expect(tab.get_by_role("dialog").get_by_role("cell", name="After")).to_be_visible()
    server.request("DELETE", "/api/v1/livechat/visitor/a")
    expect(tab.get_by_text("This visitor is there no more.")).to_be_visible()
    expect(tab.get_by_role("button", name="Erase")).to_be_hidden()


def test_a_name_that_cannot_be_seen_gives_way_to_what_can(server, inbox):
    server.register("a", name=" ", username="kim.jane")
    _, answer = server.register("b", name="\u200b\u202e", username="\u2066")
    tab = inbox(server)
    expect(rows(tab)).to_have_count(2)
    assert names(tab) == [answer["visitor"]["_id"], "kim.jane"]


@pytest.mark.parametrize("viewport", [{"width": 1280, "height": 800}, PHONE], ids=["wide", "phone"])
def test_names_are_text_whatever_is_in_them(server, inbox, viewport):
    for number, text in enumerate((IMAGE, OVERRIDE, LONG)):
        short = text[:120]
        field = {"key": short, "value": text, "overwrite": True}
        email = f"{text[:200]}@example.com".replace(" ", "")
        given = {"name": text, "username": short, "department": short, "phone": text[:64]}
        server.register(f"t{number}", email=email, customFields=[field], **given)
    tab = inbox(server, viewport=viewport)
    expect(rows(tab)).to_have_count(3)
    wide = "document.documentElement.scrollWidth <= innerWidth"
    for text in (LONG, OVERRIDE, IMAGE):
        assert text in names(tab)
        assert tab.evaluate(wide)
        rows(tab).nth([LONG, OVERRIDE, IMAGE].index(text)).get_by_role("button").click()
        dialog = tab.locator("#visitor")
        expect(dialog.locator("#custom")).to_contain_text(text)
        assert dialog.evaluate("it => it.scrollWidth <= it.clientWidth")
        dialog.get_by_role("button", name="Erase").click()
        expect(tab.locator("#confirm .name")).to_have_text(text)
        for button in ("Keep", "Erase"):
            expect(tab.locator("#confirm").get_by_role("button", name=button)).to_be_in_viewport()
        # What turns the direction of a text round stands where it ends with its own.
        alone = """text => [...document.querySelectorAll("body, body *")]
            .filter((one) => [...one.childNodes].some((node) =>
                node.nodeType === Node.TEXT_NODE && node.data.includes(text)))
            .map((one) => [one.localName, getComputedStyle(one).unicodeBidi])"""
        found = tab.evaluate(alone, text[:60])
        assert len(found) >= 7
        assert {tuple(one) for one in found} == {("bdi", "isolate")}
        tab.get_by_role("button", name="Keep").click()
        tab.get_by_role("button", name="Close").click()
    tab.get_by_label("Search").fill(f"{IMAGE}nobody")
    expect(tab.get_by_text(f"Nobody matches {IMAGE}nobody.")).to_be_visible()
    assert tab.locator("img").count() == 0
    assert tab.title() == "3 visitors"


# ---- what goes wrong ----


def test_a_service_that_is_gone_is_said_and_seen_again_by_itself(server, make_server, inbox):
    server.register("a", name="There")
    tab = inbox(server)
    expect(rows(tab)).to_have_count(1)
    server.kill()
    expect(tab.get_by_role("alert")).to_have_text(
        "The service does not answer. Trying again in 5 seconds."
    )
    assert names(tab) == ["There"]
    make_server(LIVECHAT_AGENT=AGENT, PORT=str(server.port)).wait().register("b", name="Back")
    expect(rows(tab)).to_have_count(2)
    expect(tab.locator("#problem")).to_be_hidden()


def test_a_database_that_is_gone_is_said_and_seen_again_by_itself(server, inbox, tmp_path):
    server.register("a", name="There")
    tab = inbox(server)
    expect(rows(tab)).to_have_count(1)
    server.database.rename(tmp_path / "elsewhere")
    expect(tab.get_by_role("alert")).to_have_text(
        "The visitor database is unavailable. Trying again in 5 seconds."
    )
    (tmp_path / "elsewhere").rename(server.database)
    expect(tab.locator("#problem")).to_be_hidden()
    expect(tab.locator("#status")).to_be_visible()


def test_another_agent_after_a_restart_asks_to_sign_in_and_shows_nobody(server, make_server, inbox):
    server.register("a", name="John Doe")
    tab = inbox(server)
    tab.get_by_role("button", name="John Doe").click()
    expect(tab.get_by_role("dialog")).to_be_visible()
    assert server.stop() == 0
    make_server(LIVECHAT_AGENT="agent:another", PORT=str(server.port)).wait()
    expect(tab.get_by_text("does not take this user id and token")).to_be_visible()
    expect(tab.get_by_label("User id")).to_have_value("agent")
    assert "John Doe" not in tab.content()
    sign_in(tab, "another")
    expect(rows(tab)).to_have_count(1)


def test_a_rate_limit_is_said_and_kept(make_server, inbox):
    # Its minute has to last until the end of this test.
    wait_until(lambda: time.time() % 60 < 30, "the beginning of a minute", 40)
    server = make_server(LIVECHAT_AGENT=AGENT, LIVECHAT_RATE_LIMIT="2").wait()
    server.register("a", name="There")
    tab = inbox(server)
    expect(tab.get_by_role("alert")).to_have_text(
        re.compile(r"The service asks to slow down\. Trying again in \d+ seconds?\.")
    )
    assert names(tab) == ["There"]
    asked = len(tab.urls)
    for term in "abc":  # which waits, too
        tab.get_by_label("Search").fill(term)
        tab.wait_for_timeout(300)
    assert len(tab.urls) == asked


def test_after_a_rate_limit_it_goes_on_by_itself_and_asks_less_often(server, inbox):
    server.register("a", name="There")
    tab = inbox(server)
    expect(rows(tab)).to_have_count(1)
    refused = {"success": False, "error": "Error", "errorType": "error-too-many-requests"}
    tab.route(
        "**/visitors.statistics?*",
        lambda route: route.fulfill(status=429, json=refused, headers={"Retry-After": "1"}),
        times=1,
    )
    expect(tab.get_by_role("alert")).to_have_text(
        "The service asks to slow down. Trying again in 1 second."
    )
    server.register("b", name="Meanwhile")
    expect(rows(tab)).to_have_count(2)
    expect(tab.locator("#problem")).to_be_hidden()
    assert tab.evaluate("every") == 6000


def test_a_hidden_tab_asks_for_nothing_and_a_seen_one_at_once(server, inbox):
    server.register("a")
    tab = inbox(server)
    expect(rows(tab)).to_have_count(1)
    tab.clock.install()

    def hide(hidden):
        tab.evaluate(
            "hidden => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});"
            " document.dispatchEvent(new Event('visibilitychange')); }",
            hidden,
        )

    hide(True)
    asked = len(tab.urls)
    server.register("b")
    tab.clock.run_for(60_000)
    assert len(tab.urls) == asked
    hide(False)
    expect(rows(tab)).to_have_count(2)


# ---- for everybody ----


def test_the_keyboard_alone_does_it_all(server, make_tab):
    server.register("a", name="Alone")
    tab = make_tab(server)
    expect(tab.get_by_label("User id")).to_be_focused()
    keys = tab.keyboard
    keys.type(USER)
    keys.press("Tab")
    keys.insert_text(TOKEN)
    keys.press("Enter")
    expect(rows(tab)).to_have_count(1)
    keys.press("/")
    expect(tab.get_by_label("Search")).to_be_focused()
    keys.type("alone")
    for _ in range(4):  # the order, two heads, the visitor
        keys.press("Tab")
    opener = tab.get_by_role("button", name="Alone")
    expect(opener).to_be_focused()
    server.register("b", name="Not alone")  # makes the list anew
    expect(rows(tab)).to_have_count(2)
    expect(opener.last).to_be_focused()
    keys.press("Enter")
    dialog = tab.get_by_role("dialog", name="Alone")
    expect(dialog.locator("#fields tr").first).to_be_visible()
    keys.press("Escape")
    expect(dialog).to_be_hidden()
    expect(opener.last).to_be_focused()
    keys.press("Enter")
    expect(dialog.locator("#fields tr").first).to_be_visible()
    keys.press("Shift+Tab")  # to the browser's own, or the last button of the dialog
    dialog.get_by_role("button", name="Erase").focus()
    keys.press("Enter")
    expect(tab.get_by_role("button", name="Keep")).to_be_focused()
    keys.press("Tab")
    keys.press("Enter")
    expect(rows(tab)).to_have_count(1)


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed: make test-page does it")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [{"width": 1280, "height": 800}, PHONE], ids=["wide", "phone"])
def test_axe_finds_nothing(make_server, tmp_path, make_tab, scheme, viewport):
    server = make_server().wait()
    options = {"viewport": viewport, "color_scheme": scheme, "bypass_csp": True}
    options["reduced_motion"] = "reduce"

    def judge(tab):
        tab.evaluate(AXE.read_text())
        found = tab.evaluate("axe.run(document)")
        assert found["passes"]
        assert [
            (one["id"], node["html"], node["failureSummary"])
            for one in found["violations"]
            for node in one["nodes"]
        ] == []

    tab = make_tab(server, **options)
    expect(tab.locator("#setup-line")).to_be_visible()
    judge(tab)
    server.stop()
    server = make_server(LIVECHAT_AGENT=AGENT).wait()
    tab = make_tab(server, **options)
    judge(tab)
    sign_in(tab, "wrong")
    expect(tab.locator("#wrong")).to_be_visible()
    judge(tab)
    sign_in(tab)
    expect(tab.locator("#curl")).to_be_visible()
    judge(tab)
    people.register(server.database, 40)
    expect(rows(tab)).to_have_count(25)
    tab.get_by_text("as numbers").click()
    judge(tab)
    rows(tab).first.get_by_role("button").click()
    expect(tab.locator("#custom tr").first).to_be_visible()
    judge(tab)
    tab.get_by_role("button", name="Erase").click()
    judge(tab)
    tab.get_by_role("button", name="Keep").click()
    tab.get_by_role("button", name="Close").click()
    tab.get_by_label("Search").fill("nobody at all")
    expect(tab.locator("#none")).to_be_visible()
    judge(tab)
    server.kill()
    expect(tab.get_by_role("alert").filter(has_text="does not answer")).to_be_visible()
    judge(tab)
