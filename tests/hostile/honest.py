"""What people send: each door once, each shape, each format. A server that has answered this has loaded all that it ever loads."""
import json
from collections.abc import Iterator

from .attack import http, question
from .beyond import get
from .bodies import receipt
from .crowds import RATIOS
from .doors import edit_form, edit_json, img2img, masked, posted, txt2img, white
from .pictures import photo, plain, png

PAGES = ("/", "/studio/studio.js", "/openapi.json", "/docs", "/examples", "/metrics", "/v1/models", "/sdapi/v1/options")
STREAM = "text/event-stream"


def clear() -> bytes: return png(96, 96)             # transparent: all of it is drawn anew, in OpenAI's way


def everyday(host: str) -> Iterator[bytes]:
    """Requests that are all answered with 200 or 202."""
    for path in PAGES: yield from get(path)(host)
    for ratio in RATIOS: yield question(host, prompt="an owl", steps=1, n=4, aspectRatio=ratio, resolution="high")
    for format in ("jpeg", "webp"): yield question(host, prompt="a fox", steps=1, format=format)
    yield question(host, prompt="a red apple on a green hill, " * 40, negativePrompt="a fox", guidanceScale=2)
    yield http(host, "/generate", json.dumps({"prompt": "a fox", "n": 4}).encode(), accept=STREAM)
    yield http(host, "/jobs", json.dumps({"route": "generate", "request": {"prompt": "a fox"}, "previews": True}).encode())
    yield question(host, "/replay", receipt=receipt())
    yield from masked(lambda: photo(4000, 3000), lambda: white(300), paddingMaskCrop=32)(host)
    yield from posted("/v1/images/generations", {"prompt": "a fox", "n": 2})(host)
    yield from edit_json(plain, clear)(host)
    yield from edit_form(plain, clear)(host)
    yield from txt2img(width=2048, height=2048, batch_size=4)(host)
    yield from img2img(plain, white)(host)
    yield from posted("/", {"inputs": "a fox"})(host)
