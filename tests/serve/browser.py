"""A headless browser, and the endpoint's page in it as a user operates it."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

MISSING = "the page is tested in a browser: install chromium and chromium-driver (Debian's names)"


@contextmanager
def browser(width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Any]:
    """Start a Chromium that records its requests and its console."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    # The sandbox needs privileges that containers lack. The pages are our own.
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        page = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", page)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        yield driver
    finally:
        driver.quit()


class Page:
    """The page at ``url``, in a browser.

    Args:
        driver: the browser.
        url: the application's URL, with its trailing slash.
    """

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        driver.get(url)

    def find(self, selector: str) -> Any:
        """Return the first element that matches a CSS selector."""
        return self.driver.find_element("css selector", selector)

    def until(self, condition: str, seconds: float = 60) -> None:
        """Wait until a JavaScript expression is true."""
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, seconds).until(
            lambda driver: driver.execute_script(f"return {condition}"), f"never true: {condition}"
        )

    def ready(self) -> None:
        """Wait until the page shows the model's settings."""
        self.until("document.getElementById('retained').value !== ''")

    def ask(self, image: Path, question: str) -> None:
        """Choose an image and press Ask. Return when answers and overlay are complete or have failed."""
        self.find("#file").send_keys(str(image.resolve()))
        self.find("#question").clear()
        self.find("#question").send_keys(question)
        self.find("#ask").click()
        self.until("document.getElementById('ask').textContent === 'Ask'")

    def numbers(self, pane: str) -> dict[str, float]:
        """Return the numbers of a pane, unrounded."""
        cells = self.driver.find_elements("css selector", f"#{pane} [data-value]")
        return {cell.get_attribute("data-number"): float(cell.get_attribute("data-value")) for cell in cells}

    def counts(self) -> dict[str, int]:
        """Return the number of patches by fate, from the legend."""
        cells = self.driver.find_elements("css selector", "[data-count]")
        return {cell.get_attribute("data-count"): int(cell.text) for cell in cells}

    def point(self, selector: str) -> str:
        """Move the mouse over an element of the overlay, and return its description on the page."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).move_to_element(self.find(selector)).perform()
        return str(self.find("#pointed").text)

    def console(self) -> list[str]:
        """Return the lines of the console since the last call."""
        return [line["message"] for line in self.driver.get_log("browser")]

    def loaded(self) -> list[str]:
        """Return the requested URLs since the last call."""
        events = [json.loads(line["message"])["message"] for line in self.driver.get_log("performance")]
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def screenshot(self) -> bytes:
        """Return the whole page as PNG."""
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        return base64.b64decode(shot["data"])
