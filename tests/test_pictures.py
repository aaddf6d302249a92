"""Pictures from anybody: the right colours, facts before pixels, limits that hold, one path for files and PIL pictures."""
import io, json, random, struct, subprocess, sys, time, zlib
from pathlib import Path

import pytest
from PIL import Image

from aura_engine.images import MAX_PARTS, MAX_SCANS, PNG_SIGNATURE, decode, decode_cost, drafted, encode, essential, facts_of, from_base64
from aura_engine.images import from_pil, png_parts, receipt_of, to_base64
from aura_engine.types import Invalid, Receipt

CASES = Path(__file__).parent / "cases" / "pictures"
MiB = 2**20
RECEIPT = Receipt("a red apple", "", 64, 64, 4, 1.0, None, 7, 0.7, "lcm", "embedded", None, None, "fp32", "torch", "cpu", {"torch": "2.13.0"})


def saved(im, fmt="PNG", **options):
    out = io.BytesIO()
    im.save(out, fmt, **options)
    return out.getvalue()


def photo(size=(160, 120)): return Image.effect_noise(size, 60).convert("RGB")


def chunk(kind, data=b""): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(png, chunks): return png[:33] + chunks + png[33:]


def black(width, height, mode=2, channels=3):
    """A PNG of zeros, a thousandth of its pixels."""
    packer, line = zlib.compressobj(9), bytes(1 + width * channels)
    data = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)
    return PNG_SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND")


def scans(n):
    """A progressive JPEG with `n` empty scans more."""
    raw = saved(photo((512, 512)), "JPEG", progressive=True, quality=20)
    last = raw[raw.rindex(b"\xff\xda"):-2]
    return raw[:-2] + last[:2 + int.from_bytes(last[2:4], "big")] * n + b"\xff\xd9"


# colours

RIGHT = {"alpha.png": (255, 255, 255), "gray16.png": (13, 13, 13), "gray16_trns.png": (13, 13, 13), "exif6.jpg": (10, 238, 247),
         "icc_1mb.png": (13, 13, 242), "ztxt_1mb.png": (13, 13, 242), "adobergb.jpg": (0, 201, 37)}


@pytest.mark.parametrize("name", RIGHT)
def test_the_colours_of_a_file_are_right(name):
    assert decode((CASES / name).read_bytes()).getpixel((5, 5)) == RIGHT[name]


@pytest.mark.parametrize("name", [n for n in RIGHT if "1mb" not in n])           # those Pillow itself refuses to open
def test_a_picture_is_the_same_opened_or_as_bytes(name):
    data = (CASES / name).read_bytes()
    assert from_pil(Image.open(io.BytesIO(data))).tobytes() == decode(data).tobytes()


def test_a_phone_s_photo_stands_upright_in_all_eight_ways():
    upright = Image.new("RGB", (120, 80), "blue")
    upright.paste("red", (0, 0, 60, 40))
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}                   # Image.Transpose that undoes each
    for orientation, undo in back.items():
        stored, exif = upright.transpose(undo) if undo is not None else upright, Image.Exif()
        exif[0x0112] = orientation
        for made in (decode(saved(stored, "PNG", exif=exif)), decode(saved(stored, "WEBP", lossless=True, exif=exif))):
            assert made.size == (120, 80) and made.tobytes() == upright.tobytes(), orientation


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F", "PA", "La", "RGBa"])
def test_every_mode_of_pillow_becomes_rgb(mode):
    assert from_pil(Image.new(mode, (64, 64))).mode == "RGB"


def test_the_transparent_gray_of_16_bits_is_white():
    im = Image.new("I;16", (64, 64), 3449)
    im.putpixel((9, 9), 40_000)
    clear = decode(with_chunks(saved(im), chunk(b"tRNS", (3449).to_bytes(2, "big"))))
    assert clear.getpixel((5, 5)) == (255, 255, 255) and clear.getpixel((9, 9)) == (156, 156, 156)


def test_alpha_and_profile_together():
    from PIL import ImageCms
    profile = Image.open(CASES / "adobergb.jpg").info["icc_profile"]
    im = Image.new("RGBA", (64, 64), (59, 200, 60, 255))
    im.putpixel((5, 5), (59, 200, 60, 0))
    made = decode(saved(im, icc_profile=profile))
    assert made.getpixel((5, 5)) == (255, 255, 255) and made.getpixel((9, 9)) == (0, 201, 37)
    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert decode(saved(im.convert("RGB"), icc_profile=same)).getpixel((9, 9)) == (59, 200, 60)
    assert decode(saved(im.convert("RGB"), icc_profile=b"x" * 500)).getpixel((9, 9)) == (59, 200, 60)       # no profile at all


# facts and limits

@pytest.mark.parametrize("fmt, options, mode", [("PNG", {}, "RGB"), ("JPEG", {}, "RGB"), ("JPEG", {"progressive": True}, "RGB"), ("WEBP", {"lossless": True}, "RGB"), ("WEBP", {}, "RGB")])
def test_facts_are_pillows(fmt, options, mode):
    data = saved(photo((301, 203)), fmt, **options)
    facts = facts_of(data)
    assert (facts.format, facts.mode, facts.width, facts.height, facts.size) == (fmt, mode, 301, 203, len(data))
    assert facts.scans == (10 if options.get("progressive") else 1)


def test_frames_and_extras_are_counted():
    frames = [Image.new("RGB", (96, 96), c) for c in ("red", "green", "blue")]
    for fmt in ("PNG", "WEBP"):
        data = saved(frames[0], fmt, save_all=True, append_images=frames[1:])
        assert facts_of(data).frames == 3 and decode(data).getpixel((5, 5))[0] > 240
    assert facts_of(with_chunks(saved(frames[0]), chunk(b"tEXt", bytes(5000)))).extras == 5012


WRONG = {
    "scans": (lambda: scans(8000), f"at most {MAX_SCANS}"),
    "chunks": (lambda: with_chunks(saved(photo()), chunk(b"tEXt", b"a\0") * 1_000_000), f"at most {MAX_PARTS:,}"),
    "segments": (lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * 2_000_000 + saved(photo(), "JPEG")[2:], "readable"),
    "pixels": (lambda: black(4100, 4100), "megapixels"), "bomb": (lambda: with_size(65_500), "megapixels"),
    "ribbon": (lambda: saved(photo((640, 64))), "between 1:3 and 3:1"), "gif": (lambda: saved(photo(), "GIF"), "readable"),
    "tiff": (lambda: saved(photo(), "TIFF"), "readable"), "tiff called png": (lambda: PNG_SIGNATURE + saved(photo(), "TIFF"), "readable"),
    "empty": (lambda: b"", "readable"), "signature": (lambda: PNG_SIGNATURE, "readable"), "jpeg only": (lambda: b"\xff\xd8\xff", "readable"),
    "half": (lambda: saved(photo())[:9000], "damaged"), "webp half": (lambda: saved(photo(), "WEBP")[:900], "damaged"),
    "two headers": (lambda: with_chunks(saved(photo()), chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0))), None),
    "canvas": (lambda: canvas(), "damaged"), "riff": (lambda: b"RIFF\4\0\0\0WEBP", "readable"),
}


def with_size(side):
    data = saved(photo())
    return data[:16] + struct.pack(">II", side, side) + data[24:]


def canvas():
    """A WebP whose canvas is smaller than the picture in it."""
    inner = saved(photo((512, 512)), "WEBP")[12:]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + (95).to_bytes(3, "little") * 2 + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_for_little(name):
    make, words = WRONG[name]
    data, began = make(), time.process_time()
    if words is None:
        assert decode(data).size == (160, 120)                                    # only the first header counts
        return
    with pytest.raises(Invalid) as e: decode(data, "images.0")
    assert words in e.value.detail and e.value.errors[0].loc == "images.0" and len(e.value.detail) < 300
    assert time.process_time() - began < 2


def test_what_only_costs_is_dropped():
    """200 MB of packed text, as much of a profile, and 40 MB of comments: none of it is unpacked, the picture is read."""
    packed = zlib.compress(bytes(60 * MiB), 9)
    png = saved(photo())
    for extra in (chunk(b"zTXt", b"a\0\0" + packed), chunk(b"iTXt", b"a\0\1\0\0\0" + packed), chunk(b"iCCP", b"a\0\0" + packed)):
        began = time.process_time()
        assert decode(with_chunks(png, extra)).tobytes() == photo_of(png) and time.process_time() - began < 2
    jpeg = saved(photo(), "JPEG")
    assert decode(jpeg[:2] + (b"\xff\xfe" + (65_000).to_bytes(2, "big") + bytes(64_998)) * 600 + jpeg[2:]).size == (160, 120)
    parts = list(png_parts(with_chunks(png, chunk(b"tEXt", b"a\0b"))))
    assert essential(with_chunks(png, chunk(b"tEXt", b"a\0b")), parts) == png


def photo_of(png): return Image.open(io.BytesIO(png)).convert("RGB").tobytes()


def test_pixels_hidden_behind_the_picture_are_not_unpacked():
    """Half a gigabyte of zeros after the last row."""
    packer = zlib.compressobj(9)
    data = packer.compress(bytes((1 + 3 * 96) * 96)) + b"".join(packer.compress(bytes(MiB)) for _ in range(512)) + packer.flush()
    png = PNG_SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", 96, 96, 8, 2, 0, 0, 0)) + chunk(b"IDAT", data) + chunk(b"IEND")
    began = time.process_time()
    try: assert decode(png).size == (96, 96)
    except Invalid: pass
    assert time.process_time() - began < 2


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP"])
def test_damage_is_refused_or_read_and_nothing_else(fmt):
    pick, whole = random.Random(3), saved(photo((96, 80)), fmt)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(pick.choice((1, 2, 8))): data[pick.randrange(min(len(data), 400) if pick.random() < 0.7 else len(data))] = pick.randrange(256)
        try: assert decode(bytes(data[:pick.choice((len(data), pick.randrange(len(data)))) or None])).mode == "RGB"
        except Invalid as e: assert e.errors[0].loc == "images"


# what is read of a large one

def test_a_large_photo_is_read_at_the_size_the_model_can_use():
    jpeg, png = saved(photo((2400, 1800)), "JPEG"), saved(Image.new("RGB", (2400, 1800), "teal"))
    assert decode(jpeg, side=128).size == drafted(facts_of(jpeg), 128) == (300, 225)
    assert decode(png, side=128).size == (300, 225) and decode(png).size == decode(jpeg).size == (2400, 1800)
    assert decode(jpeg, side=2000).size == (2400, 1800)                            # never less than twice what is needed
    assert decode_cost(facts_of(jpeg), 128)[1] < decode_cost(facts_of(jpeg))[1] / 4


COSTS = """
import resource, sys, time
from aura_engine.images import decode, decode_cost, facts_of
data = open(sys.argv[1], "rb").read()
decode(open(sys.argv[2], "rb").read())
facts, before, began = facts_of(data), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
decode(data)
print(time.process_time() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, *decode_cost(facts))
"""


@pytest.mark.parametrize("fmt, options", [("PNG", {}), ("JPEG", {"progressive": True}), ("WEBP", {"method": 0})])
def test_the_predicted_cost_is_near_the_real_one(tmp_path, fmt, options):
    """Within a factor of four on any machine that runs this, and never far too little memory."""
    (tmp_path / "big").write_bytes(saved(Image.effect_noise((400, 300), 60).resize((2400, 1800)).convert("RGB"), fmt, **options))
    (tmp_path / "small").write_bytes(saved(photo(), fmt, **options))
    done = subprocess.run([sys.executable, "-c", COSTS, tmp_path / "big", tmp_path / "small"], cwd=CASES.parent.parent.parent, capture_output=True, text=True, check=True)
    spent, grown, seconds, held = map(float, done.stdout.split())
    assert spent < 4 * seconds + 0.2 and grown < 1.5 * held + 20 * MiB


# receipts

def test_a_receipt_is_read_without_its_picture():
    file = encode(photo(), "png", RECEIPT)
    assert receipt_of(file) == RECEIPT
    assert receipt_of(file[:16] + struct.pack(">II", 60_000, 60_000) + file[24:]) == RECEIPT      # no pixel is looked at
    assert receipt_of(file[:len(file) // 2]) == RECEIPT


NO_RECEIPT = {
    "none": lambda: saved(photo()), "jpeg": lambda: saved(photo(), "JPEG"), "not json": lambda: texted(b"{"), "a list": lambda: texted(b"[]"),
    "a number": lambda: texted(b"7"), "deep": lambda: texted(b"[" * 60_000), "packed": lambda: with_chunks(saved(photo()), chunk(b"iTXt", b"aura\0\1\0\0\0" + zlib.compress(bytes(60 * MiB), 9))),
    "long": lambda: texted(json.dumps(RECEIPT.to_json() | {"prompt": "x" * 100_000}).encode()), "check sum": lambda: damaged(encode(photo(), "png", RECEIPT)),
    "chunks": lambda: with_chunks(saved(photo()), chunk(b"tEXt", b"a\0") * 1_000_000), "empty": lambda: b"", "unknown": lambda: texted(json.dumps(RECEIPT.to_json() | {"x": 1}).encode()),
}


def texted(text): return with_chunks(saved(photo()), chunk(b"iTXt", b"aura" + bytes(5) + text))


def damaged(file): return file.replace(b"red apple", b"red appel")


@pytest.mark.parametrize("name", NO_RECEIPT)
def test_what_is_no_receipt_is_refused_for_little(name):
    data, began = NO_RECEIPT[name](), time.process_time()
    with pytest.raises(Invalid, match="a PNG made by this engine"): receipt_of(data)
    assert time.process_time() - began < 1


def test_base64_is_strict():
    assert from_base64("data:image/webp;base64," + to_base64(b"abc")) == b"abc"
    for bad in ("http://169.254.169.254/", "file:///etc/passwd", "YWJ", "YW-_", "data:text/html;base64,YWJj", "ä", "A" * 4001):
        with pytest.raises(Invalid) as e: from_base64(bad, "images.1")
        assert e.value.errors[0].loc == "images.1" and len(e.value.detail) < 250
