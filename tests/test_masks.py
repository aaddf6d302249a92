"""Masks: latents equal to the stock inpaint pipelines, pixels outside untouched, and the same request through every door."""
import base64, io
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw, ImageFilter

import tiny
from aura_engine.config import load_settings
from aura_engine.engine import Engine
from aura_engine.denoisers import first_pixels
from aura_engine.images import decode_mask
from aura_engine.loader import load
from aura_engine.masks import Region, Inpainting, box_around, widened
from aura_engine.models import ROWS, SAMPLERS, executed_steps
from aura_engine.planning import plan, prepare
from aura_engine.trajectory import TextCache, Trajectory, advance, decode_latents
from aura_engine.types import GenerateRequest, Invalid, Picture, RefineRequest

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8))
MASK = Image.new("L", (128, 128))
ImageDraw.Draw(MASK).ellipse((30, 40, 90, 100), fill=255)
SOFT = MASK.filter(ImageFilter.GaussianBlur(6))


def png(im):
    out = io.BytesIO()
    im.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


@pytest.fixture(scope="module", params=["sd15", "sd15-lcm", "sdxl", "sd15-inpaint", "sdxl-inpaint"])
def family(request, tmp_path_factory):
    folder = tiny.save(tmp_path_factory.mktemp(request.param) / "model", request.param)
    return load(load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu"))


def masked(strength=0.5, sampler="ddim", guidance=1.0, steps=4, mask=SOFT, size=(128, 128), photo=PHOTO, box=None, padding=None, **more):
    inpainting = Inpainting(photo, mask, box or Region(0, 0, *photo.size), padding)
    return Picture("a red apple", *size, steps=steps, guidance_scale=guidance, seed=3, temperature=1.0, scheduler=sampler, strength=strength,
                   init=inpainting.part(size), inpainting=inpainting, **more)


def run(parts, p):
    t = Trajectory(parts, p, TextCache(parts))
    while not t.done: advance([t], parts.unet)
    return t


def stock(parts, p):
    """(latents, picture) of the same through diffusers' own inpaint pipeline."""
    stem, inpainting = "StableDiffusionXL" if parts.xl else "StableDiffusion", p.inpainting
    if parts.xl: args = dict(vae=parts.vae, text_encoder=parts.text_encoders[0], text_encoder_2=parts.text_encoders[1], tokenizer=parts.tokenizers[0], tokenizer_2=parts.tokenizers[1], add_watermarker=False)
    else: args = dict(vae=parts.vae, text_encoder=parts.text_encoders[0], tokenizer=parts.tokenizers[0], safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe = getattr(diffusers, stem + "InpaintPipeline")(**args, unet=parts.unet, scheduler=parts.scheduler(p.scheduler))
    pipe.set_progress_bar_config(disable=True)
    sampler = SAMPLERS[p.scheduler]
    steps = executed_steps(p.steps, p.strength, sampler.max_steps)[1]
    last = {}
    picture = pipe(p.prompt, image=inpainting.picture, mask_image=inpainting.mask, strength=p.strength, num_inference_steps=steps, guidance_scale=p.guidance_scale, width=p.width, height=p.height,
                padding_mask_crop=inpainting.padding, generator=torch.Generator().manual_seed(p.seed), callback_on_step_end=lambda pipe, i, t, given: last.update(given) or {}, **dict(sampler.step)).images[0]
    return last["latents"], picture


# the model's part

@pytest.mark.parametrize("strength, guidance", [(0.8, 1.0), (1.0, 3.0)])
@pytest.mark.parametrize("sampler", ["lcm", "ddim", "euler", "euler-a", "tcd", "dpm"])
def test_latents_are_those_of_the_stock_pipeline(family, sampler, strength, guidance):
    p = masked(strength, sampler, guidance)
    ours, (theirs, _) = run(family, p).latents, stock(family, p)
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())


@pytest.fixture(scope="module")
def plain(tmp_path_factory): return load(load_settings(SD_MODEL_ID=str(tiny.save(tmp_path_factory.mktemp("plain") / "model")), SD_DEVICE="cpu"))


@pytest.mark.parametrize("sampler", ["dmd2", "tcd-0.3", "euler-x0", "dpm-sde"])
def test_so_are_those_of_the_other_samplers(plain, sampler):
    p = masked(0.5, sampler, steps=2)
    ours, (theirs, _) = run(plain, p).latents, stock(plain, p)
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())


@pytest.mark.parametrize("sampler", ["ddim", "euler-a"])
def test_a_tiny_vae_draws_no_latents(plain, sampler):
    """Its encoder answers latents, so the pipelines draw less noise for it."""
    torch.manual_seed(0)
    parts, p = replace(plain, vae=tiny.tiny_vae().eval().requires_grad_(False)), masked(0.8, sampler)
    ours, (theirs, _) = run(parts, p).latents, stock(parts, p)
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())


def test_a_padded_crop_is_the_stock_pipelines(family):
    """The same box, the same part at the model's size, the same latents, and what comes back differs by a rounding of the blend."""
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 255, (512, 512, 3), dtype=np.uint8))
    mask = Image.new("L", photo.size)
    ImageDraw.Draw(mask).rectangle((200, 220, 263, 283), fill=255)
    box = widened(box_around(mask, 32), (128, 128), photo.size)
    assert box == VaeImageProcessor.get_crop_region(mask, 128, 128, 32) == (168, 188, 296, 316)
    p = masked(0.75, mask=mask, photo=photo, box=box, padding=32)
    t, (latents, theirs) = run(family, p), stock(family, p)
    assert (t.latents - latents).abs().max() <= 1e-5 * max(1, latents.abs().max())
    ours = p.inpainting.paste(decode_latents(family, t.latents)[0])
    assert ours.size == photo.size and np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 2


def test_boxes_are_those_of_diffusers():
    pick = np.random.default_rng(2)
    for _ in range(300):
        w, h = map(int, pick.integers(64, 400, 2))
        x, y = int(pick.integers(0, w - 1)), int(pick.integers(0, h - 1))
        mask = Image.new("L", (w, h))
        mask.paste(255, (x, y, int(pick.integers(x + 1, w + 1)), int(pick.integers(y + 1, h + 1))))
        shape, padding = tuple(map(int, pick.integers(8, 100, 2) * 8)), int(pick.integers(0, 64))
        assert widened(box_around(mask, padding), shape, mask.size) == VaeImageProcessor.get_crop_region(mask, *shape, padding), (mask.getbbox(), shape, padding, w, h)


def test_an_inpainting_unet_draws_without_a_mask_as_under_a_white_one(tmp_path):
    parts = load(load_settings(SD_MODEL_ID=str(tiny.save(tmp_path / "model", "sd15-inpaint")), SD_DEVICE="cpu"))
    white = masked(1.0, mask=Image.new("L", (128, 128), 255))
    assert torch.equal(run(parts, white).latents, run(parts, replace(white, init=None, inpainting=None, strength=None)).latents)


def test_a_line_between_the_corners_is_drawn():
    line = Image.new("L", (128, 128))
    line.paste(255, (3, 3, 60, 5))
    seen = first_pixels(np.asarray(line) > 0, 8)
    assert seen.sum() == 8 and seen[0, :8].all()


# planning

def refine(mask, images=(PHOTO,), row=ROWS["sd15"], **config):
    ask = RefineRequest(refine_prompt="a hat", images=[png(im) for im in images], mask=mask and png(mask), config=config)
    return prepare(ask, row)


def test_a_mask_is_read_from_what_people_paint():
    """White on transparent, black on white, gray in 16 bit, a palette: brightness where it is not transparent."""
    def read(im): return decode_mask(base64.b64decode(png(im)))
    brush = Image.new("RGBA", (80, 64), (255, 255, 255, 0))
    brush.paste((255, 255, 255, 128), (0, 0, 40, 64))
    assert read(brush).getpixel((5, 5)) == 128 and read(brush).getpixel((60, 5)) == 0
    assert read(Image.new("I;16", (80, 64), 65535)).getextrema() == (255, 255)
    assert read(Image.new("1", (80, 64), 1)).getextrema() == (255, 255) and read(Image.new("RGB", (80, 64), "black").quantize()).getextrema() == (0, 0)


@pytest.mark.parametrize("mask, config, words", [
    (Image.new("L", (128, 128)), {}, "mask: given a mask without white, allowed: a mask with white where the picture is to be drawn anew"),
    (Image.new("L", (128, 128), 100), {}, "mask: given a mask without white"), (Image.new("L", (32, 32), 255), {}, "mask: given 32x32, allowed: sides of at least 64"),
    (None, {"paddingMaskCrop": 16}, "paddingMaskCrop: given 16, allowed: null without a mask")])
def test_bad_masks_are_refused_by_name(mask, config, words):
    with pytest.raises(Invalid) as e: refine(mask, **config)
    assert str(e.value).startswith(words)


def test_a_damaged_mask_is_refused_by_name():
    ask = RefineRequest(refine_prompt="a hat", images=[png(PHOTO)], mask=base64.b64encode(b"no picture").decode())
    with pytest.raises(Invalid, match="^mask: given 10 bytes"): prepare(ask, ROWS["sd15"])


def test_what_is_odd_about_a_mask_is_told():
    todo = refine(MASK.resize((128, 64)), (PHOTO, PHOTO))
    assert [n.field for n in todo.notes] == ["mask"] and "128x64 and was resized to its picture's 128x128" in str(todo.notes[0])
    plain, white = refine(None, strength=0.5), refine(Image.new("L", (128, 128), 255), strength=0.5)
    assert "white everywhere" in str(white.notes[0]) and replace(white.pictures[0], seed=0) == replace(plain.pictures[0], seed=0)
    assert white.pictures[0].inpainting is None and white.pictures[0].init.tobytes() == plain.pictures[0].init.tobytes()


def test_strength_is_full_under_a_mask_unless_it_is_given():
    assert refine(MASK).pictures[0].strength == 1 and refine(MASK, strength=0.5).pictures[0].strength == 0.5 and refine(None).pictures[0].strength == 0.5
    fixed = refine(MASK, row=ROWS["sdxl-lightning-4"]).pictures[0]
    assert fixed.strength == 1 and fixed.steps == 4


def test_a_large_picture_keeps_its_pixels():
    """Without a mask it is read at reduced size. Under one it comes back as large as it was, and the part is worked on at full size."""
    large = Image.new("RGB", (3000, 2000), "teal")
    spot = Image.new("L", large.size)
    spot.paste(255, (2900, 1900, 3000, 2000))
    p = refine(spot, (large,), paddingMaskCrop=50).pictures[0]
    assert p.inpainting.picture.size == (3000, 2000) and (p.width, p.height) == (512, 512) == p.init.size and p.inpainting.box == (2850, 1850, 3000, 2000)
    whole = refine(spot, (large,)).pictures[0]
    assert whole.inpainting.paste(whole.init).size == (3000, 2000) and whole.width * whole.height <= 520**2


# through the engine

@pytest.fixture(scope="module")
def client():
    """A client of one engine with the embedded model in this process."""
    from aura_engine.client import AuraClient
    with AuraClient("offline", mode="local") as made: yield made


@pytest.fixture(scope="module")
def apple(client): return client.generate("a red apple", seed=1).images[0]


SPOT = MASK.filter(ImageFilter.GaussianBlur(3))
BLACK = np.asarray(SPOT) == 0


def test_pixels_outside_are_those_of_the_input(client, apple):
    """Byte for byte where the mask is black, other ones where it is white, n of them, each with its seed, and the receipt makes it again."""
    made = client.refine("a banana", [apple, apple], mask=SPOT, seed=4)
    for image in made.images: assert (np.asarray(image)[BLACK] == np.asarray(apple)[BLACK]).all()
    change = np.abs(np.asarray(made.images[0], int) - np.asarray(apple, int))
    assert change[np.asarray(SPOT) == 255].mean() > 10 and made.images[0].tobytes() != made.images[1].tobytes()
    r = made.receipts[1]
    assert r.seed == 5 and r.strength == 1 and r.mask_sha256 and r.init_sha256 and r.padding_mask_crop is None and not made.warnings
    again = client.replay(r, apple, SPOT)
    assert again.images[0].tobytes() == made.images[1].tobytes() and not again.warnings
    for init, mask, words in ((apple, None, "mask: given nothing"), (None, SPOT, "init: given nothing")):
        with pytest.raises(Invalid, match=words): client.replay(r, init, mask)
    other = client.replay(r, apple, MASK)
    assert any("mask_sha256" in w for w in other.warnings)


def test_a_large_picture_comes_back_in_its_size(client, apple):
    """Odd sizes too, whole and cropped. The part has the model's size, the answer that of the file."""
    large = apple.resize((601, 433))
    spot = Image.new("L", large.size)
    spot.paste(255, (300, 200, 350, 260))
    for padding in (None, 20):
        made = client.refine("a fish", large, mask=spot, padding_mask_crop=padding, seed=1)
        image, r = made.images[0], made.receipts[0]
        keep = np.asarray(spot) == 0
        assert image.size == large.size and (np.asarray(image)[keep] == np.asarray(large)[keep]).all() and image.tobytes() != large.tobytes()
        assert r.padding_mask_crop == padding
        assert client.replay(r, large, spot).images[0].tobytes() == image.tobytes()


def test_a_white_mask_is_a_plain_refinement(client, apple):
    white, plain = client.refine("a banana", apple, mask=Image.new("L", apple.size, 255), strength=0.5, seed=2), client.refine("a banana", apple, seed=2)
    assert white.images[0].tobytes() == plain.images[0].tobytes() and any("white everywhere" in w for w in white.warnings) and white.receipts[0].mask_sha256 is None


def test_a_masked_picture_in_company_is_itself(client, apple):
    """Steps shared with plain pictures of other lengths change nothing of it."""
    parts = client.aio.doors[0].engine.parts
    texts = TextCache(parts)
    p = replace(masked(0.8, "lcm", photo=apple, mask=SPOT), prompt="a banana")
    others = [Picture("a fox", 128, 128, steps=n, guidance_scale=1.0, seed=n) for n in (2, 5)] + [replace(p, seed=9)]
    crowd = [Trajectory(parts, q, texts) for q in (p, *others)]
    while waiting := [t for t in crowd if not t.done]: advance(waiting, parts.unet, 4)
    alone = Trajectory(parts, p, texts)
    while not alone.done: advance([alone], parts.unet, 4)
    assert torch.equal(alone.latents, crowd[0].latents)
    outside = (alone.kept.mask == 0).expand_as(alone.latents)
    assert torch.equal(alone.latents[outside], alone.kept.latents[outside])


def test_the_memory_of_a_masked_job_is_counted_and_freed(client, apple):
    engine = client.aio.doors[0].engine
    ask = RefineRequest(refine_prompt="a banana", images=[png(apple)], mask=png(SPOT))
    todo = prepare(ask, engine.row)
    job = engine.submit(todo, previews=True)
    assert len(job.result(120)) == 1 and all(p.init is None and p.inpainting is None for p in job.plan.pictures)
    assert todo.pictures[0].inpainting.nbytes == 4 * 128 * 128 and engine.health().limits.mask


def test_an_inpainting_checkpoint_is_served_by_the_same_requests(tmp_path):
    """Nine channels through loading, optimising and batching: a picture from words, a refinement, and one under a mask, together."""
    engine = Engine(load_settings(SD_MODEL_ID=str(tiny.save(tmp_path / "model", "sd15-inpaint")), SD_DEVICE="cpu")).start()
    assert engine.wait_ready(120), engine.reason
    jobs = [engine.submit(prepare(RefineRequest(refine_prompt="a fox", images=[png(PHOTO)], mask=mask, config={"steps": 2}), engine.row)) for mask in (png(SPOT), None)]
    jobs.append(engine.submit(plan(GenerateRequest(prompt="a fox", n=2, steps=2), engine.row)))
    made = [job.result(120) for job in jobs]
    assert [len(images) for images in made] == [1, 1, 2] and (np.asarray(made[0][0].image)[BLACK] == np.asarray(PHOTO)[BLACK]).all()
    engine.close()
