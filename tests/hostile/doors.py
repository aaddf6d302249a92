"""The doors of other APIs, masks, and the readers of a job: the same budgets behind other names."""
import base64, json
from dataclasses import dataclass

from PIL import Image

from .attack import SILENT, Answer, Attack, MiB, Target, http, row
from .beyond import Watchers, get
from .bodies import words
from .pictures import chunk, photo, plain, png, progressive, saved, text_bomb

REFUSED = (400, 413, 422, 429)


def text(file): return base64.b64encode(file() if callable(file) else file).decode()


def posted(path, *bodies, n=1): return lambda host: [http(host, path, json.dumps(b() if callable(b) else b).encode()) for b in bodies] * n


def txt2img(n=1, **fields): return posted("/sdapi/v1/txt2img", {"prompt": "an owl", "steps": 1} | fields, n=n)


def img2img(start, mask=None, **fields): return posted("/sdapi/v1/img2img", lambda: {"prompt": "an owl", "steps": 1, "init_images": [text(start)], "mask": mask and text(mask)} | fields)


def masked(start, mask, n=1, **config): return posted("/refine", lambda: {"refinePrompt": "an owl", "images": [text(start)], "mask": text(mask), "config": {"steps": 1} | config}, n=n)


def bare(*files, path="/?prompt=an+owl", kind="image/png"): return lambda host: [http(host, path, f(), kind=kind) for f in files]


def edit_json(start, mask): return posted("/v1/images/edits", lambda: {"prompt": "an owl", "images": [{"image_url": "data:image/png;base64," + text(start)}], "mask": {"image_url": "data:image/png;base64," + text(mask)}})


def edit_form(start, mask):
    def requests(host):
        files = b"".join(f'--cut\r\ncontent-disposition: form-data; name="{name}"; filename="a.png"\r\ncontent-type: image/png\r\n\r\n'.encode() + f() + b"\r\n"
                         for name, f in (("image", start), ("mask", mask)))
        return [http(host, "/v1/images/edits", files + b'--cut\r\ncontent-disposition: form-data; name="prompt"\r\n\r\nan owl\r\n--cut--\r\n', kind="multipart/form-data; boundary=cut")]
    return requests


def white(side=96): return saved(Image.new("L", (side, side), 255), "PNG")


def large(): return png(4000, 4000)


def scans(): return progressive(8000)


@dataclass(frozen=True)
class Polling(Attack):
    """A long picture at A1111's door, and meanwhile `times` questions how far it is, each for its preview."""
    times: int = 200

    def run(self, target: Target, source: str = "127.0.0.1") -> list[Answer]:
        drawing = json.dumps({"prompt": "an owl", "steps": 50, "batch_size": 4}).encode()
        with target.connect(source) as s:
            s.sendall(http(target.host, "/sdapi/v1/txt2img", drawing))
            polls = Attack(self.name, self.budget, get("/sdapi/v1/progress", self.times), self.right, at_once=4)
            return polls.run(target, source)


@dataclass(frozen=True)
class Shelf(Attack):
    """Pictures at addresses, each fetched many times."""
    def run(self, target: Target, source: str = "127.0.0.1") -> list[Answer]:
        body = json.dumps({"prompt": "an owl", "n": 2, "response_format": "url"}).encode()
        made = target.exchange(http(target.host, "/v1/images/generations", body), source)
        paths = ["/pictures/" + one["url"].rpartition("/")[2] for one in json.loads(made.body)["data"]] if made.status == 200 else []
        fetch = Attack(self.name, self.budget, lambda host: [m for p in (*paths, "/pictures/none.png", "/pictures/" + "a" * 3000) for m in get(p, 60)(host)], self.right, at_once=4)
        return [made, *fetch.run(target, source)]


TEXTS = chunk(b"tEXt", b"parameters\0" + b'A: "' * 16_000)

DOORS = (
    # AUTOMATIC1111
    row("330 random words by A1111's route", "spelling help of one prompt", txt2img(prompt=words(330)), {200}, answer=MiB),
    row("190 LoRA tags, 32,000 characters, 3,000 scripts", "words of one request", lambda host: [m for f in ({"prompt": "owl " + "<lora:a:1>" * 190}, {"prompt": "a " * 15_900, "negative_prompt": "b " * 15_900}, {"alwayson_scripts": {f"s{i}": [] for i in range(1900)}}, {"override_settings": {f"s{i}": 1 for i in range(1900)}}, {"styles": ["x" * 60] * 1500}) for m in txt2img(**f)(host)], (200, *REFUSED), cpu=8, answer=MiB),
    row("what no answer could repeat", "fields of one request", lambda host: [http(host, "/sdapi/v1/txt2img", b'{"prompt":"a","steps":1,%s}' % x) for x in (b'"x":NaN', b'"x":[1e999]', b'"x":"\\ud800"', b'"x":{"\\udfff":1}', b'"override_settings":{"x":Infinity}', b'"override_settings":{"\\ud800":1}', b'"x":' + b"[" * 900 + b"NaN" + b"]" * 900)], (422,)),
    row("100 pictures of 150 steps by A1111's route", "work of one request", lambda host: [m for f in ({"batch_size": 10, "n_iter": 10, "steps": 150}, {"batch_size": 10, "n_iter": 1, "steps": 150, "width": 2048, "height": 2048}, {"seed": 2**63}, {"cfg_scale": 1e300}, {"width": 64, "height": 2048}) for m in txt2img(**f)(host)], (200, *REFUSED), cpu=60, answer=40 * MiB, rss=400 * MiB),
    row("pictures of 4 megapixels from small ones", "work after the model", txt2img(n=4, batch_size=2, width=2048, height=2048), (200, *REFUSED), cpu=40, answer=40 * MiB, at_once=4, rss=500 * MiB),
    row("img2img from bombs, with bombs for masks", "pictures of a request", lambda host: [m for a, b in ((scans, None), (plain, scans), (lambda: png(13_300, 13_300), None), (plain, lambda: png(13_300, 13_300)), (plain, large), (large, plain)) for m in img2img(a, b, mask_blur=64)(host)], (200, *REFUSED), cpu=25, rss=500 * MiB, answer=32 * MiB),
    row("png-info of a million chunks, of long and of packed texts", "text of a PNG", lambda host: [m for f in (lambda: png(96, 96, before=chunk(b"tEXt", b"a\0") * 1_500_000), lambda: png(96, 96, before=TEXTS * 300), lambda: png(96, 96, before=text_bomb()), lambda: png(13_300, 13_300), lambda: b"x" * (8 * MiB)) for m in posted("/sdapi/v1/png-info", lambda f=f: {"image": text(f)})(host)], (200, *REFUSED), cpu=8, answer=5 * MiB, rss=220 * MiB),
    row("1,900 options, and long ones", "fields of one request", posted("/sdapi/v1/options", {f"o{i}": i for i in range(1900)}, {"sd_model_checkpoint": "m" * 60_000}, {"x": "y" * 60_000}, {"x": [[[]]] * 600}), (200, *REFUSED), cpu=6),
    row("200 questions how far a picture is", "work for one client", lambda host: [], (200, 429), Polling, cpu=20, answer=MiB),
    row("300 interruptions, and lists for menus", "work of one client", lambda host: [*posted("/sdapi/v1/interrupt", {}, n=150)(host), *(m for p in ("samplers", "options", "memory", "sd-models") for m in get(f"/sdapi/v1/{p}", 40)(host))], (200, 429), cpu=10, at_once=4),

    # Hugging Face and OpenAI
    row("bare bombs at the root", "pictures of a request", bare(scans, lambda: png(13_300, 13_300), lambda: png(96, 96, before=chunk(b"tEXt", b"a\0") * 1_500_000), lambda: bytes(20 * MiB), large), (200, *REFUSED), cpu=15, answer=MiB, rss=300 * MiB),
    row("bare bytes of no kind, and prompts in an address", "the kind of a body", lambda host: [*bare(lambda: b"\xff" * MiB, kind="application/octet-stream")(host), *bare(plain, path="/?prompt=" + "a" * 6000)(host), *bare(plain, path="/")(host), *bare(lambda: b"x" * MiB, kind="")(host)], (200, *REFUSED), cpu=8, answer=MiB),
    row("edits with bombs for masks", "pictures of a request", lambda host: [m for make in (edit_json, edit_form) for a, b in ((plain, scans), (scans, plain), (plain, large), (plain, plain), (plain, lambda: photo(4600, 3200, quality=30))) for m in make(a, b)(host)], (200, *REFUSED), cpu=30, answer=MiB, rss=500 * MiB),
    row("pictures at addresses, fetched 60 times each", "pictures that are kept", lambda host: [], (200, 404, 414, 429), Shelf, cpu=12, answer=MiB),

    # masks
    row("masks that are bombs", "pictures of a request", lambda host: [m for f in (scans, lambda: png(13_300, 13_300), lambda: png(4000, 100), lambda: b"x" * MiB) for m in masked(plain, f)(host)], REFUSED, cpu=10, rss=300 * MiB),
    row("large pictures under a mask, one after the other", "work around the model", masked(large, white, n=4), (200, *REFUSED), cpu=40, answer=70 * MiB, at_once=2, rss=700 * MiB),

    row("1,000 readers of one job", "readers of a job", lambda host: [], {SILENT, 200, 202, 429}, Watchers, at_once=1000, cpu=30, rss=300 * MiB, answer=MiB),
)
