"""Each row against its card: a stock diffusers pipeline, set up from this table of published recipes and never from ours, draws what the engine draws.

Base configuration: scheduler/scheduler_config.json of SD 1.5 and SDXL as published. Cards: what the model's page says to replace in it.
"""
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import tiny
from aura_engine.models import ROWS, XL
from test_checkpoints import COMMON, FOX, close, drawn, loaded, saved

BASE = {**COMMON, "_class_name": "PNDMScheduler", "prediction_type": "epsilon", "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
TRAILING = {"timestep_spacing": "trailing"}
LCM, EULER, DDIM = ("LCMScheduler", {}, {}), ("EulerDiscreteScheduler", TRAILING, {}), ("DDIMScheduler", TRAILING, {})
CARDS = {                                         # row: (scheduler, what replaces its configuration, arguments of the call), steps, guidance
    "sd15-lcm-lora": (LCM, 4, 1.0), "sdxl-lcm-lora": (LCM, 4, 1.0), "ssd-1b-lcm-lora": (LCM, 4, 1.0),
    "sdxl-lightning-2-lora": (EULER, 2, 0), "sdxl-lightning-4-lora": (EULER, 4, 0), "sdxl-lightning-8-lora": (EULER, 8, 0),
    "sdxl-lightning-2": (EULER, 2, 0), "sdxl-lightning-4": (EULER, 4, 0), "sdxl-lightning-8": (EULER, 8, 0),
    "sdxl-lightning-1": (("EulerDiscreteScheduler", {**TRAILING, "prediction_type": "sample"}, {}), 1, 0),
    **{f"{base}-hyper-{n}": (DDIM, n, 0) for base in ("sd15", "sdxl") for n in (2, 4, 8)},
    **{f"{base}-hyper-{n}-cfg": (DDIM, n, 5) for base in ("sd15", "sdxl") for n in (8, 12)},
    **{f"{base}-hyper-1": (("TCDScheduler", {}, {"eta": 1.0}), 1, 0) for base in ("sd15", "sdxl")},
    **{f"{base}-tcd": (("TCDScheduler", {}, {"eta": 0.3}), 4, 0) for base in ("sd15", "sdxl")},
    **{f"sdxl-dmd2-lora{kind}": (("LCMScheduler", {}, {"timesteps": [999, 749, 499, 249]}), 4, 0) for kind in ("-fp16", "")},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    at = tmp_path_factory.mktemp("recipes")
    return {xl: saved(at / f"base-{xl}", "sdxl" if xl else "sd15", BASE) for xl in (False, True)}


@pytest.mark.parametrize("name", CARDS)
def test_a_row_is_drawn_as_its_card_says(bases, tmp_path, name):
    (cls, config, call), steps, guidance = CARDS[name]
    row = ROWS[name]
    xl = row.pipeline == XL
    published = tmp_path / (row.lora or row.unet)
    if row.lora:
        tiny.lora(published if published.suffix else published / "pytorch_lora_weights.safetensors", xl=xl, kohya=True)
        parts = loaded(bases[xl], SD_LCM_LORA_ID=str(published))
    else:
        published.parent.mkdir(parents=True)
        torch.manual_seed(9)
        save_file({k: v.contiguous() for k, v in tiny.unet(xl=xl).state_dict().items()}, published)
        parts = loaded(published, SD_BASE_ID=str(bases[xl]))
    assert parts.row.steps[1] == steps and parts.row.guidance[1] == guidance
    pipeline = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    more = dict(add_watermarker=False) if xl else dict(safety_checker=None)
    pipe = pipeline.from_pretrained(bases[xl], unet=parts.unet, scheduler=getattr(diffusers, cls).from_config(BASE, **config), **more)
    pipe.set_progress_bar_config(disable=True)
    run = call if "timesteps" in call else {"num_inference_steps": steps, **call}
    want = pipe(FOX.prompt, width=128, height=128, guidance_scale=guidance, generator=torch.Generator().manual_seed(FOX.seed), output_type="latent", **run).images
    # DDIM's last alpha is 1 here and 0.99915 there (set_alpha_to_one), which is less than a value of 255
    assert close(drawn(parts, replace(FOX, steps=steps, guidance_scale=float(guidance))), want, 1e-2 if cls == "DDIMScheduler" else 1e-4)
