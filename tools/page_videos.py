"""Videos on the server's page: for tools/check_page.py."""

from __future__ import annotations

import base64
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from page_visit import Visit, code

from star_edge import refvlm


def videos(browser: Any, url: str, axe: str, pictures: Path | None) -> list[str]:
    """An animated GIF and WebP, a video file, and pictures as frames; on a server with a context of 1,024 tokens."""
    visit = Visit(browser, url, axe, pictures)
    page = visit.page
    demo = PIL.Image.open(refvlm.DEMO_IMAGE).convert("RGB")
    white, black = (PIL.Image.new("RGB", demo.size, color) for color in ("white", "black"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gif, webp, still = folder / "clip.gif", folder / "clip.webp", folder / "still.gif"
        stills = [demo, white, demo, black]
        demo.save(gif, save_all=True, append_images=stills[1:], duration=500)
        demo.save(webp, save_all=True, append_images=stills[1:], duration=[100, 900, 1000, 2000], lossless=True)
        demo.save(still, save_all=True)
        gif_chosen(visit, gif)
        frames_drawn(visit)
        page.check("input[value=both]", force=True)
        visit.ask("what number is shown?")
        visit.expect("Both sides computed everything anew" in visit.text(".verdict"), visit.text(".verdict"))
        page.locator(".code").last.click()
        code(visit, gif)
        page.check("input[value=pruned]", force=True)
        visit.choose_files(webp, name="clip.webp, 4 frames")
        page.fill("#fps", "0.5")  # two of four seconds: those shown after 1 and after 3
        visit.ask("what number is shown?")
        visit.expect(
            [text.split("\n")[0] for text in visit.captions()] == ["Frame 1, 1.0 s", "Frame 2, 2.0 s"],
            f"webp: {visit.captions()}",
        )
        page.fill("#fps", "")
        visit.choose_files(still, name=rf"still.gif, {demo.width} . {demo.height} pixels")
        visit.expect(page.locator("#frames-row").is_hidden(), "a still picture is taken for a video")
        with page.expect_request("**/v1/chat/completions") as asked:
            visit.ask("what number is shown?")
        part = asked.value.post_data_json["messages"][0]["content"][0]
        visit.expect(part["type"] == "image_url", f"a still picture is sent as {part['type']}")
        visit.expect(visit.text(".answer") == "0 7", f"the answer to a still GIF is {visit.text('.answer')}")
        budgets(visit, gif)
        series(visit, folder, demo, white, black)
        video_file(visit, folder)
        refused_videos(visit, folder, demo)
    return visit.close()


def gif_chosen(visit: Visit, gif: Path) -> None:
    """A GIF with four frames, half a second each."""
    page = visit.page
    visit.choose_files(gif, name="clip.gif, 4 frames")
    visit.expect(page.locator("#frames-row").is_visible(), "there are no fields for frames")
    visit.look("a video")
    visit.widths("video")
    with page.expect_request("**/v1/chat/completions") as asked:
        visit.ask("what number is shown?")
    part = asked.value.post_data_json["messages"][0]["content"][0]
    head = part.get("video_url", {}).get("url", "")[:22]
    visit.expect(set(part) == {"type", "video_url"} and head == "data:image/gif;base64,", f"sent: {set(part)}, {head}")
    visit.expect("image tokens of 4 frames" in visit.text(".words"), visit.text(".words"))
    visit.expect("earlier question" not in visit.text(".words"), f"first question: {visit.text('.words')}")
    said = visit.text("#read-text")
    expected = "4 frames were taken, of 0.0 s to 1.5 s. 1 of them is the same as an earlier one."
    visit.expect(expected in said, f"what was read: {said}")
    captions = [text.split("\n") for text in visit.captions()]
    names = [f"Frame {i + 1}, {i / 2:.1f} s" for i in range(4)]
    visit.expect([caption[0] for caption in captions] == names, f"frames: {captions}")
    visit.expect(
        [caption[2:] for caption in captions] == [[], [], ["same as frame 1"], []], f"equal frames: {captions}"
    )
    decoder = [int(caption[1].split()[0]) for caption in captions]
    page.select_option("#stage", "Vision stage")
    vision = [int(text.split("\n")[1].split()[0]) for text in visit.captions()]
    kept = all(0 < d <= v <= 144 for d, v in zip(decoder, vision)) and sum(decoder) < sum(vision) < 4 * 144
    visit.expect(kept, f"tokens of the frames: {vision}, then {decoder}")
    visit.look("frames of a video")
    visit.widths("frames")
    visit.ask("what color is the star?")
    visit.expect("for an earlier question" in visit.text(".words"), f"second turn: {visit.text('.words')}")


def frames_drawn(visit: Visit) -> None:
    """Stock reads every token of the same frames. They are drawn as they are: the second white, the fourth black."""
    page = visit.page
    page.check("input[value=stock]", force=True)
    visit.expect("the same frames as pictures" in visit.text("#mode-text"), visit.text("#mode-text"))
    visit.ask("what number is shown?")
    visit.expect("Read all 576 image tokens of 4 frames" in visit.text(".words"), visit.text(".words"))
    means = page.evaluate(
        """[...document.querySelectorAll('#panels canvas')].map((canvas) => {
            const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
            return data.reduce((sum, value, i) => sum + (i % 4 < 3 ? value : 0), 0) / (data.length * 3 / 4);
        })"""
    )
    drawn = len(means) == 4 and means[1] > 250 and means[3] < 5 and 5 < means[0] < 250 and means[0] == means[2]
    visit.expect(drawn, f"brightness of the frames: {means}")


def budgets(visit: Visit, gif: Path) -> None:
    """A dropped video, and who shares its tokens: each frame has its own share, or all of the question."""
    page = visit.page
    page.evaluate(
        """(text) => {
            const data = new DataTransfer();
            const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
            data.items.add(new File([bytes], "dropped.gif", { type: "image/gif" }));
            document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }""",
        base64.b64encode(gif.read_bytes()).decode(),
    )
    page.locator("#picture-name", has_text="dropped.gif, 4 frames").wait_for()
    page.locator("#settings summary").first.click()
    page.select_option("#preset", "balanced")
    for budget in ("crop", "prompt"):
        page.select_option("#budget", budget)
        with page.expect_request("**/v1/chat/completions") as asked:
            visit.ask("what number is shown?")
        prune = asked.value.post_data_json["prune"]
        visit.expect(prune["budget"] == budget and ("vision_tolerance" in prune) == (budget == "crop"), f"{prune}")
        page.select_option("#stage", "Vision stage")
        vision = [int(text.split("\n")[1].split()[0]) for text in visit.captions()]
        alike = vision[0] == vision[2]  # equal frames
        visit.expect(alike == (budget == "crop"), f"with budget {budget} the frames keep {vision}")
    page.select_option("#budget", "")
    page.locator("#settings summary").first.click()
    page.fill("#frames", "")
    page.focus("#frames")
    page.keyboard.type("e")  # which a number may have, but not alone
    visit.ask("what number is shown?", wait=False)
    visit.refused('"Frames" is not a number. Type one, or leave it empty.')
    page.fill("#frames", "")


def series(visit: Visit, folder: Path, *frames: PIL.Image.Image) -> None:
    """Pictures as frames, in the order of the numbers in their names."""
    page = visit.page
    files = [folder / f"a{number}.png" for number in (1, 2, 10)]
    for file, picture in zip(files, frames):
        picture.save(file)
    visit.choose_files(files[2], files[0], files[1], name="3 pictures as frames, a1.png to a10.png")
    visit.expect(page.locator("#fps").is_hidden(), "pictures have no times, but there is a field for them")
    page.fill("#frames", "2")
    visit.ask("what number is shown?")
    names = [text.split("\n")[0] for text in visit.captions()]
    visit.expect(names == ["Frame 1", "Frame 2"], f"frames of pictures: {names}")
    page.locator(".code").last.click()
    code(visit, *files)
    page.fill("#frames", "300")
    visit.ask("what number is shown?", wait=False)
    visit.refused("nframes=300 is not 1 to 256 frames: give a whole number in that range.")
    page.fill("#frames", "")
    visit.look("pictures as frames")
    (folder / "a.txt").write_text("no picture")
    page.set_input_files("#file", [str(files[0]), str(folder / "a.txt")])
    visit.refused('"a.txt" is no picture, and several files are the frames of one video.')


def video_file(visit: Visit, folder: Path) -> None:
    """A WebM of two seconds, whose frames become lighter."""
    try:
        import av
    except ImportError:
        print("  no video file is tried: PyAV is not installed")
        return
    file = folder / "clip.webm"
    with av.open(str(file), "w") as output:
        stream = output.add_stream("libvpx", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for i in range(20):
            pixels = np.full((120, 160, 3), 10 * i, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    visit.choose_files(file, name=r"clip.webm, 2\.\d s, 160 . 120 pixels")  # which the browser has found by itself
    visit.page.fill("#frames", "4")
    visit.ask("what number is shown?")
    names = [text.split("\n")[0] for text in visit.captions()]
    visit.expect(names == [f"Frame {i + 1}, {second} s" for i, second in enumerate((0.2, 0.7, 1.2, 1.7))], f"{names}")
    visit.page.fill("#frames", "")


def refused_videos(visit: Visit, folder: Path, demo: PIL.Image.Image) -> None:
    """What cannot be sent, cannot be read, or does not fit the context."""
    page = visit.page
    big, broken, cut, long = (folder / name for name in ("big.mp4", "broken.mp4", "cut.gif", "long.gif"))
    with big.open("wb") as file:
        file.truncate(30 * 2**20)
    page.set_input_files("#file", str(big))
    visit.refused(f"The video has {30 * 2**20} bytes and this server takes {16 * 2**20}.")
    visit.look("a video that is too large")
    broken.write_bytes(b"\0\0\0\x18ftypmp42" + bytes(1000))
    visit.choose_files(broken, name="broken.mp4, which this browser cannot show")
    visit.ask("what number is shown?", wait=False)
    visit.refused("cannot be read as a video")
    shades = [PIL.Image.new("RGB", demo.size, (8 * i, 0, 0)) for i in range(30)]
    for i, shade in enumerate(shades):
        shade.paste(demo.resize((90, 90)), (2 * i, 2 * i))
    shades[0].save(long, save_all=True, append_images=shades[1:], duration=100)
    data = long.read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    visit.choose_files(cut, name=r"cut.gif, \d+ frames")
    visit.ask("what number is shown?", wait=False)
    visit.refused("cannot be decoded")
    visit.choose_files(long, name="long.gif, 30 frames")
    page.fill("#frames", "30")
    page.locator("#settings summary").first.click()
    page.select_option("#preset", "quality")
    visit.ask("what number is shown?", wait=False)
    visit.refused("of a context of 1024")
    visit.expect(
        "On this page: take fewer frames, choose a smaller preset" in visit.text("#error"), visit.text("#error")
    )
    visit.look("a video that does not fit the context")
    page.fill("#frames", "8")  # 1,152 tokens: stock has no room for them
    page.select_option("#preset", "fast")
    page.check("input[value=both]", force=True)
    visit.ask("what number is shown?")
    visit.expect("of a context of 1024" in visit.text(".side.stock .notes"), visit.text(".side.stock .notes"))
    visit.expect("without pruning this does not fit" in visit.text(".verdict"), visit.text(".verdict"))
    visit.expect(len(visit.captions()) == 8 and page.locator("#error").is_hidden(), f"{visit.captions()}")
    visit.look("stock without room")
    visit.picture("stock-without-room", full_page=True)


def without_pyav(browser: Any, url: str, axe: str, pictures: Path | None) -> list[str]:
    """A server without PyAV says so, and takes animated images nevertheless."""
    visit = Visit(browser, url, axe, pictures)
    with tempfile.TemporaryDirectory() as name:
        file, gif = Path(name) / "clip.mp4", Path(name) / "clip.gif"
        file.write_bytes(b"\0\0\0\x18ftypmp42" + bytes(1000))
        visit.choose_files(file, name="clip.mp4, which this browser cannot show")
        visit.ask("what number is shown?", wait=False)
        visit.refused('video files need PyAV: pip install "star-edge[video]".')
        visit.look("no PyAV")
        visit.picture("no-pyav")
        demo = PIL.Image.open(refvlm.DEMO_IMAGE).convert("RGB")
        demo.save(gif, save_all=True, append_images=[PIL.Image.new("RGB", demo.size, "white")], duration=500)
        visit.choose_files(gif, name="clip.gif, 2 frames")
        visit.ask("what number is shown?")
        visit.expect(len(visit.captions()) == 2, f"without PyAV: {visit.captions()}")
    return visit.close()


def counts(browser: Any, url: str, axe: str, pictures: Path | None) -> list[str]:
    """The page counts the frames of images as Pillow does."""
    visit = Visit(browser, url, axe, pictures)
    count = """async (text) => {
        const { countFrames } = await import("./page/media.js");
        return countFrames(new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer));
    }"""
    noise = np.random.default_rng(0).integers(0, 255, (7, 30, 40, 3), np.uint8)
    for kind in ("GIF", "WEBP", "PNG", "JPEG"):
        for n in (1, 2, 7):
            for mode in ("RGB", "P", "RGBA"):
                if kind == "JPEG" and (n > 1 or mode != "RGB"):
                    continue
                first, *rest = [PIL.Image.fromarray(pixels).convert(mode) for pixels in noise[:n]]
                file = io.BytesIO()
                first.save(file, kind, **({"save_all": True, "append_images": rest, "duration": 90} if n > 1 else {}))
                data = file.getvalue()
                expected = getattr(PIL.Image.open(io.BytesIO(data)), "n_frames", 1)
                found = visit.page.evaluate(count, base64.b64encode(data).decode())
                visit.expect(found == expected == n, f"{kind} in {mode} of {expected} frames: {found} were counted")
                cut = visit.page.evaluate(count, base64.b64encode(data[:40]).decode())
                visit.expect(cut <= n, f"{kind} that is cut off: {cut}")
    return visit.close()
