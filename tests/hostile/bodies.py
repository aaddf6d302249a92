"""JSON, forms and words: bodies that are long, deep, wide, or mean more work than they look like."""
import json, random, string, struct, zlib

from .attack import MiB, http, question, row

REFUSED = (400, 413, 422)


def words(n, length=5, seed=7):
    r = random.Random(seed)
    return " ".join("".join(r.choices(string.ascii_lowercase, k=length)) for _ in range(n))


def receipt(**changed):
    """A receipt as this engine writes it; the model is the embedded one."""
    return {"prompt": "an owl", "negativePrompt": "", "width": 128, "height": 128, "steps": 1, "guidanceScale": 1.0, "strength": None, "seed": 1, "temperature": 0.7,
            "scheduler": "lcm", "model": "embedded", "revision": None, "lora": None, "precision": "fp32", "backend": "torch", "device": "cpu", "versions": {}} | changed


def png_of(receipt):
    """A PNG that is nothing but its receipt."""
    text = b"aura\0" + bytes(4) + json.dumps(receipt).encode()
    chunk = struct.pack(">I", len(text)) + b"iTXt" + text
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", zlib.crc32(chunk[4:]))


def generate(**fields): return lambda host: [question(host, steps=1, **fields)]


def body(path, make, **headers): return lambda host: [http(host, path, make(), **headers)]


def wide(n): return b'{"prompt":"a",' + b",".join(b'"k%d":0' % i for i in range(n)) + b"}"


def multipart(parts, size=1, name="p%d", file=False):
    kind = '; filename="x.png"\r\ncontent-type: image/png' if file else ""
    one = lambda i: f'--cut\r\ncontent-disposition: form-data; name="{name % i if "%" in name else name}"{kind}\r\n\r\n{"x" * size}\r\n'
    return "".join(map(one, range(parts))).encode() + b"--cut--\r\n"


FORM = "multipart/form-data; boundary=cut"

BODIES = (
    # the planner: words that a model does not know
    row("330 random words", "spelling help of one prompt", generate(prompt=words(330)), {200}),
    row("330 random words of twelve letters", "spelling help of one prompt", generate(prompt=words(150, 12)), {200}),
    row("333 slips of known words", "spelling help of one prompt", generate(prompt=" ".join(["aple", "rde", "blu", "hosue", "dgo"] * 66)[:1990]), {200}),
    row("one word of 2,000 letters", "spelling help of one word", generate(prompt="q" * 2000), {200}),
    row("1,000 unknown words, twenty times", "spelling help of one client", lambda host: [question(host, prompt=words(330, seed=i), steps=1) for i in range(20)], {200, 429}, cpu=12, at_once=4),
    row("negative prompt of random words", "spelling help of one prompt", generate(prompt="an owl", negativePrompt=words(330)), {200}),
    row("1,990 combining marks", "tokens of one prompt", generate(prompt="e" + "\u0301\u0489" * 990), {200}),
    row("zalgo, direction marks and joiners", "tokens of one prompt", generate(prompt="\u202e\u200d\ufeff" + "o\u0335\u0321\u0488" * 300), {200}),
    row("660 emoji families", "tokens of one prompt", generate(prompt="👨‍👩‍👧‍👦" * 180), {200}),
    row("300 LoRA tags in a prompt", "tokens of one prompt", generate(prompt="owl " + "<lora:a:1>" * 190), {200, 422}),
    row("a LoRA that is not there", "names of LoRAs", generate(prompt="an owl", lora="x" * 60), {422}),
    row("thousands of LoRA aliases", "a field that is no list", generate(prompt="an owl", lora=["a%d" % i for i in range(5000)]), REFUSED),
    row("lone surrogates", "text that is no Unicode", body("/generate", lambda: b'{"prompt":"\\ud800\\udfff\\ud800"}'), {400, 422}),
    row("zero bytes and controls", "text that nobody sees", generate(prompt="an owl" + "\x00\x01\x02\x1b[2J" * 100), {200, 422}),

    # the parser
    row("32 MiB of nested lists", "a body of /generate", body("/generate", lambda: b"[" + b"[]," * (11 * MiB - 2) + b"[]]"), REFUSED),
    row("32 MiB of nested lists without the key", "a body before the key", body("/generate", lambda: b"[" + b"[]," * (11 * MiB - 2) + b"[]]"), {401}, keyed=True),
    row("2.5 million keys", "errors of one request", body("/generate", lambda: wide(2_500_000)), REFUSED),
    row("5,000 keys in 60 KiB", "errors of one request", body("/generate", lambda: wide(5_000)), REFUSED),
    row("deep lists in 64 KiB", "depth of JSON", body("/generate", lambda: b'{"prompt":' + b"[" * 30_000 + b"]" * 30_000 + b"}"), REFUSED),
    row("deep objects in 64 KiB", "depth of JSON", body("/refine", lambda: b'{"config":' * 6_000 + b"1" + b"}" * 6_000), REFUSED),
    row("deep lists in a picture's body", "depth of JSON", body("/refine", lambda: b"[" * MiB + b"]" * MiB), REFUSED),
    row("5,000 times the same key", "keys of one object", body("/generate", lambda: b"{" + b'"prompt":"a",' * 5_000 + b'"steps":1}'), (200, *REFUSED)),
    row("a seed of 60,000 digits", "digits of a number", body("/generate", lambda: b'{"prompt":"a","seed":' + b"9" * 60_000 + b"}"), REFUSED),
    row("a seed of 4,000 digits", "digits of a number", body("/generate", lambda: b'{"prompt":"a","seed":' + b"9" * 4_000 + b"}"), REFUSED),
    row("numbers beyond all bounds", "numbers", lambda host: [http(host, "/generate", b'{"prompt":"a","temperature":%s}' % x) for x in (b"1e999999", b"NaN", b"-Infinity", b"1e308", b"-0", b"0.1e-400")], (200, *REFUSED), cpu=6),
    row("limits of every number", "work of one request", lambda host: [question(host, prompt="a", **f) for f in ({"steps": 10**9}, {"n": 10**9}, {"guidanceScale": 1e300}, {"deadlineSeconds": 1e300}, {"seed": 2**63}, {"aspectRatio": "9999:1"}, {"aspectRatio": "1:1" * 5000})], {422, 413}, cpu=6),
    row("a body that is no JSON", "a body", lambda host: [http(host, "/generate", x) for x in (b"", b"\xff\xfe{\x00", b"\xef\xbb\xbf{}", b'{"prompt"', b"null", b"7", b'"' + b"a" * 60_000)], REFUSED, cpu=6),
    row("prompts of 100 KB", "a body of /generate", generate(prompt="a " * 50_000), REFUSED),
    row("prompts of 1 MB", "a body of /generate", generate(prompt="a " * 500_000), REFUSED),
    row("an announced 33 MiB", "a body", lambda host: [http(host, "/refine", b"{}", length=33 * MiB + 1)], {413}),
    row("a gzip bomb", "a compressed body", body("/generate", lambda: b"\x1f\x8b" + b"\0" * 1000, content_encoding="gzip"), {415}),
    row("text for JSON", "the kind of a body", lambda host: [http(host, "/generate", b"prompt=a", kind="text/plain"), http(host, "/generate", b"prompt=a", kind="application/x-www-form-urlencoded"), http(host, "/generate", b'{"prompt":"a"}', kind="")], (200, 400, 415, 422), cpu=6),

    row("a million quotation marks in a text", "a long text of JSON", body("/refine", lambda: b'{"refinePrompt":"x","images":["' + b'\\"' * (8 * MiB) + b'"]}'), {400}),
    row("a million backslashes in a text", "a long text of JSON", body("/refine", lambda: b'{"refinePrompt":"x","images":["' + b'\\\\' * (8 * MiB) + b'"]}'), {400}),
    row("a method of 20,000 letters", "a line of the log", lambda host: [b"X" * 20_000 + b" / HTTP/1.1\r\nhost: " + host.encode() + b"\r\nconnection: close\r\n\r\n"], {400, 405, 431}),

    # receipts
    row("a receipt whose prompt is a number", "a picture's receipt", body("/", lambda: png_of(receipt(prompt=123)), **{"content-type": "image/png"}), {422}),
    row("1 million versions", "a receipt", body("/replay", lambda: json.dumps({"receipt": receipt(versions={f"k{i}": "1" for i in range(1_000_000)})}).encode()), REFUSED, cpu=6),
    row("1,000 versions", "an answer about a receipt", body("/replay", lambda: json.dumps({"receipt": receipt(versions={f"k{i}" * 20: "1" for i in range(1000)})}).encode()), REFUSED),
    row("long names in a receipt", "an answer about a receipt", body("/replay", lambda: json.dumps({"receipt": receipt(model="m" * 50_000, scheduler="s" * 50_000, versions={"v" * 50_000: "w" * 50_000})}).encode()), REFUSED),
    row("10,000 corrections and timings", "a receipt", body("/replay", lambda: json.dumps({"receipt": receipt(corrections=["c"] * 10_000, timings={f"t{i}": 1 for i in range(10_000)})}).encode()), REFUSED),
    row("sizes that nobody draws", "shapes of the model", lambda host: [question(host, "/replay", receipt=receipt(width=w, height=h)) for w, h in ((65536, 65536), (8, 8), (128, 8192), (129, 131), (-64, 64), (0, 0))], {422}, cpu=6),
    row("50 steps at the largest size", "work of one receipt", lambda host: [question(host, "/replay", receipt=receipt(steps=10**6))], {422}),

    # the same by other doors
    row("1 million versions in a job", "a receipt", body("/jobs", lambda: json.dumps({"route": "replay", "request": {"receipt": receipt(versions={f"k{i}": "1" for i in range(1_000_000)})}}).encode()), REFUSED, cpu=6),
    row("5,000 keys in a job", "errors of one request", body("/jobs", lambda: b'{"route":"generate","request":' + wide(5_000) + b"}"), REFUSED),
    row("a job of no kind, of two, of many", "a job", lambda host: [http(host, "/jobs", x) for x in (b"{}", b'{"route":"' + b"r" * 50_000 + b'"}', b'{"route":["generate"],"request":[]}', b'{"route":"generate","request":{"prompt":"a"},"previews":"' + b"p" * 5000 + b'"}')], REFUSED, cpu=6),
    row("5,000 keys for Hugging Face's route", "errors of one request", body("/", lambda: b'{"inputs":"a","parameters":' + wide(5_000) + b"}"), (200, *REFUSED)),
    row("330 random words by OpenAI's route", "spelling help of one prompt", body("/v1/images/generations", lambda: json.dumps({"prompt": words(330)}).encode()), {200}, answer=MiB),

    # forms
    row("10,000 parts", "parts of a form", body("/v1/images/edits", lambda: multipart(10_000), kind=FORM), REFUSED),
    row("10,000 files", "files of a form", body("/v1/images/edits", lambda: multipart(10_000, file=True, name="image"), kind=FORM), REFUSED),
    row("10,000 parts of one name", "parts of a form", body("/v1/images/edits", lambda: multipart(10_000, name="prompt"), kind=FORM), REFUSED),
    row("a part of 20 MiB that is no file", "a field of a form", body("/v1/images/edits", lambda: multipart(1, 20 * MiB, "prompt"), kind=FORM), REFUSED),
    row("a boundary that never comes", "a form", body("/v1/images/edits", lambda: b"--cu" * 200_000, kind=FORM), REFUSED),
    row("a form in Punycode and in other encodings", "a field of a form", lambda host: [http(host, "/v1/images/edits", multipart(1, 900_000, "prompt"), kind=f"{FORM}; charset={c}") for c in ("punycode", "idna", "undefined", "utf-16")], REFUSED),
    row("a form without a boundary", "a form", body("/v1/images/edits", lambda: multipart(3), kind="multipart/form-data"), REFUSED),
    row("100,000 form fields", "fields of a form", body("/v1/images/generations", lambda: b"&".join(b"k%d=0" % i for i in range(100_000)), kind="application/x-www-form-urlencoded"), (*REFUSED, 415)),
    row("5,000 keys for OpenAI's route", "errors of one request", body("/v1/images/generations", lambda: wide(5_000)), (200, *REFUSED)),
)
