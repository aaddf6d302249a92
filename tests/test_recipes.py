"""Each row against its card: a stock diffusers pipeline, set up from this table of published recipes and never from ours, draws what the engine draws.

Official configurations: scheduler/scheduler_config.json as published. Cards: what a model's page (or its authors' demo) says to replace in it. The rows of
flow-matching transformers are held against their pipelines in test_flow.
"""
import json, re
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import tiny
from aura_engine.models import EMBEDDED, FLOW_ROWS, ROWS, XL
from test_checkpoints import COMMON, FOX, OFFICIAL, close, drawn, loaded, saved

SD15 = {**COMMON, "_class_name": "PNDMScheduler", "prediction_type": "epsilon", "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
OWN = {                                           # what lies in the scheduler folder of a whole model; the others are methods for SD 1.5 or SDXL
    "sd15-lcm": {**COMMON, "_class_name": "LCMScheduler", "prediction_type": "epsilon", "clip_sample": False, "set_alpha_to_one": True, "original_inference_steps": 50, "timestep_scaling": 10.0},
    "sd-turbo": {**COMMON, "_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon", "clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "trailing", "use_karras_sigmas": False},
    "sdxl-turbo": OFFICIAL["sdxl-turbo"],
    "sdxs-512": {**COMMON, "_class_name": "DEISMultistepScheduler", "prediction_type": "epsilon", "algorithm_type": "deis", "solver_order": 2, "timestep_spacing": "linspace"},
}
TRAILING = {"timestep_spacing": "trailing"}
LCM, EULER, DDIM = ("LCMScheduler", {}, {}), ("EulerDiscreteScheduler", TRAILING, {}), ("DDIMScheduler", TRAILING, {})
DPM = ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, {})
PCM = ("TCDScheduler", {**TRAILING, "set_alpha_to_one": True, "steps_offset": 0}, {"eta": 0.0})             # a fresh one, and the pipeline's own eta
AS_SAVED = (None, {}, {})
BASES = ("sd15", "sdxl")
CARDS = {                                         # row: (scheduler, what replaces its configuration, arguments of the call), steps, guidance
    "sd15": (DPM, 20, 7.5), "sdxl": (DPM, 25, 5), "ssd-1b": (DPM, 25, 5),
    "sd15-lcm-lora": (LCM, 4, 1.0), "sdxl-lcm-lora": (LCM, 4, 1.0), "ssd-1b-lcm-lora": (LCM, 4, 1.0),
    "sd15-lcm": (AS_SAVED, 4, 8), "sdxl-lcm": (LCM, 4, 8), "ssd-1b-lcm": (LCM, 4, 1.0),
    "sdxl-lightning-2-lora": (EULER, 2, 0), "sdxl-lightning-4-lora": (EULER, 4, 0), "sdxl-lightning-8-lora": (EULER, 8, 0),
    "sdxl-lightning-2": (EULER, 2, 0), "sdxl-lightning-4": (EULER, 4, 0), "sdxl-lightning-8": (EULER, 8, 0),
    "sdxl-lightning-1": (("EulerDiscreteScheduler", {**TRAILING, "prediction_type": "sample"}, {}), 1, 0),
    **{f"{base}-hyper-{n}": (DDIM, n, 0) for base in BASES for n in (2, 4, 8)},
    **{f"{base}-hyper-{n}-cfg": (DDIM, n, 5) for base in BASES for n in (8, 12)},
    **{f"{base}-hyper-1": (("TCDScheduler", {}, {"eta": 1.0}), 1, 0) for base in BASES},
    **{f"{base}-tcd": (("TCDScheduler", {}, {"eta": 0.3}), 4, 0) for base in BASES},
    **{f"{base}-pcm-{n}": (PCM, n, 0) for base in BASES for n in (2, 4, 8, 16)},
    **{f"{base}-pcm-{n}-cfg": (PCM, n, 7.5) for base in BASES for n in (4, 8, 16)},
    **{f"{base}-flash": (("LCMScheduler", TRAILING, {}), 4, 0) for base in BASES},
    **{f"sdxl-dmd2-lora{kind}": (("LCMScheduler", {}, {"timesteps": [999, 749, 499, 249]}), 4, 0) for kind in ("-fp16", "")},
    "sd-turbo": (AS_SAVED, 1, 0), "sdxl-turbo": (AS_SAVED, 1, 0), "sdxs-512": (AS_SAVED, 1, 0),
    "dreamshaper-xl-v2-turbo": (("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}, {}), 6, 2),
    "embedded": (LCM, 4, 1), "embedded-base": (DDIM, 25, 1), "embedded-base-lcm-lora": (LCM, 4, 1),
}
# DDIM's last alpha is 1 here and 0.99915 there (set_alpha_to_one); DEIS stops at sigma 0.03, not at 0: both are less than a value of 255
ROUND = {"DDIMScheduler": 1e-2, "DEISMultistepScheduler": 2e-3}


def test_every_row_has_a_card(): assert set(CARDS) | {row.name for row in FLOW_ROWS} == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_every_figure_has_a_source(name):
    """`row.figures` names where it was published, and the defaults stand in it."""
    row = ROWS[name]
    assert re.match(r"(card|unet/config\.json|demo(/app)?\.py of|notebook 90)", row.figures)
    assert re.search(rf"\b{row.steps[1]}( or \d+)? steps?\b|\b{row.steps[1]} steps|or {row.steps[1]} steps", row.figures), row.figures
    assert re.search(rf"guidance {row.guidance[1]:g}\b", row.figures), row.figures


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    at = tmp_path_factory.mktemp("recipes")
    return {xl: saved(at / f"base-{xl}", "sdxl" if xl else "sd15", OFFICIAL["sdxl"] if xl else SD15) for xl in (False, True)}


def lone_unet(path, row):
    """A UNet as published: one file, or a folder with its configuration."""
    torch.manual_seed(9)
    unet = tiny.unet(xl=True, **dict(time_cond_proj_dim=32) if row.guidance_embedded else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix: save_file({k: v.contiguous() for k, v in unet.state_dict().items()}, path)
    else: unet.save_pretrained(path)


def ours(row, bases, tmp_path):
    """(the folder with everything but a method, what the engine loads): published names under tmp_path, tiny weights."""
    base = bases[row.pipeline == XL]
    if row.name in ("embedded", "embedded-base"): return EMBEDDED, loaded(row.name)
    if row.name.startswith("embedded"): return EMBEDDED, loaded("embedded-base", SD_LCM_LORA_ID=row.lora)
    if row.name in ("sd15", "sdxl"): return base, loaded(base)
    if row.lora:
        published = tmp_path / row.lora
        tiny.lora(published if published.suffix else published / "pytorch_lora_weights.safetensors", xl=row.pipeline == XL, kohya=True)
        return base, loaded(base, SD_LCM_LORA_ID=str(published))
    if row.unet:
        lone_unet(tmp_path / row.unet, row)
        return base, loaded(tmp_path / row.unet, SD_BASE_ID=str(base))
    folder = tmp_path / row.ids[0]
    folder.parent.mkdir(parents=True)
    saved(folder, "sd15-lcm" if row.guidance_embedded else "sdxl" if row.pipeline == XL else "sd15", OWN.get(row.name, OFFICIAL["sdxl"]))
    return folder, loaded(folder)


def theirs(folder, parts, recipe):
    """The stock pipeline of a folder, with the scheduler of a recipe.

    It reads the folder itself. Only a UNet that is changed or replaced is ours: test_lora_arithmetic holds LoRAs against
    matrix products, and test_checkpoints lone UNets against their files."""
    cls, config, _ = recipe
    official = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    scheduler = getattr(diffusers, cls or official["_class_name"]).from_config(official, **config)
    xl = (folder / "text_encoder_2").exists()
    more = dict(add_watermarker=False) if xl else dict(safety_checker=None, requires_safety_checker=False)
    if parts.row.lora or parts.row.unet: more["unet"] = parts.unet
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, scheduler=scheduler, dtype=torch.float32, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# One step hides what a sampler does between two: rows of one step that may take more are run with the most, too.
ALSO = {name: ROWS[name].steps[2] for name, (_, steps, _) in CARDS.items() if steps == 1 < ROWS[name].steps[2]}


@pytest.mark.parametrize("name, more", [*((name, None) for name in CARDS), *ALSO.items()])
def test_a_row_is_drawn_as_its_card_says(bases, tmp_path, name, more):
    recipe, steps, guidance = CARDS[name]
    row, call = ROWS[name], recipe[2]
    folder, parts = ours(row, bases, tmp_path)
    assert (parts.row.name, parts.row.steps[1], parts.row.guidance[1]) == (name, steps, guidance)
    steps = more or steps
    pipe = theirs(folder, parts, recipe)
    run = call if "timesteps" in call else {"num_inference_steps": steps, **call}
    want = pipe(FOX.prompt, width=128, height=128, guidance_scale=guidance, generator=torch.Generator().manual_seed(FOX.seed), output_type="latent", **run).images
    assert close(drawn(parts, replace(FOX, steps=steps, guidance_scale=float(guidance))), want, ROUND.get(type(pipe.scheduler).__name__, 1e-4))
