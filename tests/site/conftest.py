"The built site, and a browser that opens it: Debian's chromium, or any that calls itself so, driven by playwright."

import functools
import os
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from filelock import FileLock
from pages import ROOT

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def copy_repository(target):
    "Copy the files that git tracks or would track."
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    for name in set(listed.stdout.split("\0")) - {""}:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The built site. It is built once, however many processes share the tests."
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    copy, log = shared / "site", shared / "site.log"
    with FileLock(shared / "site.lock"):
        if not log.exists():
            copy_repository(copy)
            command = [sys.executable, ".ci/docs.py", "--builder", "smalldocs"]
            done = subprocess.run(command, cwd=copy, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            log.write_text(f"{done.returncode}\n{done.stdout}")
    told = log.read_text()
    assert told.startswith("0\n"), told
    return copy / "_docs"


class QuietHandler(SimpleHTTPRequestHandler):
    "A file server that writes no log."

    def log_message(self, format, *values):
        "Say nothing."


@pytest.fixture(scope="session")
def site_url(site):
    "The address of the built site, served by this machine."
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    "A browser, one for all tests of a process."
    if BROWSER is None:
        pytest.skip("no chromium: install it to have the pages opened in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, site_url):
    """A function that opens a page of the site, by its address there. Afterwards `page.foreign` has the addresses of
    other hosts that it asked for (they are refused), and `page.complaints` what the console and scripts complained
    about."""
    contexts = []

    def opened(address, width=1280, scheme="light", scripts=True):
        options = dict(viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=scripts)
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.foreign, page.complaints = [], []

        def refuse(route):
            page.foreign.append(route.request.url)
            route.abort()

        page.route(lambda url: url.startswith("http") and not url.startswith(site_url), refuse)
        page.on("console", lambda message: message.type == "error" and page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(f"{site_url}/{address}")
        page.wait_for_load_state("load")
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture
def open_chart(open_page):
    "A function that opens a page and waits for its live figure."

    def opened(address, *values, **options):
        page = open_page(address, *values, **options)
        page.wait_for_selector("figure.live-figure[data-column] svg")
        return page

    return opened
