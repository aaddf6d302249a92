"""Picture files: small outside, large or laborious inside. Sizes of files are in the names where they matter."""
import base64, io, json, struct, zlib

from PIL import Image

from .attack import MiB, http, row

REFUSED = (413, 422)


def chunk(kind, data=b""): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, mode=6, depth=8, before=b"", channels=4):
    """A PNG of zeros that is a thousandth of its pixels; `before`: chunks between the header and the pixels."""
    packer, line = zlib.compressobj(9), bytes(1 + width * channels * depth // 8)
    rows = min(height, max(1, MiB // len(line)))
    data = b"".join(packer.compress(line * rows) for _ in range(height // rows)) + packer.compress(line * (height % rows)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, mode, 0, 0, 0)) + before + chunk(b"IDAT", data) + chunk(b"IEND")


def text_bomb(kind=b"zTXt", size=60 * MiB):
    name = {b"zTXt": b"bomb\0\0", b"iCCP": b"icc\0\0", b"iTXt": b"aura\0\1\0\0\0"}[kind]
    return chunk(kind, name + zlib.compress(bytes(size), 9))


def saved(im, format, **options):
    out = io.BytesIO()
    im.save(out, format, **options)
    return out.getvalue()


def progressive(scans):
    """A progressive JPEG whose refinement scans are repeated: a few bytes each, the whole picture's work each."""
    raw = saved(Image.effect_noise((1024, 1024), 40).convert("RGB"), "JPEG", progressive=True, quality=20)
    starts = [i for i in range(len(raw) - 1) if raw[i:i + 2] == b"\xff\xda"]
    last = raw[starts[-1]:-2]
    empty = last[:2 + int.from_bytes(last[2:4], "big")]      # the header of a scan, without its data
    return raw[:-2] + empty * scans + b"\xff\xd9"


def exif_bomb(entries):
    """EXIF with as many entries as its 64 KiB hold, and a directory that points at itself."""
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", entries) + b"".join(struct.pack("<HHII", 0x0112, 3, 1, 6) for _ in range(entries)) + struct.pack("<I", 8)
    raw = saved(Image.new("RGB", (96, 64), "red"), "JPEG")
    return raw[:2] + b"\xff\xe1" + struct.pack(">H", 8 + len(tiff)) + b"Exif\0\0" + tiff + raw[2:]


def frames(n, format, size=(96, 96)):
    made = [Image.new("RGB", size, (i % 256, i // 256 % 256, 0)) for i in range(n)]
    return saved(made[0], format, save_all=True, append_images=made[1:], **({"duration": 20} if format != "MPO" else {}))


def overfull():
    """A small PNG whose data unpack to 400 MiB."""
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(MiB)) for _ in range(400)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 96, 96, 8, 2, 0, 0, 0)) + chunk(b"IDAT", data) + chunk(b"IEND")


def segments(marker, n, size=8):
    """A JPEG with `n` segments of one kind before its picture."""
    raw = saved(Image.new("RGB", (96, 96), "red"), "JPEG")
    return raw[:2] + (b"\xff" + bytes([marker]) + struct.pack(">H", size + 2) + bytes(size)) * n + raw[2:]


def photo(width, height, **options): return saved(Image.effect_noise((width, height), 40).convert("RGB"), "JPEG", **options)


def refine(*files, n=1, path="/refine"):
    """Requests that refine the pictures made by `files`, `n` of them."""
    def requests(host):
        body = json.dumps({"refinePrompt": "an owl", "images": [base64.b64encode(f()).decode() for f in files], "config": {"steps": 1, "strength": 0.3}}).encode()
        return [http(host, path, body)] * n
    return requests


def masked(file, n=4, asked=1, **config):
    """`asked` requests that refine `n` times the picture made by `file`, under a mask that is the same file."""
    def requests(host):
        text = base64.b64encode(file()).decode()
        body = json.dumps({"refinePrompt": "an owl", "images": [text] * n, "mask": text, "config": {"steps": 1, **config}}).encode()
        return [http(host, "/refine", body)] * asked
    return requests


def replay(file): return lambda host: [http(host, "/replay", json.dumps({"image": base64.b64encode(file()).decode()}).encode())]


def as_file(file, path="/v1/images/edits"):
    def requests(host):
        part = b'--cut\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\ncontent-type: image/png\r\n\r\n' + file() + b"\r\n"
        return [http(host, path, part + b'--cut\r\ncontent-disposition: form-data; name="prompt"\r\n\r\nan owl\r\n--cut--\r\n', kind="multipart/form-data; boundary=cut")]
    return requests


def plain(): return saved(Image.new("RGB", (96, 96), "teal"), "PNG")


PICTURES = (
    row("two JPEGs of 8,000 scans", "scans of a JPEG", refine(lambda: progressive(8000), n=2), {422}, cpu=6, at_once=2),
    row("a JPEG of 8,000 scans by OpenAI's route", "scans of a JPEG", as_file(lambda: progressive(8000)), {400, 413, 422}, cpu=6),
    row("a PNG of 1.9 million chunks", "chunks of a PNG", refine(lambda: png(96, 96, before=chunk(b"teXt") * 1_900_000)), REFUSED, cpu=6),
    row("a PNG of 50,000 chunks", "chunks of a PNG", refine(lambda: png(96, 96, before=chunk(b"tEXt", b"a\0b") * 50_000)), (200, *REFUSED), cpu=6),
    row("four PNGs of 16 Mpx RGBA, three times", "pixels of all decodes together", refine(*[lambda: png(4000, 4000)] * 4, n=3), (200, 422, 429), cpu=25, rss=700 * MiB, at_once=3),
    row("four WebPs of 16 Mpx under a mask", "memory of a request's pictures", masked(lambda: saved(Image.new("RGBA", (4000, 4000), (200, 90, 30, 128)), "WEBP", lossless=True, quality=0, method=0), asked=3), {422}, cpu=6, at_once=3),
    row("four large JPEGs under a mask, in line", "turns of pictures", masked(lambda: saved(Image.new("L", (2800, 2800), 200), "JPEG"), asked=6), (200, 429), cpu=30, rss=700 * MiB, answer=12 * MiB, at_once=6),
    row("a PNG of 13,300 x 13,300", "pixels of a picture", refine(lambda: png(13_300, 13_300)), {422}, cpu=6),
    row("a receipt's PNG of 13,300 x 13,300", "pixels of a receipt", replay(lambda: png(13_300, 13_300)), {422}, cpu=6),
    row("a receipt's PNG with packed text", "text of a PNG", replay(lambda: png(96, 96, before=text_bomb())), {422}, cpu=6, rss=200 * MiB),
    row("a receipt's PNG with a packed receipt", "text of a PNG", replay(lambda: png(96, 96, before=text_bomb(b"iTXt"))), {422}, cpu=6, rss=200 * MiB),
    row("a PNG that says 2 billion pixels", "pixels of a picture", refine(lambda: png(96, 96)[:16] + struct.pack(">II", 46_000, 46_000) + png(96, 96)[24:]), {422}),
    row("a PNG with 60 MiB of packed text", "text of a PNG", refine(lambda: png(96, 96, before=text_bomb())), (200, 422), cpu=6, rss=200 * MiB),
    row("a PNG with 60 MiB of packed profile", "profile of a picture", refine(lambda: png(96, 96, before=text_bomb(b"iCCP"))), (200, 422), cpu=6, rss=200 * MiB),
    row("a PNG of 16 bits", "bits of a picture", refine(lambda: png(2000, 2000, depth=16)), (200, 422), cpu=5, rss=300 * MiB),
    row("a PNG that stops in the middle", "a damaged picture", refine(lambda: png(512, 512)[:-40]), {422}),
    row("a JPEG with 5,000 EXIF entries", "EXIF of a picture", refine(lambda: exif_bomb(5000)), (200, 422)),
    row("a JPEG that is read at a side of 65,500", "pixels of a picture", refine(lambda: saved(Image.new("L", (65_500, 100)), "JPEG")), {422}, cpu=6),
    row("an APNG of 500 frames", "frames of a picture", refine(lambda: frames(500, "PNG")), (200, 422), cpu=6),
    row("a WebP of 500 frames", "frames of a picture", refine(lambda: frames(500, "WEBP")), (200, 422), cpu=6),
    row("an MPO of 40 pictures", "frames of a picture", refine(lambda: frames(40, "MPO")), (200, 422), cpu=6),
    row("a GIF, a TIFF, a BMP, an AVIF, a PDF", "formats", lambda host: [m for f in ("GIF", "TIFF", "BMP", "AVIF", "PDF") for m in refine(lambda f=f: saved(Image.new("RGB", (96, 96)), f))(host)], {422}, cpu=6),
    row("a TIFF that is called a PNG", "formats", refine(lambda: b"\x89PNG\r\n\x1a\n" + saved(Image.new("RGB", (96, 96)), "TIFF")), {422}),
    row("an SVG, an address, a path", "formats", lambda host: [http(host, "/refine", json.dumps({"refinePrompt": "x", "images": [x]}).encode()) for x in ("PHN2Zy8+", "http://169.254.169.254/", "file:///etc/passwd", "/etc/passwd", "data:image/png;base64,", "")], {422}, cpu=6),
    row("a small PNG that unpacks to 400 MiB", "data of a PNG", refine(overfull), (200, 422), cpu=6),
    row("a PNG with 300 long texts", "text of a PNG", refine(lambda: png(96, 96, before=chunk(b"tEXt", b"a\0" + bytes(30_000).replace(b"\0", b"b")) * 300)), (200, 422), cpu=6),
    row("a palette without colours", "a damaged picture", refine(lambda: png(96, 96, mode=3, channels=1)), (200, 422)),
    row("a gray PNG of 1 bit and 15 Mpx", "pixels of a picture", refine(lambda: png(4000, 3750, mode=0, depth=1, channels=1)), (200, 422), cpu=5, rss=300 * MiB),
    row("JPEGs with 5,000 comments, tables and profiles", "segments of a JPEG", lambda host: [m for k in (0xFE, 0xDB, 0xC4, 0xE2, 0xE1) for m in refine(lambda k=k: segments(k, 5000))(host)], (200, 422), cpu=5),
    row("a JPEG of 15 Mpx, turned by its EXIF", "pixels of a picture", refine(lambda: photo(4600, 3200, quality=30, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0")), (200, 422), cpu=6, rss=300 * MiB),
    row("a WebP of 16,383 x 16,383", "pixels of a picture", refine(lambda: b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8L" + struct.pack("<I", 10) + b"\x2f" + struct.pack("<I", 0x0FFFFFFF) + bytes(5)), {422}),
    row("1,000 pictures", "pictures of a request", lambda host: [http(host, "/refine", json.dumps({"refinePrompt": "x", "images": [base64.b64encode(plain()).decode()] * 1000}).encode())], REFUSED),
    row("20 MiB of base64 that is none", "base64", lambda host: [http(host, "/refine", b'{"refinePrompt":"x","images":["' + b"A" * (20 * MiB) + b'!"]}')], REFUSED, cpu=6, rss=220 * MiB),
    row("20 MiB of base64 that is no picture", "base64", lambda host: [http(host, "/refine", b'{"refinePrompt":"x","images":["' + b"AAAA" * (5 * MiB) + b'"]}')], REFUSED, cpu=6, rss=220 * MiB),
    row("20 MiB of spaces in base64", "base64", lambda host: [http(host, "/refine", b'{"refinePrompt":"x","images":["' + b"A   " * (5 * MiB) + b'"]}')], REFUSED, cpu=5, rss=220 * MiB),
)
