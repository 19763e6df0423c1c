"""Reports of real, tiny runs in a headless browser: what a reader sees, sorts and reads without a
mouse or a network.

Needs Chromium and its driver (Debian: apt-get install chromium chromium-driver). Continuous
integration installs them and fails without; on another machine without them these tests are
skipped, and say so.
"""

import os
import shutil

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.scripts.conftest import make_workspace, run, train
from tests.scripts.test_train_crkd import make_site
from tests.tools.report_runs import write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    binary = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        reason = "needs Chromium and chromedriver: apt-get install chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "no-first-run",
        "disable-sync",
        "disable-background-networking",
        "disable-component-update",
        f"user-data-dir={profile}",
        "window-size=1200,900",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield window
    window.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report of two tested runs with pictures and their teacher."""
    folder = make_workspace(tmp_path_factory.mktemp("report"))
    train("--method", "supervised", "--student", "resunet", cwd=folder)
    train("--method", "supervised", "--student", "unet", cwd=folder)
    train("--method", "acf_bckd", "--opts", "diagnose_interval=1", cwd=folder)
    base = folder / "runs/tiny"
    runs = [base / "supervised/unet/seed0", base / "acf_bckd/resunet-unet/seed0"]
    for each in (base / "supervised/resunet/seed0", *runs):
        run("test_3d.py", "--ckpt", str(each / "best.pt"), cwd=folder)
    run("tools/report.py", *map(str, runs), "--out", "page.html", cwd=folder)
    return folder / "page.html"


@pytest.fixture(scope="module")
def many_cases(tmp_path_factory):
    """A report of generated scores, which differ from case to case."""
    folder = tmp_path_factory.mktemp("many")
    runs = [
        write_run(folder / "runs", "supervised", cases=20),
        write_run(folder / "runs", gain=0.04, cases=20),
    ]
    run("tools/report.py", *map(str, runs), "--out", "page.html", cwd=folder)
    return folder / "page.html"


def opened(browser, path, width=1200, scheme="light"):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(path.as_uri())
    return browser


def screenshot(browser, path):
    """The window as an array (H, W, 3)."""
    browser.save_screenshot(str(path))
    return np.asarray(Image.open(path).convert("RGB")).astype(float)


def column(table, index):
    """(shown text, value sorted by) of a column from the top."""
    script = """return [...arguments[0].tBodies[0].rows].map(row => row.cells[arguments[1]])
        .map(cell => [cell.innerText, cell.dataset.v])"""
    return [tuple(pair) for pair in table.parent.execute_script(script, table, index)]


def test_a_report_of_real_runs(browser, page, tmp_path):
    opened(browser, page)
    assert "2 runs on tiny" in browser.find_element(By.TAG_NAME, "h1").text
    sections = [each.text for each in browser.find_elements(By.TAG_NAME, "h2")]
    assert sections == [
        "Summary",
        "Comparison",
        "Teacher and student",
        "Classes",
        "Cases",
        "Pictures",
        "Training",
        "Validation",
        "Loss terms",
        "Settings",
    ]
    # One test case is best, median and worst: of each run an image, a ground truth and a
    # prediction, all decoded.
    pictures = browser.find_elements(By.CSS_SELECTOR, "#pictures img")
    assert len(pictures) == 6
    assert all(
        int(browser.execute_script("return arguments[0].naturalWidth", each)) > 100
        for each in pictures
    )
    assert "best, median, worst: case6" in browser.find_element(By.ID, "pictures").text
    charts = browser.find_elements(By.CSS_SELECTOR, ".chart svg")
    assert len(charts) == 20
    assert all(each.size["width"] > 200 and each.size["height"] > 100 for each in charts)
    terms = browser.find_element(By.ID, "terms").text
    for name in ("seg", "afd", "cfd", "hbd", "sbd"):
        assert name in terms
    # Nothing was fetched, and nothing went wrong.
    assert [
        entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
    ] == []
    requests = [
        e["message"]
        for e in browser.get_log("performance")
        if 'Network.requestWillBeSent"' in e["message"]
    ]
    assert all('"url":"file:' in r or '"url":"data:' in r for r in requests), requests
    shot = screenshot(browser, tmp_path / "page.png")
    assert shot.shape[:2] == (900, 1200)
    assert shot.mean() > 200 and shot.std() > 15  # paper with ink on it


def test_pressing_a_heading_sorts(browser, many_cases):
    opened(browser, many_cases)
    table = browser.find_element(By.CSS_SELECTOR, "#cases details[open] table.sortable")
    headings = table.find_elements(By.CSS_SELECTOR, "thead th")
    assert headings[1].text.startswith("Dice")
    unsorted = [float(value) for _, value in column(table, 1)]
    assert unsorted != sorted(unsorted)
    headings[1].find_element(By.TAG_NAME, "button").click()
    assert headings[1].get_attribute("aria-sort") == "ascending"
    assert [float(value) for _, value in column(table, 1)] == sorted(unsorted)
    headings[1].find_element(By.TAG_NAME, "button").click()
    assert headings[1].get_attribute("aria-sort") == "descending"
    assert [float(value) for _, value in column(table, 1)] == sorted(unsorted, reverse=True)
    # Another column takes over; rows go as a whole, and what is undefined stays at the end in both
    # directions.
    duct = len(headings) - 1
    for order in ("ascending", "descending"):
        headings[duct].find_element(By.TAG_NAME, "button").click()
        assert (
            headings[duct].get_attribute("aria-sort") == order
            and headings[1].get_attribute("aria-sort") == "none"
        )
        values = [value for _, value in column(table, duct)]
        assert values[-1] == "" and "" not in values[:-1]
        assert [float(v) for v in values[:-1]] == sorted(
            (float(v) for v in values[:-1]), reverse=order != "ascending"
        )
        assert column(table, 0)[-1][0] == "case02"
    assert ("missed", "0") in column(table, duct)


def test_sorting_by_keyboard(browser, many_cases):
    opened(browser, many_cases)
    table = browser.find_element(By.CSS_SELECTOR, "#cases table.sortable")
    first = table.find_element(By.CSS_SELECTOR, "thead button")
    browser.execute_script("arguments[0].focus()", first)
    browser.switch_to.active_element.send_keys(Keys.TAB)
    assert "supervised" in browser.switch_to.active_element.text
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert table.find_elements(By.TAG_NAME, "th")[1].get_attribute("aria-sort") == "ascending"
    values = [float(value) for _, value in column(table, 1)]
    assert values == sorted(values)
    browser.switch_to.active_element.send_keys(Keys.SPACE)
    assert table.find_elements(By.TAG_NAME, "th")[1].get_attribute("aria-sort") == "descending"


@pytest.mark.parametrize("width", [360, 768, 1200])
@pytest.mark.parametrize("name", ["page", "many_cases"])
def test_the_page_fits_its_window(browser, request, name, width):
    """Wide tables and charts scroll by themselves; the page does not scroll sideways."""
    opened(browser, request.getfixturevalue(name), width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for each in browser.find_elements(By.CSS_SELECTOR, ".grid .chart svg"):
        assert each.size["width"] >= min(250, width - 70)


def test_light_and_dark(browser, many_cases, tmp_path):
    """Paper and ink change places, and the text of charts goes along."""
    light, dark = (
        screenshot(opened(browser, many_cases, scheme=scheme), tmp_path / "window.png")
        for scheme in ("light", "dark")
    )
    assert light.mean() > 200 and dark.mean() < 70
    colour = browser.execute_script(
        "return getComputedStyle(document.querySelector('#training svg text')).fill"
    )
    assert min(int(part) for part in colour.strip("rgba()").split(",")[:3]) > 200, colour


def test_printing_unfolds_what_is_folded(browser, many_cases):
    opened(browser, many_cases)
    assert browser.find_elements(By.CSS_SELECTOR, "details:not([open])")
    pdf = browser.execute_cdp_cmd("Page.printToPDF", {})["data"]
    assert len(pdf) > 50_000
    assert not browser.find_elements(By.CSS_SELECTOR, "details:not([open])")


def test_few_labels(browser, tmp_path):
    """Photographs of a run with few labels: pixels, their terms and pictures."""
    site = make_site(tmp_path, "images2d")
    site.train("--opts", "max_steps=2", "diagnose_interval=1")
    folder = site.run_folder()
    site.score(folder)
    run("tools/figure.py", str(folder), "--out", "figure.png", cwd=tmp_path)
    assert (tmp_path / "figure.png").stat().st_size > 5000
    run("tools/report.py", str(folder), cwd=tmp_path)
    opened(browser, folder / "report.html")
    assert len(browser.find_elements(By.CSS_SELECTOR, "#pictures img")) == 6  # of two photographs
    assert "pseudo_s" in browser.find_element(By.ID, "terms").text
    assert "HD95, pixels" in browser.find_element(By.ID, "summary").text
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_overlays_stand_in_for_the_data(browser, page, tmp_path):
    """A report on a machine without the data set shows what a test with --overlays drew."""
    folder = tmp_path / "runs/tiny/acf_bckd/resunet-unet/seed0"
    shutil.copytree(page.parent / "runs/tiny/acf_bckd/resunet-unet/seed0", folder)
    run("test_3d.py", "--ckpt", str(folder / "best.pt"), "--overlays", cwd=page.parent)
    run("tools/report.py", str(folder), "--data-root", "nowhere", cwd=tmp_path)
    opened(browser, folder / "report.html")
    assert len(browser.find_elements(By.CSS_SELECTOR, "#pictures img")) == 1
    shutil.rmtree(folder / "overlays")
    run("tools/report.py", str(folder), "--data-root", "nowhere", cwd=tmp_path)
    opened(browser, folder / "report.html")
    assert "--overlays" in browser.find_element(By.ID, "pictures").text
