"""The embedded model draws what it is asked for: what can be checked without its training art."""
import numpy as np
import pytest

from aura_engine.config import load_settings
from aura_engine.engine import Engine
from aura_engine.models import EMBEDDED, plan
from aura_engine.train import COLOURS, concepts, held_out
from aura_engine.types import GenerateRequest, RefineConfig, RefineRequest


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
    """The colour of the upper edge; what is behind the thing shades the middle or the lower part."""
    return np.median(np.concatenate([picture[:4].reshape(-1, 3), picture[: len(picture) // 2, :4].reshape(-1, 3)]), axis=0)


def test_backgrounds_are_the_ones_asked_for(engine):
    """Ten things on every colour, among them pairs it was never trained on."""
    pairs = [(names[0], c) for names in list(concepts().values())[::26] for c in COLOURS]
    seen = [background(p) for p in draw(engine, [f"a {n} on a {c} background" for n, c in pairs])]
    palette = np.array(list(COLOURS.values()), float)
    right = [list(COLOURS)[np.abs(palette - s).sum(1).argmin()] == c for s, (_, c) in zip(seen, pairs)]
    assert np.mean(right) >= 0.95
    assert sum(c in held_out(26 * i) for i in range(10) for c in COLOURS) == 20    # that many of the pairs were held out


def test_the_prompt_names_the_thing(engine):
    """Different things are different pictures, each the same thing under its other names."""
    pumpkin, lantern, fox = draw(engine, ["a pumpkin", "a jack-o-lantern", "a fox"], temperature=0.0)
    assert np.abs(pumpkin - fox).mean() > 10
    orange = (pumpkin[..., 0] > 200) & (pumpkin[..., 2] < 120)
    assert orange.mean() > 0.05 and ((lantern[..., 0] > 200) & (lantern[..., 2] < 120)).mean() > 0.05


def test_seeds_vary_the_picture_and_temperature_zero_does_not(engine):
    pictures = draw(engine, ["a sailboat"] * 6, temperature=1.0)
    gaps = [np.abs(a - b).mean() for i, a in enumerate(pictures) for b in pictures[:i]]
    assert np.mean(gaps) > 5
    cold = draw(engine, ["a sailboat"] * 2, temperature=0.0)
    assert (cold[0] == cold[1]).all()


@pytest.mark.parametrize("aspect,size", [("16:9", (96, 176)), ("9:16", (176, 96)), ("4:3", (112, 144)), ("3:1", (80, 224)), ("1:3", (224, 80))])
def test_other_shapes_keep_the_background_and_the_thing(engine, aspect, size):
    (picture,) = draw(engine, ["a basketball on a blue background"], aspectRatio=aspect)
    assert picture.shape[:2] == size and np.abs(background(picture) - COLOURS["blue"]).max() < 40
    ball = (picture[..., 0] > 180) & (picture[..., 2] < 140)                      # orange; the background and its shade are not
    rows, columns = np.flatnonzero(ball.any(1)), np.flatnonzero(ball.any(0))
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    assert 0.7 < width / height < 1.4                                             # a ball stays round


def test_refining_keeps_one_picture_for_each(engine):
    from PIL import Image
    photo = Image.fromarray(draw(engine, ["a red apple on a blue background"])[0].astype("uint8"))
    ask = RefineRequest(refine_prompt="a green apple on a blue background", images=["x", "x"], config=RefineConfig(seed=1, strength=0.8))
    a, b = engine.submit(plan(ask, engine.row, [photo, photo])).result(60)
    assert np.abs(background(np.asarray(a.image, float)) - COLOURS["blue"]).max() < 40
    assert a.receipt.init_sha256 == b.receipt.init_sha256 and a.receipt.strength == 0.8


def test_size_and_card():
    assert sum(f.stat().st_size for f in EMBEDDED.rglob("*") if f.is_file()) <= 26e6
    card = (EMBEDDED / "README.md").read_text()
    assert all(word in card for word in ("Noto Emoji", "Apache", "emojibase", "MIT", "Limits", "PSNR"))
