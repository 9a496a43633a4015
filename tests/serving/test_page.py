"""The page, in a real Chromium: somebody types, tokens arrive, a stop, a reload, a phone."""

import os
import shlex
import shutil
import signal

import pytest
import servers

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed, so the "
                               "page is not tested: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed, so the page is not tested: "
    "apt install chromium")]
FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
HOSTILE = "<img src=x onerror=alert(1)></span><script>alert(2)</script>"
LONG = 2000  # tokens, which take seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    servers.make(folder / "one", length=LONG + 48)
    servers.make(folder / "two", length=LONG + 48, init_std=0.3)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    made = servers.Server(folder, folder / "one", folder / "two")
    yield made
    made.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.getuid() == 0 else []
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *sandbox])
        yield made
        made.close()


@pytest.fixture
def page(browser, server):
    """The page with its default settings; any complaint of the browser fails the test."""
    context = browser.new_context(viewport={"width": 1100, "height": 760})
    made, complaints = context.new_page(), []
    made.on("console", lambda message: complaints.append(message.text)
            if message.type in ("error", "warning") else None)
    made.on("pageerror", lambda error: complaints.append(str(error)))
    made.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    made.on("request", lambda request: None if request.url.startswith(server.url)
            else complaints.append(request.url))
    made.goto(server.url)
    made.wait_for_selector("#models button")
    yield made
    context.close()
    assert complaints == []


def settle(page, **values):
    """Changes settings as a person does."""
    page.click("#open-settings")
    for name, value in values.items():
        page.fill(f"#{name}", str(value))
    page.click("#settings button[type=submit]")


def say(page, text):
    page.fill("#prompt", text)
    page.keyboard.press("Enter")


def test_tokens_arrive_are_stopped_and_stay(page, server):
    settle(page, max_tokens=LONG)
    say(page, "the cat")
    page.wait_for_selector(".token")
    assert page.is_visible("#stop") and page.is_hidden("#send")
    before = page.locator(".token").count()
    page.locator(".token").nth(before).wait_for(state="attached")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:visible")
    assert page.locator(".foot span").all_text_contents()[0].startswith("stopped after ")
    texts = page.locator(".text").all_text_contents()
    assert len(texts) == 2 and all(texts)  # side by side
    assert 0 < page.locator(".token").count() < 2 * LONG
    left, right = (page.locator(".answer").nth(i).bounding_box() for i in range(2))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    page.wait_for_timeout(300)
    assert all(value == 0 for name, value in server.figures().items() if "_running{" in name)
    page.reload()
    page.wait_for_selector(".token")
    assert page.locator(".text").all_text_contents() == texts
    assert page.locator(".said").inner_text() == "the cat"


def test_a_token_says_what_else_there_was(page):
    page.click("#models button:has-text('two')")
    settle(page, max_tokens=8, temperature=0)
    say(page, "a dog")
    page.wait_for_selector(".foot:visible")
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    at = "[...document.querySelectorAll('.token')].indexOf(document.activeElement)"
    assert page.evaluate(at) == 1
    rows = page.locator("#tip tr")
    while rows.count() < 5:  # a character of several tokens has one row
        page.keyboard.press("ArrowRight")
        assert page.evaluate(at) < page.locator(".token").count() - 1
    assert page.is_visible("#tip")
    shares = [float(text.split()[0]) for text in page.locator("#tip td:nth-child(2)")
              .all_text_contents()]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 100.5
    assert page.locator("#tip tr.taken").count() == 1
    assert "taken" in rows.first.get_attribute("class")  # temperature 0 takes the likeliest
    text = page.locator(".text").inner_text()
    page.click(".foot button:has-text('Regenerate')")
    page.wait_for_selector(".foot:visible")
    assert page.locator(".text").inner_text() == text


def test_chat_and_completion(page):
    page.click("#models button:has-text('two')")
    settle(page, max_tokens=4)
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "one")
    page.wait_for_selector(".foot:visible")
    first = page.locator(".text").text_content()
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "two")
    assert asked.value.post_data_json["messages"] == [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": first},
        {"role": "user", "content": "two"}]
    page.wait_for_selector("#send:visible")
    page.click("#fresh")
    page.click("#modes button:has-text('Complete')")
    with page.expect_request("**/v1/completions") as asked:
        say(page, "the cat")
    assert asked.value.post_data_json["prompt"] == "the cat"
    page.wait_for_selector(".foot:visible")
    assert page.locator(".text").text_content().startswith("the cat")


def test_hostile_text_stays_text(page):
    """What a person writes and what a model writes take the same way to the page."""
    settle(page, max_tokens=2)
    say(page, HOSTILE)
    page.wait_for_selector("#send:visible")
    page.evaluate("""text => {
      const state = JSON.parse(localStorage.lmjax);
      for (const made of Object.values(state.turns[0].answers)) {
        made.pieces = [[text, 0.5, [[text, 0.5]]]];
        made.note = text;
      }
      localStorage.lmjax = JSON.stringify(state);
    }""", HOSTILE)
    page.reload()
    page.wait_for_selector(".token")
    page.locator(".token").first.hover()
    assert page.locator(".said").text_content() == HOSTILE
    assert page.locator(".token").first.text_content() == HOSTILE
    assert page.locator("img, main script").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser, server, scheme):
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme,
                                  has_touch=True)
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("#models button")
    settle(page, max_tokens=60)
    say(page, "the cat " + "x" * 300)
    page.wait_for_selector("#send:visible")
    wide = "document.documentElement.scrollWidth > innerWidth"
    assert not page.evaluate(wide) and not page.evaluate(wide.replace("documentElement", "body"))
    inside = "e => e.scrollWidth <= e.clientWidth + 1"
    assert page.locator("main").evaluate(inside)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert contrast(paper, ink) > 7
    soft = page.locator(".foot").first.evaluate("e => getComputedStyle(e).color")
    assert contrast(paper, soft) > 4.5
    context.close()


def contrast(*colours):
    """The contrast of two colours as WCAG 2 defines it."""
    found = []
    for colour in colours:
        parts = [int(part) / 255 for part in colour[4:-1].split(",")]
        r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        found.append(0.2126 * r + 0.7152 * g + 0.0722 * b)
    return (max(found) + 0.05) / (min(found) + 0.05)


@pytest.mark.parametrize("name", ["README.md", "docs/serving.md"])
def test_three_commands_lead_to_the_page(tmp_path, browser, name):
    """Those of the documentation; the server's is run on a free port."""
    blocks = (servers.ROOT / name).read_text().split("```bash\n")[1:]
    block = next(block for block in blocks if "lmjax serve" in block).split("```")[0]
    install, serve, show = map(shlex.split, block.splitlines())
    assert install == ["pip", "install", "-e", ".[serve]"]
    assert show[:3] == ["python", "-m", "webbrowser"] and show[3] == "http://127.0.0.1:8000"
    assert serve[:2] == ["lmjax", "serve"] and serve[3:] == []
    servers.make(tmp_path / serve[2])
    server = servers.Server(tmp_path, tmp_path / serve[2])
    page = browser.new_page()
    page.goto(show[3].replace(":8000", server.url[server.url.rindex(":"):]))
    say(page, "the cat")
    page.wait_for_selector(".token")
    assert page.locator("#models button").inner_text() == "quickstart"
    page.close()
    assert server.stop() == 0


def test_the_key_is_asked_for(folder, browser):
    server = servers.Server(folder, folder / "one", env={"LMJAX_API_KEY": "a-key"})
    page = browser.new_context().new_page()
    page.goto(server.url)
    page.wait_for_selector("#settings[open] #key")
    page.fill("#key", "a-key")
    page.keyboard.press("Enter")
    page.wait_for_selector("#models button:has-text('one')")
    assert page.is_hidden("#problem") and "a-key" not in server.text()
    assert server.stop() == 0
