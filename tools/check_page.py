"""Drives the server's page in a headless Chromium, as people use it, and looks at it with axe-core.

    python tools/check_page.py [--pictures FOLDER] [--docs]

A real server answers with the shipped reference model: upload, question, stop, both sides, a further question, errors,
the copied code; videos, pictures as frames, a server without PyAV (page_videos.py). At each stop axe-core must find
nothing serious or critical (WCAG 2.2 AA), in both colour schemes, and nothing may reach over the page's edge at widths
of 320 to 1,440 pixels. --pictures keeps screenshots; --docs takes those of docs/ anew.

Needs a Chromium (CHROMIUM names one; on Debian: apt-get install chromium) and `pip install playwright
axe-playwright-python`, which `make test-page` does. Where something is missing it says so and ends with status 0.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from page_videos import counts, videos, without_pyav
from page_visit import Visit, code, serving

from star_edge import refvlm

ROOT = Path(__file__).parent.parent
KEY = "correct-horse"
OWN = {"vision_keep": 0.4, "decoder_keep": 0.2}


def skip(reason: str) -> None:
    print(f"skipped: {reason}")
    sys.exit(0)


def find_browser() -> str:
    names = [os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "chrome"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        skip("there is no Chromium; install one, or name it in CHROMIUM")
    assert found is not None
    return found


def conversation(browser: Any, url: str, axe: str, pictures: Path | None) -> list[str]:
    visit = Visit(browser, url, axe, pictures)
    page = visit.page
    page.keyboard.press("Tab")
    first = page.evaluate("document.activeElement.id")
    visit.expect(first == "drop", f"the first Tab reaches {first}, not the drop area")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    visit.look("empty page")
    visit.edges()
    visit.widths("empty")
    chooser.value.set_files(str(refvlm.DEMO_IMAGE))
    page.wait_for_selector("#drop.has-picture")
    visit.ask("what number is shown?")
    visit.expect(visit.text(".answer") == "0 7", f"the answer is {visit.text('.answer')}")
    visit.expect("Read 36 of 144 image tokens" in visit.text(".words"), visit.text(".words"))
    visit.expect(page.locator(".side").count() == 1, "stock was run though nobody asked for it")
    visit.expect(page.locator("#panels figure").count() == 2, "two panels were expected")
    page.locator("details.times summary").last.click()
    page.locator("#settings summary").first.click()
    visit.look("an answer, with settings and times")
    visit.widths("answer")
    visit.ask("what color is the star?")  # goes on from the first
    visit.expect("for an earlier question" in visit.text(".words"), f"second turn: {visit.text('.words')}")
    page.check("input[value=both]", force=True)
    visit.ask("how many squares are there?")
    visit.expect(page.locator(".turn").last.locator(".side").count() == 2, "both sides were expected")
    said = visit.text(".verdict")
    pattern = (
        r"First word (as soon as|[\d.]+ times (sooner|later) than) stock, and (the same|another) answer\. "
        r"Both sides computed everything anew\."
    )
    visit.expect(re.fullmatch(pattern, said) is not None, f"the comparison says: {said}")
    page.locator(".code").last.click()
    visit.look("three turns, both sides, code")
    visit.widths("both")
    code(visit, refvlm.DEMO_IMAGE)
    page.select_option("#preset", "share")
    page.check("#repeats")
    page.select_option("#size", "0.5")
    page.check("input[value=pruned]", force=True)
    visit.ask("what number is shown?")
    notes = visit.text(".notes")  # of what this model cannot have
    visit.expect("left out before the encoder" in notes and "image_max_tokens=0.5 cannot be kept to" in notes, notes)
    stopping(visit)
    return visit.close()


def stopping(visit: Visit) -> None:
    page = visit.page
    page.click("#again")
    held: list[Any] = []
    page.route("**/v1/chat/completions", lambda route: held.append(route))  # not answered
    visit.ask("what number is shown?", wait=False)
    page.wait_for_selector("#stop:visible")
    visit.expect("reading the picture" in visit.text("#status"), f"while waiting: {visit.text('#status')}")
    page.locator("#clock", has_text="s").wait_for()
    page.keyboard.press("Escape")
    page.wait_for_selector("#ask:visible")
    visit.expect(visit.text("#status") == "Stopped.", f"after Escape: {visit.text('#status')}")
    visit.expect(page.locator("#error").is_hidden(), "stopping is shown as an error")
    held[0].abort()
    page.unroute("**/v1/chat/completions")
    visit.ask("what number is shown?")
    visit.expect(visit.text(".answer") == "0 7", "there was no answer after a stop")


def errors(browser: Any, url: str, axe: str, pictures: Path | None) -> list[str]:
    visit = Visit(browser, url, axe, pictures)
    page = visit.page
    visit.ask("anything?", wait=False)
    visit.expect("no picture yet" in visit.text("#error"), visit.text("#error"))
    page.click("#demo")
    page.wait_for_selector("#examples:visible")
    visit.ask("what number is shown?", wait=False)
    page.wait_for_selector("#error:visible")
    visit.expect('Type it into "API key" under Settings' in visit.text("#error"), visit.text("#error"))
    visit.expect(page.evaluate("document.activeElement.id") == "key", "the key's field has no focus")
    visit.look("a missing key")
    visit.widths("key")
    page.fill("#key", KEY)
    visit.ask("what number is shown?")
    visit.expect(visit.text(".answer") == "0 7", "the key was not taken")
    page.evaluate(
        """async () => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array([1, 2, 3])], "a.png", { type: "image/png" }));
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true }));
        }"""
    )
    page.wait_for_selector("#error:visible")
    visit.expect("cannot show this file" in visit.text("#error"), visit.text("#error"))
    visit.choose(PIL.Image.new("RGB", (60, 40), "gray"))
    visit.expect(page.locator(".turn").count() == 0, "another picture begins a new conversation")
    page.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
    visit.ask("what number is shown?", wait=False)
    page.wait_for_selector("#error:visible")
    visit.expect(
        "does not answer" in visit.text("#error") and "star-edge serve" in visit.text("#error"), visit.text("#error")
    )
    visit.look("a refused connection")
    return visit.close()


def servers_own(browser: Any, url: str, axe: str, pictures: Path | None) -> list[str]:
    """A smaller picture with the config that the server was started with: what that prunes stays."""
    visit = Visit(browser, url, axe, pictures)
    page = visit.page
    visit.choose(PIL.Image.open(refvlm.DEMO_IMAGE))
    page.locator("#settings summary").first.click()
    page.fill("#key", KEY)
    for size, expected in (("1", None), ("0.5", {**OWN, "image_max_tokens": 0.5})):
        page.select_option("#size", size)
        with page.expect_request("**/v1/chat/completions") as asked:
            visit.ask("what number is shown?")
        found = asked.value.post_data_json.get("prune")
        visit.expect(found == expected, f"the server's own with a picture of {size}: {found}")
    return visit.close()


def crops(browser: Any, url: str, axe: str, pictures: Path | None) -> list[str]:
    """A picture that the model gets as an overview and four tiles: each stage has a panel for either."""
    visit = Visit(browser, url, axe, pictures, width=1440)
    page = visit.page
    visit.choose(PIL.Image.open(refvlm.DEMO_IMAGE).convert("RGB").resize((300, 200)))
    page.locator("#settings summary").first.click()
    page.fill("#length", "4")
    visit.ask("what is in the red part?")
    captions = page.locator("#panels figcaption b").all_inner_texts()
    parts = [caption.rpartition(", ")[2] for caption in captions]
    visit.expect(parts == ["whole picture", "4 tiles"] * 2, f"panels of crops: {captions}")
    shapes = page.evaluate("[...document.querySelectorAll('#panels canvas')].map((c) => c.width / c.height)")
    # the tiles of LLaVA-NeXT's rule are padded to a square, its overview is the picture stretched
    expected = [1.5, 1.0] * 2
    visit.expect(bool(np.allclose(shapes, expected, atol=0.05)), f"shapes of the panels: {shapes}")
    visit.expect("was cut at 4 tokens" in visit.text(".notes"), f"a cut answer: {visit.text('.notes')}")
    visit.look("crops")
    visit.picture("crops")
    return visit.close()


def units(browser: Any, url: str, axe: str, pictures: Path | None) -> list[str]:
    """Areas that repeat are left out before the encoder, and the page shows which."""
    visit = Visit(browser, url, axe, pictures)
    page = visit.page
    pixels = np.full((168, 196, 3), 255, np.uint8)
    pixels[40:80, 40:120] = np.random.default_rng(0).integers(0, 255, (40, 80, 3))
    visit.choose(PIL.Image.fromarray(pixels))
    page.locator("#settings summary").first.click()
    page.fill("#length", "4")
    page.check("#repeats")
    visit.ask("what is in the red part?")
    captions = page.locator("#panels figcaption b").all_inner_texts()
    visit.expect(captions[:2] == ["Into the encoder", "Vision stage"], f"panels of units: {captions}")
    n, total = re.findall(r"\d+", page.locator("#panels figcaption span").first.inner_text())
    visit.expect(0 < int(n) < int(total), f"{n} of {total} units entered the encoder")
    visit.picture("units", full_page=True)
    return visit.close()


def quiet(browser: Any, url: str, axe: str, pictures: Path | None) -> list[str]:
    """A phone, with reduced motion: nothing moves, and the answer is on the screen with the question's field."""
    visit = Visit(browser, url, axe, pictures, width=360, reduced_motion="reduce", has_touch=True, is_mobile=True)
    page = visit.page
    page.click("#demo")
    page.wait_for_selector("#examples:visible")
    page.locator("#examples button").first.click()
    visit.wait_done()
    boxes = [page.locator(name).last.bounding_box() for name in (".answer", "#question")]
    on_screen = all(box["y"] >= 0 and box["y"] + box["height"] <= 800 for box in boxes)
    visit.expect(on_screen, f"not on the screen: {boxes}")
    moving = page.evaluate("document.getAnimations().filter(a => a.playState === 'running').length")
    visit.expect(moving == 0, f"{moving} things move")
    visit.look("a phone")
    visit.picture("phone")
    return visit.close()


def documents(browser: Any, url: str) -> None:
    """The pictures of the page in docs/."""
    for name, mode, width, height, more in (
        ("page", "both", 1180, 900, {}),
        ("page-phone", "pruned", 390, 844, {"is_mobile": True, "has_touch": True}),
    ):
        visit = Visit(browser, url, "", None, **more)
        page = visit.page
        page.set_viewport_size({"width": width, "height": height})
        page.click("#demo")
        page.wait_for_selector("#examples:visible")
        page.check(f"input[value={mode}]", force=True)
        visit.ask("what number is shown?")
        page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
        page.wait_for_timeout(500)
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            page.screenshot(path=file.name)
            PIL.Image.open(file.name).convert("RGB").save(ROOT / "docs" / f"{name}.jpg", quality=82, optimize=True)
        visit.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=Path, help="folder for screenshots")
    parser.add_argument("--docs", action="store_true", help="take the pictures of docs/ anew, and check nothing")
    arguments = parser.parse_args()
    pictures = arguments.pictures
    executable = find_browser()
    try:
        import axe_playwright_python
        from playwright.sync_api import sync_playwright
    except ImportError:
        skip("pip install playwright axe-playwright-python, or use make test-page")
    axe = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    print(axe[:20].strip("/*! "), executable)
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        if arguments.docs:
            with serving() as url:
                documents(browser, url)
            return
        with serving() as url:
            problems += conversation(browser, url, axe, pictures) + quiet(browser, url, axe, pictures)
            problems += counts(browser, url, axe, pictures)
        with serving("-c", "1024") as url:
            problems += videos(browser, url, axe, pictures)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "own.json").write_text(json.dumps({"config": OWN}))
            with serving("--preset", f"{folder}/own.json", "--api-key", KEY) as url:
                problems += servers_own(browser, url, axe, pictures)
            (Path(folder) / "av.py").write_text("raise ImportError('as if PyAV were not installed')\n")
            with serving(environment={"PYTHONPATH": folder}) as url:
                problems += without_pyav(browser, url, axe, pictures)
        with serving("--api-key", KEY) as url:
            problems += errors(browser, url, axe, pictures)
        for name, scene in (("llava-next", crops), ("qwen2-vl", units)):
            fixture = ROOT / "tests" / "fixtures" / name
            files = ["-m", str(fixture / "text.gguf"), "--mmproj", str(fixture / "mmproj.gguf")]
            with serving(*files, "--chat-template", "vicuna", "-c", "1024") as url:
                problems += scene(browser, url, axe, pictures)
        browser.close()
    for problem in problems:
        print(f"FAILED {problem}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
