"""A lone trajectory is the diffusers pipeline: SD 1.5 with a KL VAE, a full LCM UNet, SDXL, on tiny random weights through the real loading path."""
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from aura_engine.config import load_settings
from aura_engine.engine import Engine
from aura_engine.loader import load
from aura_engine.models import SAMPLERS, executed_steps, plan
from aura_engine.trajectory import TextCache, Trajectory, advance, decode_latents
from aura_engine.types import GenerateRequest, Picture, Plan, RefineConfig, RefineRequest

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=["sd15", "sd15-lcm", "sdxl"])
def family(request, tmp_path_factory):
    folder = tiny.save(tmp_path_factory.mktemp(request.param) / "model", request.param)
    return request.param, folder, load(load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu"))


def test_the_row_is_read_from_the_files(family):
    name, _, parts = family
    assert parts.row.name == name and parts.row.native == 128 and parts.row.token_limit == 77


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("init", [None, PHOTO], ids=["txt2img", "img2img"])
@pytest.mark.parametrize("sampler", ["lcm", "ddim", "euler", "dpm"])
def test_a_lone_trajectory_equals_the_pipeline(family, sampler, init, guidance):
    name, _, parts = family
    p = Picture("a red apple", 128, 128, steps=4, guidance_scale=guidance, seed=3, temperature=1.0, scheduler=sampler, init=init, strength=0.5 if init else None)
    t = Trajectory(parts, p, TextCache(parts))
    while not t.done: advance([t], parts.unet)
    theirs = reference(name, parts, p)
    assert (t.latents - theirs("latent")).abs().max() <= 1e-3
    pixels = (theirs("pt")[0].permute(1, 2, 0).numpy() * 255).round().astype(int)
    gap = np.abs(np.asarray(decode_latents(parts, t.latents)[0], int) - pixels)
    assert gap.max() <= 1 and (gap > 0).mean() < 1e-3


def reference(name, parts, p):
    stem = "StableDiffusionXL" if parts.xl else "StableDiffusion"
    cls = getattr(diffusers, stem + ("Img2ImgPipeline" if p.init else "Pipeline"))
    if parts.xl: args = dict(vae=parts.vae, text_encoder=parts.text_encoders[0], text_encoder_2=parts.text_encoders[1], tokenizer=parts.tokenizers[0], tokenizer_2=parts.tokenizers[1])
    else: args = dict(vae=parts.vae, text_encoder=parts.text_encoders[0], tokenizer=parts.tokenizers[0], safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    extra = dict(add_watermarker=False) if parts.xl else {}
    size = {} if p.init else dict(width=p.width, height=p.height)
    steps = executed_steps(p.steps, p.strength, SAMPLERS[p.scheduler].max_steps)[1] if p.init else p.steps
    if p.init: size = dict(image=p.init, strength=p.strength)

    def call(output):
        pipe = cls(**args, unet=parts.unet, scheduler=parts.scheduler(p.scheduler), **extra)
        pipe.set_progress_bar_config(disable=True)
        out = pipe(p.prompt, num_inference_steps=steps, guidance_scale=p.guidance_scale, generator=torch.Generator().manual_seed(p.seed), output_type=output, **size)
        return out.images.float()
    return call


def test_each_family_serves_and_mixes(family):
    """Generation and refinement through the engine, no code but the folder's name changes."""
    name, folder, _ = family
    engine = Engine(load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu")).start()
    assert engine.wait_ready(120), engine.reason
    ask = plan(GenerateRequest(prompt="a fox and an owl " * 60, seed=1, n=2, steps=2), engine.row)
    refine = plan(RefineRequest(refine_prompt="a fox", images=["x"], config=RefineConfig(seed=1, steps=2)), engine.row, [PHOTO])
    jobs = [engine.submit(ask), engine.submit(refine)]
    one, two = (j.result(120) for j in jobs)
    assert len(one) == 2 and len(two) == 1 and two[0].image.size == (128, 128)
    assert any("cut" in w for w in jobs[0].warnings)                       # more than four chunks of 77 tokens
    alone = engine.submit(Plan((replace(ask.pictures[1]),))).result(120)[0]
    assert np.abs(np.asarray(alone.image, int) - np.asarray(one[1].image, int)).max() <= 1
    engine.close()
