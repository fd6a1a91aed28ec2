"""A headless Chromium for the tests of pages: one for all of them, in light or dark, as wide as a desk or a phone."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

NO_BROWSER = "no Chromium with its driver here; on Debian: apt-get install -y chromium chromium-driver"

SWITCHES = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

DESK, PHONE = 1100, 360
"""Widths of a window, in CSS pixels."""


def installed() -> bool:
    return bool(shutil.which("chromium") and shutil.which("chromedriver"))


class Browser:
    """A window on one page at a time."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, file: Path, width: int = DESK, scheme: str = "light") -> None:
        """Shows `file` in a window of this width, for a reader whose system is light or dark."""
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        self.driver.get(file.as_uri())
        assert self.driver.get_log("browser") == []

    def ask(self, script: str, *arguments: Any) -> Any:
        """The value of a JavaScript expression."""
        return self.driver.execute_script(f"return {script}", *arguments)

    def texts(self, selector: str) -> list[str]:
        return self.ask("[...document.querySelectorAll(arguments[0])].map((each) => each.textContent)", selector)

    def find(self, selector: str, number: int = 0) -> Any:
        return self.driver.find_elements("css selector", selector)[number]

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def hover(self, element: Any) -> None:
        webdriver.ActionChains(self.driver, duration=0).move_to_element(element).perform()

    def press(self, *keys: str) -> None:
        """Keys by their names, `"ARROW_DOWN"`, at whatever has the focus."""
        webdriver.ActionChains(self.driver, duration=0).send_keys(*[getattr(Keys, key) for key in keys]).perform()

    def check_in_both_schemes(self, file: Path) -> None:
        """That the page stands alone, fits, and is light or dark as its reader wishes, at a desk and on a phone."""
        for width, scheme, bright in [(DESK, "light", True), (PHONE, "dark", False), (PHONE, "light", True)]:
            self.open(file, width, scheme)
            assert self.ask("document.documentElement.scrollWidth") <= width
            assert self.loaded() == []
            assert self.texts("b") == []  # no token is markup
            picture = Image.open(BytesIO(self.screenshot(file.with_name(f"{width}-{scheme}.png")))).convert("L")
            assert picture.width == width or picture.width == width - 15  # the scroll bar
            assert (picture.getpixel((2, 2)) > 200) is bright  # type: ignore[operator]  # of one band it is a number
            low, high = picture.getextrema()
            assert high - low > 150  # type: ignore[operator]  # words stand out from the ground

    def screenshot(self, file: Path) -> bytes:
        """All of the page, as wide as the window."""
        picture = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        file.write_bytes(base64.b64decode(picture["data"]))
        return file.read_bytes()

    def loaded(self) -> list[str]:
        """What the page has asked for beside itself."""
        return self.ask("performance.getEntriesByType('resource').map((each) => each.name)")


@contextmanager
def started(profile: Path) -> Iterator[Browser]:
    """A browser with a new profile in the folder `profile`."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for switch in [*SWITCHES, f"--user-data-dir={profile}"]:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
