"""The pages in a real browser: they render, filters work, no hostile text runs, nothing is fetched.

Where chromium and chromedriver are not installed the tests are skipped, and say so: the pages are
then checked as text only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from comparison_files import comparison, examples, write_comparison
from neat_align.reporting.comparison_report import write_comparison_report
from neat_align.reporting.run_files import read_run
from neat_align.reporting.run_report import write_report
from pages import BREAKOUT, HOSTILE
from run_files import build_run, poison

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    service = shutil.which("chromedriver")
    if browser is None or service is None:
        missing = "chromium" if browser is None else "chromedriver"
        pytest.skip(f"there is no {missing} on this machine: the pages were checked as text only")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(service))
    yield made
    made.quit()


def show(
    driver: webdriver.Chrome,
    page: Path,
    *,
    width: int = 1200,
    theme: str = "light",
    scripts: bool = True,
) -> None:
    """Open a page; logs of what came before are thrown away."""
    driver.get("about:blank")
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": theme}]},
    )
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get_log("browser")
    driver.get_log("performance")
    driver.get(page.as_uri())


def shown(driver: webdriver.Chrome, selector: str) -> list[Any]:
    """Elements that a reader can see, in one call: not hidden, not in a closed fold."""
    return list(
        driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].filter((e) => "
            "e.checkVisibility())",
            selector,
        )
    )


def sides(driver: webdriver.Chrome) -> list[str]:
    """The sides that the first prompt shows, in order."""
    return [
        s.get_attribute("data-side") for s in shown(driver, "[data-item]:first-of-type [data-side]")
    ]


def control(driver: webdriver.Chrome, name: str, within: str = "") -> Any:
    return driver.find_element(By.CSS_SELECTOR, f'{within} [data-control="{name}"]')


def requests(driver: webdriver.Chrome) -> list[str]:
    """Addresses that the page asked for, its own and `data:` left out."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [
        e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
    ]
    assert any(url.startswith("file:") for url in urls)
    return [url for url in urls if url != driver.current_url and not url.startswith("data:")]


def width_of(driver: webdriver.Chrome) -> int:
    return int(driver.execute_script("return document.documentElement.scrollWidth"))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison_report(write_comparison(tmp_path_factory.mktemp("comparison")))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_comparison_renders(
    driver: webdriver.Chrome, compared: Path, width: int, theme: str
) -> None:
    show(driver, compared, width=width, theme=theme)
    assert width_of(driver) <= width
    paper = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 200) == (theme == "dark")
    marks = shown(driver, ".charts.wide .mark > path")
    assert len(marks) == 2 * (5 * 3 + 1)
    fills = driver.execute_script(
        "return arguments[0].map((mark) => getComputedStyle(mark).fill)", marks
    )
    # A colour a method, base's, and the paper in the hollow ones.
    assert len(set(fills)) == 5 + 2
    assert paper in fills
    assert driver.get_log("browser") == []
    assert requests(driver) == []


def test_two_methods_are_chosen_searched_and_filtered(
    driver: webdriver.Chrome, compared: Path
) -> None:
    show(driver, compared)
    asked = examples()
    assert sides(driver) == ["base", "neat"]
    Select(control(driver, "left")).select_by_value("dpo")
    Select(control(driver, "right")).select_by_value("base")
    assert sides(driver) == ["dpo", "base"]
    left, right = (s.location["x"] for s in shown(driver, "[data-item]:first-of-type [data-side]"))
    assert left < right
    difference = asked[0]["rewards"]["base"] - asked[0]["rewards"]["dpo"]
    assert driver.find_element(
        By.CSS_SELECTOR, "[data-change]"
    ).text == f"difference {difference:+.3f}".replace("-", "\u2212")
    better = [x for x in asked if x["rewards"]["base"] > x["rewards"]["dpo"]]
    Select(control(driver, "kind")).select_by_value("gain")
    assert len(shown(driver, "[data-item]")) == len(better)
    assert driver.find_element(By.CSS_SELECTOR, "[data-count]").text == f"{len(better)} of 24"
    Select(control(driver, "kind")).select_by_value("loss")
    assert len(shown(driver, "[data-item]")) == 24 - len(better)
    Select(control(driver, "kind")).select_by_value("")
    control(driver, "search").send_keys("DPO, prompt 17)")
    assert ["prompt 17)" in e.text for e in shown(driver, "[data-item]")] == [True]
    control(driver, "search").clear()
    # An answer that is not chosen is not searched.
    control(driver, "search").send_keys("neat-pp, prompt 17)")
    assert shown(driver, "[data-item]") == []


def test_without_scripts_the_comparison_reads_whole(
    driver: webdriver.Chrome, compared: Path
) -> None:
    show(driver, compared, scripts=False)
    assert shown(driver, "[data-controls]") == []
    assert len(shown(driver, "[data-side]")) == 8 * 6
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = f"{HOSTILE}{BREAKOUT}<svg onload='alert(3)'></svg>"
    rows = [
        x
        | {"answers": {m: f"{a}{text}" for m, a in x["answers"].items()}, "prompt": f"asked {text}"}
        for x in examples()
    ]
    return write_comparison_report(
        write_comparison(tmp_path_factory.mktemp("poisoned"), comparison() | {"name": text}, rows)
    )


def unharmed(driver: webdriver.Chrome) -> None:
    """No element came out of a text, no dialog opened, nothing was refused or fetched, and our own
    script ran.
    """
    assert driver.find_elements(By.CSS_SELECTOR, "img, [onerror], [onload]") == []
    assert len(driver.find_elements(By.CSS_SELECTOR, "script")) == 1
    # An open dialog would raise here.
    assert HOSTILE in driver.find_element(By.TAG_NAME, "main").text
    assert driver.get_log("browser") == []
    assert requests(driver) == []
    assert shown(driver, "[data-controls]") != []


def test_hostile_text_in_a_comparison_does_not_run(
    driver: webdriver.Chrome, poisoned: Path
) -> None:
    show(driver, poisoned)
    unharmed(driver)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(build_run(tmp_path_factory.mktemp("run")))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_report_renders(
    driver: webdriver.Chrome, reported: Path, width: int, theme: str
) -> None:
    show(driver, reported, width=width, theme=theme)
    assert width_of(driver) <= width
    assert len(shown(driver, "svg")) == 11
    assert shown(driver, "svg .band path")[0].size["height"] > 0
    assert driver.get_log("browser") == []
    assert requests(driver) == []


def test_gains_and_losses_are_filtered_and_searched(
    driver: webdriver.Chrome, reported: Path
) -> None:
    show(driver, reported)
    run = read_run(reported.parent)
    deltas = [
        after - before
        for before, after in zip(run.before["rewards"], run.after["rewards"], strict=True)
    ]
    rest = driver.find_element(By.CSS_SELECTOR, "#answers [data-rest]")
    assert rest.get_attribute("open") is None
    for kind, expected in (
        ("gain", sum(d > 0 for d in deltas)),
        ("loss", sum(d < 0 for d in deltas)),
        ("same", 0),
    ):
        Select(control(driver, "kind", "#answers")).select_by_value(kind)
        assert len(shown(driver, "#answers [data-item]")) == expected, kind
        headings = [h.text for h in shown(driver, "#answers h3")]
        assert headings == {"gain": ["Largest gains"], "loss": ["Largest losses"], "same": []}[kind]
    Select(control(driver, "kind", "#answers")).select_by_value("")
    assert len(shown(driver, "#answers [data-item]")) == 40  # the rest was opened by the filter
    control(driver, "search", "#answers").send_keys("CLERK")
    assert shown(driver, "#answers [data-item]") == []
    control(driver, "search", "#answers").clear()
    control(driver, "search", "#answers").send_keys(
        "messages SINCE. How do i begin the next one? (14)"
    )
    assert len(shown(driver, "#answers [data-item]")) == 1
    assert len(shown(driver, "#groups [data-item]")) == 6  # the other list is not touched


def test_groups_are_filtered_by_origin_and_bad_answers_stay_folded(
    driver: webdriver.Chrome, reported: Path
) -> None:
    show(driver, reported)
    Select(control(driver, "origin", "#groups")).select_by_value("negative")
    answers = shown(driver, "#groups li")
    assert len(answers) == 12 * 2
    assert {a.get_attribute("data-origin") for a in answers} == {"negative"}
    assert shown(driver, "#groups li .text") == []
    control(driver, "search", "#groups").send_keys("(negative 2, prompt 7)")
    assert len(shown(driver, "#groups [data-item]")) == 1
    assert shown(driver, "#groups li .text") == []
    folds = shown(driver, "#groups li details[data-hit]")
    assert len(folds) == 1
    folds[0].find_element(By.TAG_NAME, "summary").click()
    assert "(negative 2, prompt 7)" in shown(driver, "#groups li .text")[0].text
    # No chosen answer holds those words.
    Select(control(driver, "origin", "#groups")).select_by_value("chosen")
    assert shown(driver, "#groups [data-item]") == []


def test_without_scripts_the_report_reads_whole(driver: webdriver.Chrome, reported: Path) -> None:
    show(driver, reported, scripts=False)
    assert shown(driver, "[data-controls]") == []
    assert len(shown(driver, "#groups [data-item]")) == 6
    for fold in driver.find_elements(By.CSS_SELECTOR, "details[data-rest] > summary"):
        fold.click()
    assert len(shown(driver, "[data-item]")) == 40 + 12
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_hostile_text_in_a_report_does_not_run(driver: webdriver.Chrome, tmp_path: Path) -> None:
    run_dir = build_run(tmp_path / "run")
    poison(run_dir)
    show(driver, write_report(run_dir))
    unharmed(driver)


def test_a_script_that_came_past_the_escaping_would_still_not_run(
    driver: webdriver.Chrome, compared: Path, tmp_path: Path
) -> None:
    inserted = (
        "<script>document.title = 'run'</script><img src='x' onerror=\"document.title = "
        "'run'\"><img src='https://localhost:9/x'>"
    )
    page = tmp_path / "page.html"
    page.write_text(
        compared.read_text(encoding="utf-8").replace("<main>", f"<main>{inserted}"),
        encoding="utf-8",
    )
    show(driver, page)
    assert driver.title == "demo – neat-align comparison"
    assert (
        len(
            [
                entry
                for entry in driver.get_log("browser")
                if "Content Security Policy" in entry["message"]
            ]
        )
        >= 3
    )
    assert shown(driver, "[data-controls]") != []


def test_the_policy_lets_no_other_script_than_ours_run(
    driver: webdriver.Chrome, compared: Path, tmp_path: Path
) -> None:
    html = compared.read_text(encoding="utf-8")
    page = tmp_path / "page.html"
    page.write_text(
        html.replace('"use strict";', '"use strict"; document.title = "changed";'), encoding="utf-8"
    )
    show(driver, page)
    assert driver.title != "changed"
    assert shown(driver, "[data-controls]") == []
