"""The embedded model draws what it is asked for: what can be checked without its training art."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from aura_engine.art import COLOURS, held_out
from aura_engine.config import load_settings
from aura_engine.engine import Engine
from aura_engine.loader import load
from aura_engine.models import EMBEDDED, ROWS
from aura_engine.planning import known_words, plan
from aura_engine.score import How, draw_prompts
from aura_engine.types import GenerateRequest, RefineConfig, RefineRequest

THINGS = json.loads((EMBEDDED / "concepts.json").read_text())


@pytest.fixture(scope="module")
def engine():
    engine = Engine(load_settings(SD_MODEL_ID="embedded", SD_DEVICE="cpu")).start()
    assert engine.wait_ready(300), engine.reason
    yield engine
    engine.close()


def draw(engine, prompts, **how):
    jobs = [engine.submit(plan(GenerateRequest(prompt=p, seed=5 + i, **how), engine.row)) for i, p in enumerate(prompts)]
    return [np.asarray(j.result(120)[0].image, float) for j in jobs]


def background(picture):
    """The colour of the upper edge. What is behind the thing shades the middle or the lower part."""
    return np.median(np.concatenate([picture[:4].reshape(-1, 3), picture[: len(picture) // 2, :4].reshape(-1, 3)]), axis=0)


def coloured(picture):
    """The name of the background's colour."""
    return list(COLOURS)[np.abs(np.array(list(COLOURS.values()), float) - background(picture)).sum(1).argmin()]


def test_a_thousand_things_and_all_their_words_are_known():
    assert len(THINGS) >= 1000 and len({names[0] for names in THINGS}) == len(THINGS)
    words = known_words(EMBEDDED)
    assert {"fox", "rocket", "strawberry", "flat", "3d", "three", "above"} <= words and "xylophone" not in words
    asks = [f"two {n} on blue, 3d style" for names in THINGS[::17] for n in names[:1]]
    assert not [n for p in asks for n in plan(GenerateRequest(prompt=p), ROWS["embedded"]).notes]


def test_backgrounds_are_the_ones_asked_for(engine):
    """Ten things on every colour, among them pairs it was never trained on."""
    some = range(0, len(THINGS), len(THINGS) // 10)[:10]
    pairs = [(i, k) for i in some for k in range(len(COLOURS))]
    seen = [coloured(p) for p in draw(engine, [f"a {THINGS[i][0]} on a {list(COLOURS)[k]} background" for i, k in pairs])]
    assert np.mean([s == list(COLOURS)[k] for s, (_, k) in zip(seen, pairs)]) >= 0.95
    assert sum(k in held_out(i) for i, k in pairs) == 20                           # that many of the pairs were held out


def test_the_prompt_names_the_thing(engine):
    """Different things are different pictures, each the same thing under its other names."""
    pumpkin, lantern, fox = draw(engine, [f"{n} on blue, 3d style" for n in ("a pumpkin", "a jack-o-lantern", "a fox")], temperature=0.0)
    assert np.abs(pumpkin - fox).mean() > 10
    orange = (pumpkin[..., 0] > 200) & (pumpkin[..., 2] < 120)
    assert orange.mean() > 0.05 and ((lantern[..., 0] > 200) & (lantern[..., 2] < 120)).mean() > 0.05


def test_words_choose_the_style(engine):
    """The same thing in flat and in 3D is not the same picture, the seed being the same and asleep."""
    flat, solid = (draw(engine, [f"a {n} on white, {style} style" for n in ("fox", "crab", "rocket", "red apple")], temperature=0.0) for style in ("flat", "3d"))
    gaps = [np.abs(a - b).mean() for a, b in zip(flat, solid)]
    assert min(gaps) > 3, gaps


def test_things_are_counted(engine):
    """Red apples on blue: as many separate red patches as were asked for."""
    def patches(picture):
        small = np.asarray(Image.fromarray(picture.astype("uint8")).resize((32, 32)), float)
        red = (small[..., 0] > 150) & (small[..., 1] < 120) & (small[..., 2] < 120)
        left, n = {tuple(p) for p in np.argwhere(red)}, 0
        while left:
            edge, size = [left.pop()], 1
            while edge:
                y, x = edge.pop()
                near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
                left -= near; edge += near; size += len(near)
            n += size >= 12
        return n
    pictures = draw(engine, [f"{n} on a blue background, flat style" for n in ("a red apple", "two red apples", "three red apples", "four red apples")])
    assert [patches(p) for p in pictures] == [1, 2, 3, 4]


def test_the_base_takes_its_lora_as_any_base_does():
    base = load(load_settings(SD_MODEL_ID="embedded-base", SD_DEVICE="cpu"))
    fused = load(load_settings(SD_MODEL_ID="embedded-base", SD_LCM_LORA_ID="embedded/lcm-lora", SD_DEVICE="cpu"))
    assert base.row.sampler == "ddim" and base.row.steps[1] == 25 and base.lora is None
    assert fused.row.sampler == "lcm" and fused.row.steps[1] == 4 and fused.lora == "embedded/lcm-lora"
    assert not torch.equal(base.unet.mid_block.resnets[0].conv1.weight, fused.unet.mid_block.resnets[0].conv1.weight)
    for parts, steps in ((base, 25), (fused, 4)):
        (picture,) = draw_prompts(parts, ["a fox on a blue background"], How(steps))
        assert coloured(((picture + 1) * 127.5).permute(1, 2, 0).numpy()) == "blue"


def test_seeds_vary_the_picture_and_temperature_zero_does_not(engine):
    pictures = draw(engine, ["a sailboat"] * 6, temperature=1.0)
    gaps = [np.abs(a - b).mean() for i, a in enumerate(pictures) for b in pictures[:i]]
    assert np.mean(gaps) > 5
    cold = draw(engine, ["a sailboat"] * 2, temperature=0.0)
    assert np.abs(cold[0] - cold[1]).mean() < 0.5                                  # of 255; the two may run in calls of different sizes, which round differently


@pytest.mark.parametrize("aspect,size", [("16:9", (96, 176)), ("9:16", (176, 96)), ("4:3", (112, 144)), ("3:1", (80, 224)), ("1:3", (224, 80))])
def test_other_shapes_keep_the_background_and_the_thing(engine, aspect, size):
    (picture,) = draw(engine, ["a basketball on a blue background"], aspectRatio=aspect)
    assert picture.shape[:2] == size and np.abs(background(picture) - COLOURS["blue"]).max() < 40
    ball = (picture[..., 0] > 180) & (picture[..., 2] < 140)                      # orange; the background and its shade are not
    rows, columns = np.flatnonzero(ball.any(1)), np.flatnonzero(ball.any(0))
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    assert 0.7 < width / height < 1.4                                             # a ball stays round


def test_refining_keeps_one_picture_for_each(engine):
    photo = Image.fromarray(draw(engine, ["a red apple on a blue background"])[0].astype("uint8"))
    ask = RefineRequest(refine_prompt="a green apple on a blue background", images=["x", "x"], config=RefineConfig(seed=1, strength=0.8))
    a, b = engine.submit(plan(ask, engine.row, [photo, photo])).result(60)
    assert np.abs(background(np.asarray(a.image, float)) - COLOURS["blue"]).max() < 40
    assert a.receipt.init_sha256 == b.receipt.init_sha256 and a.receipt.strength == 0.8


def test_size_and_card():
    assert sum(f.stat().st_size for f in EMBEDDED.rglob("*") if f.is_file()) <= 40e6
    card = (EMBEDDED / "README.md").read_text()
    assert all(word in card for word in ("Fluent Emoji", "MIT", "emojibase", "Limits", "PSNR", "Seeds", "LCM-LoRA"))
