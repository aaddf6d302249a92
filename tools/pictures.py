"""The pictures in nbs/images, made again by the engine and the model of this checkout: `make pictures`.

The prompts are drawn here. How page and notebook look is seen by the browser tests, which keep their screenshots when
AURA_PICTURES is set. Each file has one maker, so after another model or another look this is all there is to run.
"""
import os, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "nbs/images"
PROMPTS = ("a red apple on a blue background", "a fox on red", "a rocket on a black background", "an owl on a green background",
           "a cupcake on pink", "a sailboat on a white background", "a lion on yellow", "a pineapple on purple",
           "a castle on pink", "a guitar on orange", "a penguin on blue", "a sunflower on black")
TESTS = "widths_and_themes or lab_around_it or (other_states and brush)"


def draw_prompts() -> None:
    """README's first picture: what the embedded model makes of twelve prompts."""
    import aura_engine as ae
    from aura_engine.images import grid
    os.environ["SD_MODEL_ID"] = "embedded"
    with ae.AuraClient("offline") as client:
        drawn = [client.generate(prompt, seed=11 + i).images[0] for i, prompt in enumerate(PROMPTS)]
    grid(drawn, width=128, columns=6).image.save(IMAGES / "prompts.webp", quality=88)


def main() -> int:
    draw_prompts()
    os.environ["AURA_PICTURES"] = "1"
    files = [str(ROOT / f"tests/test_{name}.py") for name in ("browser", "lab")]
    return int(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "slow or not slow", "-k", TESTS, *files]))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
