"""What a hand does that Playwright has no word for: drop a file, paste it, move a slider."""
import base64, io, random

from PIL import Image

GIVE = """(target, [how, data, name, type]) => {
    const carried = new DataTransfer();
    carried.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], name, {type}));
    const options = {bubbles: true, cancelable: true, composed: true};
    target.dispatchEvent(how === 'drop' ? new DragEvent('drop', {...options, dataTransfer: carried}) : new ClipboardEvent('paste', {...options, clipboardData: carried}));
}"""
SLIDE = "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})) }"
# Fewer than all pictures are there, and the bar is full: 1 as soon as that was seen, 0 otherwise.
WATCH = """(root, of) => { window.fullest = 0; const look = () => { const bar = root.querySelector('progress');
    if (bar && root.querySelectorAll('.frame img:not(.preview, .blank)').length < of) window.fullest = Math.max(window.fullest, bar.value); };
    new MutationObserver(look).observe(root, {subtree: true, childList: true, attributes: true}); }"""


def give(studio, how, data, name="picture.png", mime="image/png"):
    """Drop or paste a file onto the Studio in `studio`."""
    studio.locator(".aura").first.evaluate(GIVE, [how, base64.b64encode(data).decode(), name, mime])


def slide(studio, name, value):
    """Move a slider."""
    studio.locator(f"input[type=range][name={name}]").evaluate(SLIDE, value)


def watch_the_bar(studio, pictures):
    """From now on, `window.fullest` is the most that the bar said before all pictures were there."""
    studio.locator(".aura").first.evaluate(WATCH, pictures)


def narrow_sliders(studio):
    """Sliders that are too short to be moved with care."""
    return studio.locator("input[type=range]:visible").evaluate_all("all => all.map(e => e.getBoundingClientRect().width).filter(w => w < 150)")


def noise(width, height, format="PNG"):
    """A picture of three bytes a pixel that no format can make smaller."""
    out = io.BytesIO()
    Image.frombytes("RGB", (width, height), random.Random(width).randbytes(3 * width * height)).save(out, format, compress_level=1)
    return out.getvalue()
