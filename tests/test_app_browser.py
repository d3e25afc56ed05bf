"""The page in a real browser: the command serves it, Chromium visits it without a display.

What it sees is kept in screenshots/.
"""

from __future__ import annotations

import io
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiny_qwen3
import torch
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from deco_fast.checkpoint import save_checkpoint
from deco_fast.cli.sample import main as sample
from deco_fast.models.card import ModelCard, SamplingSettings
from deco_fast.models.deco_t2i import DeCoT2I

ROOT = Path(__file__).resolve().parents[1]
SCREENSHOTS = ROOT / "screenshots"
# Longer than anything takes on a loaded machine; nothing waits that long unless it fails.
PATIENCE = 120

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="chromium and chromedriver are not installed (.ci/browser installs them)",
    ),
]


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def serving(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`python app.py` and its address, inside the `with` block."""
    process = subprocess.Popen(
        [sys.executable, "app.py", "--device", "cpu", "--max-images", "16", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell's background jobs, such as a test run may be, inherit that SIGINT is ignored.
        preexec_fn=None if sys.platform == "win32" else _heed_interrupts,
    )
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if match := re.match(r"page +(http://127\.0\.0\.1:\d+)", line):
            break
    else:
        pytest.fail("".join(printed))
    try:
        yield process, match[1]
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """With the shipped digits."""
    with serving() as served:
        yield served


def text_checkpoint(folder: Path) -> Path:
    """Of a tiny text model with random weights throughout."""
    settings = SamplingSettings(solver="adams", steps=20, guidance_scale=3.0, time_shift=3.0)
    encoder = str(tiny_qwen3.folder())
    card = ModelCard("tiny-t2i", 32, 32, sampling=settings, text_encoder=encoder)
    torch.manual_seed(0)
    model = DeCoT2I(tiny_qwen3.MODEL_CONFIG, card)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return save_checkpoint(folder / "tiny-t2i", model=None, ema=model, card=card)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        # A page that needed another host would work here and nowhere else, or the reverse.
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
        "--window-size=1280,1260",
        f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def visit(browser: WebDriver, server: tuple[subprocess.Popen[str], str]) -> Visitor:
    return Visitor(browser, server[1])


class Visitor:
    """A window of the browser that shows the page."""

    def __init__(self, browser: WebDriver, address: str) -> None:
        self.browser = browser
        browser.switch_to.new_window("window")
        self._window = browser.current_window_handle
        browser.get(address)
        self.wait_for("#generate")

    def look(self) -> None:
        """Do what follows in this window."""
        self.browser.switch_to.window(self._window)

    def wait_for(self, selector: str, text: str = "") -> WebElement:
        """The first element there, as soon as it has the text in it."""

        def found(browser: WebDriver) -> WebElement | None:
            elements = browser.find_elements(By.CSS_SELECTOR, selector)
            return next((element for element in elements if text in element.text), None)

        waiting = WebDriverWait(self.browser, PATIENCE, 0.05, [StaleElementReferenceException])
        element = waiting.until(found, f"{selector}: {text}")
        assert isinstance(element, WebElement)
        return element

    def enter(self, name: str, value: object) -> None:
        field = self.wait_for(f"#{name} input, #{name} textarea")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(value), Keys.TAB)

    def choose(self, name: str, *values: object) -> None:
        for value in values:
            self.wait_for(f"#{name} input").send_keys(str(value), Keys.ENTER)

    def click(self, name: str) -> None:
        self.wait_for(f"#{name}").click()

    def screenshot(self, name: str) -> None:
        SCREENSHOTS.mkdir(exist_ok=True)
        self.browser.save_screenshot(str(SCREENSHOTS / f"{name}.png"))

    def sources(self, name: str) -> list[str]:
        self.wait_for(f"#{name} img")
        images = self.browser.find_elements(By.CSS_SELECTOR, f"#{name} img")
        return [str(image.get_attribute("src")) for image in images]

    def command(self) -> list[str]:
        """The words after `python sample.py` that the page shows."""
        value = self.wait_for("#command textarea").get_property("value")
        return shlex.split(str(value))[2:]


def download(address: str) -> bytes:
    with urllib.request.urlopen(address) as response:
        content: bytes = response.read()
    return content


def pixels(content: bytes | Path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content) if isinstance(content, bytes) else content))


def test_images_are_drawn_and_can_be_drawn_again(
    visit: Visitor, downloads: Path, tmp_path: Path
) -> None:
    visit.choose("classes", 3, 8)
    visit.enter("seed", 11)
    visit.enter("num", 8)
    visit.enter("steps", 40)
    visit.click("generate")
    visit.wait_for("#status", "evaluation")
    visit.sources("preview")
    visit.screenshot("denoising")
    visit.wait_for("#status", "drawn: 8 of 32×32, seed 11")
    images = visit.sources("images")
    captions = visit.browser.find_elements(By.CSS_SELECTOR, "#images .caption-label")
    assert [caption.text for caption in captions] == [
        f"seed 11, image {i}, class {3 if i % 2 == 0 else 8}" for i in range(8)
    ]
    with Image.open(io.BytesIO(download(visit.sources("trajectory")[0]))) as animation:
        assert animation.n_frames == 25
    visit.screenshot("drawn")

    assert sample([*visit.command(), "--out", str(tmp_path)]) == 0
    files = sorted(tmp_path.glob("*-class*.png"))
    assert len(files) == len(images) == 8
    for image, file in zip(images, files, strict=True):
        np.testing.assert_array_equal(pixels(download(image)), pixels(file))
    visit.click("download")
    archive = downloads / "deco-digits-euler40-seed11.zip"
    WebDriverWait(visit.browser, PATIENCE, 0.05).until(lambda _: zipfile.is_zipfile(archive))
    with zipfile.ZipFile(archive) as content:
        for file in files:
            np.testing.assert_array_equal(pixels(content.read(file.name)), pixels(file))


def test_wrong_input_shows_a_message(visit: Visitor) -> None:
    for field, wrong, right, message in (
        ("steps", 0, 100, "steps must be 1 … 1000, not 0"),
        ("height", 33, 32, "height 33 is not divisible by the patch size 8: use 32"),
        ("seed", "<b>x</b>", 0, "seed must be a whole number, not '<b>x</b>'"),
        ("num", 17, 4, "number of images must be 1 … 16, not 17"),
    ):
        visit.enter(field, wrong)
        visit.click("generate")
        visit.wait_for(".toast-body", message)
        visit.screenshot(f"wrong-{field}")
        visit.enter(field, right)
    assert not visit.browser.find_elements(By.CSS_SELECTOR, "#images img")


def test_prompts_are_drawn(browser: WebDriver, tmp_path: Path) -> None:
    """On the page of a text model; a prompt that is too long is cut, and the page says so."""
    prompts = ("a cat", "", "a <i>very</i> long one" * 10)
    drawn: list[list[np.ndarray]] = []
    with serving(f"--checkpoint={text_checkpoint(tmp_path)}") as (_, address):
        visit = Visitor(browser, address)
        assert not browser.find_elements(By.CSS_SELECTOR, "#classes")
        visit.enter("negative_prompt", "blurry")
        visit.enter("num", 2)
        visit.enter("height", 33)
        visit.click("generate")
        visit.wait_for(".toast-body", "height 33 is not one of 16 … 128, divisible by 4: use 32")
        visit.enter("height", 48)
        for seed, prompt in enumerate(prompts):
            visit.enter("prompt", prompt)
            visit.enter("seed", seed)
            visit.click("generate")
            visit.wait_for("#status", f"drawn: 2 of 48×32, seed {seed}")
            visit.screenshot(f"prompt-{seed}")
            images = [pixels(download(source)) for source in visit.sources("images")]
            drawn.append(images)
            folder = tmp_path / str(seed)
            assert sample([*visit.command(), "--out", str(folder)]) == 0
            for image, file in zip(images, sorted(folder.glob("*-prompt*.png")), strict=True):
                np.testing.assert_array_equal(image, pixels(file))
        visit.wait_for("#status", "cut: of 220 tokens the first 8 are used: 'a <i>very</i> long")
    assert {image.shape for images in drawn for image in images} == {(48, 32, 3)}


def test_two_visitors_at_once(
    browser: WebDriver, server: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    visitors = [Visitor(browser, server[1]) for _ in range(2)]
    for seed, visitor in enumerate(visitors):
        visitor.look()
        visitor.enter("seed", seed)
        visitor.enter("num", 4 + seed)
        visitor.enter("steps", 30)
    for visitor in visitors:
        visitor.look()
        visitor.click("generate")
    for seed, visitor in enumerate(visitors):
        visitor.look()
        visitor.wait_for("#status", f"drawn: {4 + seed} of 32×32, seed {seed}")
        images = visitor.sources("images")
        assert len(images) == 4 + seed
        folder = tmp_path / str(seed)
        assert sample([*visitor.command(), "--out", str(folder)]) == 0
        for image, file in zip(images, sorted(folder.glob("*-class*.png")), strict=True):
            np.testing.assert_array_equal(pixels(download(image)), pixels(file))
        visitor.screenshot(f"visitor-{seed}")


def test_stopping_and_drawing_something_else(visit: Visitor) -> None:
    visit.enter("steps", 1000)
    visit.click("generate")
    visit.wait_for("#status", "evaluation")
    visit.click("stop")
    visit.wait_for("#status", "stopped")
    before = visit.wait_for("#seed textarea, #seed input").get_property("value")
    visit.click("another")
    WebDriverWait(visit.browser, PATIENCE, 0.05).until(
        lambda _: visit.wait_for("#seed textarea, #seed input").get_property("value") != before
    )
    visit.enter("steps", 5)
    visit.click("generate")
    visit.wait_for("#status", "drawn: 4 of 32×32")


def test_stop_and_at_once_another_request(visit: Visitor) -> None:
    visit.enter("steps", 1000)
    visit.enter("num", 16)
    visit.click("generate")
    visit.wait_for("#status", "evaluation")
    visit.click("stop")
    visit.enter("steps", 999)
    visit.click("generate")
    visit.wait_for("#status", "of 999")
    visit.click("stop")
    visit.wait_for("#status", "stopped")
    visit.enter("steps", 5)
    visit.enter("num", 4)
    visit.click("generate")
    visit.click("generate")
    visit.wait_for("#status", "drawn: 4 of 32×32")
    assert not visit.browser.find_element(By.CSS_SELECTOR, "#ticket").is_displayed()


def test_one_who_leaves_makes_room(
    browser: WebDriver, server: tuple[subprocess.Popen[str], str]
) -> None:
    leaving, waiting = (Visitor(browser, server[1]) for _ in range(2))
    leaving.look()
    leaving.enter("steps", 1000)
    leaving.enter("num", 16)
    leaving.click("generate")
    leaving.wait_for("#status", "evaluation")
    waiting.look()
    waiting.enter("steps", 5)
    waiting.click("generate")
    leaving.look()
    leaving.browser.close()
    waiting.look()
    waiting.wait_for("#status", "drawn: 4 of 32×32")


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGINT for one process")
def test_an_interrupt_ends_it(server: tuple[subprocess.Popen[str], str]) -> None:
    process, _ = server
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in rest
    assert process.returncode in (0, 130)
