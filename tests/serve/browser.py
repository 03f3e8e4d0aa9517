"""A real browser without a window, and the endpoint's page in it as a person uses it."""

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

MISSING = "the page is tested in a real browser: install chromium and chromium-driver (Debian's names)"


@contextmanager
def browser(width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Any]:
    """A Chromium that notes what it loads and what its console says."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    # The sandbox needs more rights than containers have; the pages are our own.
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
        url: of the application, with its slash.
    """

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        driver.get(url)

    def find(self, selector: str) -> Any:
        """The element."""
        return self.driver.find_element("css selector", selector)

    def until(self, condition: str, seconds: float = 60) -> None:
        """Wait for what JavaScript says."""
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, seconds).until(
            lambda driver: driver.execute_script(f"return {condition}"), f"never true: {condition}"
        )

    def ready(self) -> None:
        """Wait until models and settings are there."""
        self.until("document.getElementById('retained').value !== ''")

    def ask(self, image: Path, question: str) -> None:
        """Choose an image and press Ask; returns when all is there, or went wrong."""
        self.find("#file").send_keys(str(image.resolve()))
        self.find("#question").clear()
        self.find("#question").send_keys(question)
        self.find("#ask").click()
        self.until("document.getElementById('ask').textContent === 'Ask'")

    def numbers(self, pane: str) -> dict[str, float]:
        """What a pane says, unrounded."""
        cells = self.driver.find_elements("css selector", f"#{pane} [data-value]")
        return {cell.get_attribute("data-number"): float(cell.get_attribute("data-value")) for cell in cells}

    def counts(self) -> dict[str, int]:
        """Patches by fate, as the legend says."""
        cells = self.driver.find_elements("css selector", "[data-count]")
        return {cell.get_attribute("data-count"): int(cell.text) for cell in cells}

    def point(self, selector: str) -> str:
        """Move the mouse over something in the overlay; what the page says of it."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).move_to_element(self.find(selector)).perform()
        return str(self.find("#pointed").text)

    def complaints(self) -> list[str]:
        """What the console said, since the last look."""
        return [line["message"] for line in self.driver.get_log("browser")]

    def loaded(self) -> list[str]:
        """URLs that were asked for, since the last look."""
        events = [json.loads(line["message"])["message"] for line in self.driver.get_log("performance")]
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def picture(self) -> bytes:
        """The whole page as PNG."""
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        return base64.b64decode(shot["data"])
