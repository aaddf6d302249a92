"""Checkpoints as people have them: what their files say decides, and what is not served is refused by its name.

The right pictures come from stock diffusers pipelines with the scheduler configurations that their makers publish, and never from our loader.
"""
import json, shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from aura_engine.config import load_settings
from aura_engine.engine import Engine
from aura_engine.facts import facts, last_sigma
from aura_engine.loader import load
from aura_engine.models import ROWS, SDXL_ID
from aura_engine.trajectory import TextCache, Trajectory, advance
from aura_engine.types import Invalid, ModelError, Picture

FOX = Picture("a fox", 128, 128, steps=25, guidance_scale=4.0, seed=3, temperature=1.0)

# scheduler/scheduler_config.json as published
COMMON = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000, "steps_offset": 1}
OFFICIAL = {
    "sdxl": {**COMMON, "_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "prediction_type": "epsilon", "clip_sample": False, "sample_max_value": 1.0, "set_alpha_to_one": False,
             "skip_prk_steps": True, "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False},
    "noob-vpred": {**COMMON, "_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "use_karras_sigmas": False},
    "cosine": {**COMMON, "_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon", "timestep_spacing": "leading"},
    "sdxl-turbo": {**COMMON, "_class_name": "EulerAncestralDiscreteScheduler", "prediction_type": "epsilon", "timestep_spacing": "trailing"},
    "playground": {**COMMON, "_class_name": "EDMDPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "prediction_type": "epsilon", "sigma_data": 0.5, "sigma_max": 80.0, "sigma_min": 0.002},
}


def saved(folder, kind, schedule):
    tiny.save(folder, kind)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    return folder


def loaded(model, **how): return load(load_settings(**{"SD_MODEL_ID": str(model), "SD_DEVICE": "cpu", **how}))


def drawn(parts, p):
    t = Trajectory(parts, p, TextCache(parts))
    while not t.done: advance([t], parts.unet)
    return t.latents


def stock(folder, scheduler, p):
    """The makers' way: a stock pipeline of the folder with their scheduler."""
    cls = diffusers.StableDiffusionXLPipeline if (folder / "text_encoder_2").exists() else diffusers.StableDiffusionPipeline
    more = dict(add_watermarker=False) if cls is diffusers.StableDiffusionXLPipeline else dict(safety_checker=None)
    pipe = cls.from_pretrained(folder, scheduler=scheduler, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe(p.prompt, width=p.width, height=p.height, num_inference_steps=p.steps, guidance_scale=p.guidance_scale,
                generator=torch.Generator().manual_seed(p.seed), output_type="latent").images


def close(one, two, share=1e-4): return (one - two).abs().max() <= share * two.abs().max().clamp(min=10)


@pytest.mark.parametrize("kind, name", [("sdxl", "noob-vpred"), ("sd15", "cosine")])
@pytest.mark.parametrize("steps", [25, 8])
def test_a_schedule_that_ends_in_noise_is_drawn_with_euler(tmp_path, kind, name, steps):
    """Row 1: no IndexError at 21 to 40 steps, and the picture is that of the makers' sampler with trailing steps."""
    folder = saved(tmp_path / "model", kind, OFFICIAL[name])
    parts = loaded(folder)
    assert parts.row.sampler == "euler" and any("ends in pure noise" in n for n in parts.notes)
    official = diffusers.EulerDiscreteScheduler.from_config(OFFICIAL[name], timestep_spacing="trailing")
    p = replace(FOX, steps=steps)
    assert close(drawn(parts, p), stock(folder, official, p))


def test_an_ordinary_schedule_stays_as_its_family(tmp_path):
    parts = loaded(saved(tmp_path / "model", "sdxl", OFFICIAL["sdxl"]))
    assert parts.row.sampler == "dpm" and not parts.notes
    alphas = diffusers.DDIMScheduler.from_config(OFFICIAL["sdxl"]).alphas_cumprod[-1].item()
    assert last_sigma(OFFICIAL["sdxl"]) == pytest.approx(((1 - alphas) / alphas) ** 0.5, rel=1e-3)
    alphas = diffusers.DDIMScheduler.from_config(OFFICIAL["cosine"]).alphas_cumprod[-1].item()
    assert last_sigma(OFFICIAL["cosine"]) == pytest.approx(((1 - alphas) / alphas) ** 0.5, rel=1e-2)


def test_turbo_is_drawn_as_its_configuration_says(tmp_path):
    """Row 6: the published configuration is EulerAncestral with trailing steps."""
    folder = saved(tmp_path / "stabilityai" / "sdxl-turbo", "sdxl", OFFICIAL["sdxl-turbo"])
    parts = loaded(folder)
    assert parts.row.name == "sdxl-turbo"
    for steps in (1, 4):
        p = replace(FOX, steps=steps, guidance_scale=0.0)
        assert close(drawn(parts, p), stock(folder, diffusers.EulerAncestralDiscreteScheduler.from_config(OFFICIAL["sdxl-turbo"]), p))


def test_sde_steps_draw_their_noise_from_the_seed(tmp_path):
    """Row 10: a merge that wants DPM++ SDE says so. Noise comes from the picture's seed, as in the stock pipeline."""
    folder = saved(tmp_path / "model", "sdxl", OFFICIAL["sdxl"])
    parts = loaded(folder, SD_SAMPLER="dpm-sde", SD_STEPS="6", SD_GUIDANCE="2")
    assert (parts.row.sampler, parts.row.steps, parts.row.guidance) == ("dpm-sde", (1, 6, 100), (1, 2.0, 15))
    assert any("SD_SAMPLER=dpm-sde, SD_STEPS=6, SD_GUIDANCE=2.0" in n for n in parts.notes)
    official = diffusers.DPMSolverMultistepScheduler.from_config(OFFICIAL["sdxl"], algorithm_type="sde-dpmsolver++", use_karras_sigmas=True, timestep_spacing="linspace")
    p = replace(FOX, steps=6, guidance_scale=2.0)
    assert close(drawn(parts, p), stock(folder, official, p)) and torch.equal(drawn(parts, p), drawn(parts, p))


@pytest.mark.parametrize("how, words", [({"SD_SAMPLER": "heun"}, "SD_SAMPLER: given 'heun', allowed: lcm"), ({"SD_STEPS": "50", "SD_SAMPLER": "euler"}, None), ({"SD_GUIDANCE": "19"}, "SD_GUIDANCE: given 19.0, allowed: 1 to 15")])
def test_own_defaults_have_guard_rails(tmp_path, how, words):
    folder = saved(tmp_path / "model", "sdxl", OFFICIAL["sdxl"])
    if words is None: assert loaded(folder, **how).row.steps == (1, 50, 100)
    else:
        with pytest.raises(Invalid) as e: loaded(folder, **how)
        assert words in e.value.detail


@pytest.mark.parametrize("how", ["edm", "statistics"])
def test_another_arithmetic_is_refused_by_name(tmp_path, how):
    """Row 4: playground-v2.5 is an SDXL class. Its pictures were garbage without a word."""
    folder = saved(tmp_path / "model", "sdxl", OFFICIAL["playground" if how == "edm" else "sdxl"])
    if how == "statistics":
        config = json.loads((folder / "vae" / "config.json").read_text())
        (folder / "vae" / "config.json").write_text(json.dumps(config | {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}))
    with pytest.raises(ModelError, match="playground-v2.5"): loaded(folder)


@pytest.mark.parametrize("more", [{"use_exponential_sigmas": True}, {"use_beta_sigmas": True}, {"use_flow_sigmas": True}, {"variance_type": "learned_range"}])
def test_ways_of_spacing_that_our_sampler_decides_are_told(tmp_path, more):
    """Row 12: some of these need scipy, some raise in diffusers. The picture does not depend on them."""
    (name, value), = more.items()
    schedule = {**OFFICIAL["sdxl"], "_class_name": "DPMSolverMultistepScheduler", **more}
    parts, plain = loaded(saved(tmp_path / "model", "sdxl", schedule)), loaded(saved(tmp_path / "plain", "sdxl", OFFICIAL["sdxl"]))
    assert value != True or any(name in n for n in parts.notes)                     # noqa: E712
    p = replace(FOX, steps=4)
    assert torch.equal(drawn(parts, p), drawn(plain, p))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    at = tmp_path_factory.mktemp("single")
    return tiny.single(tiny.save(at / "model", "sdxl-deep"), at / "plain.safetensors")


def copied(single, name, change):
    """The same checkpoint under another name, its tensors changed, with its configuration beside it."""
    file = single.with_name(name)
    save_file(change(load_file(single)), file)
    if not file.with_suffix("").exists(): file.with_suffix("").symlink_to(single.with_suffix(""))
    return file


def test_a_single_file_says_v_in_its_header(single):
    """Row 5: merges of the v-prediction family carry empty tensors that say so."""
    file = copied(single, "noob.safetensors", lambda s: s | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    assert facts(file).prediction == "v_prediction" and facts(file).pure_noise
    parts = loaded(file)
    assert parts.schedule["prediction_type"] == "v_prediction" and parts.row.sampler == "euler" and any("header" in n for n in parts.notes)
    official = diffusers.EulerDiscreteScheduler.from_config(OFFICIAL["noob-vpred"])
    made = parts.scheduler()
    made.set_timesteps(20), official.set_timesteps(20)
    assert torch.allclose(made.sigmas, official.sigmas) and made.config.prediction_type == "v_prediction"


def test_a_name_that_contradicts_the_header_is_told_and_a_setting_decides(single):
    file = copied(single, "some-vpred.safetensors", lambda s: s)
    parts = loaded(file)
    assert parts.schedule["prediction_type"] == "epsilon" and any("SD_PREDICTION=v_prediction" in n for n in parts.notes)
    parts = loaded(file, SD_PREDICTION="v_prediction")
    assert parts.scheduler().config.prediction_type == "v_prediction" and not any("its name says" in n for n in parts.notes)


REFUSED = {
    "a FLUX model": {"double_blocks.0.x": 1, "single_blocks.0.x": 1}, "a Stable Diffusion 3 model": {"model.diffusion_model.joint_blocks.0.x": 1}, "a Z-Image model": {"cap_embedder.0.weight": 1},
    "a LoHa or LoKr": {"lora_unet_a.lokr_w1": 1}, "a LoRA": {"lora_unet_a.lora_down.weight": 1}, "SDXL's refiner": {"model.diffusion_model.x": 1, "conditioner.embedders.0.model.x": 1},
    "a ControlNet": {"control_model.x": 1}, "a VAE": {"decoder.x": 1, "encoder.x": 1}, "a UNet alone": {"down_blocks.0.x": 1, "mid_block.x": 1}, "a textual inversion": {"emb_params": 1},
    "none of the files": {"x": 1}}


@pytest.mark.parametrize("kind", REFUSED)
def test_files_of_other_kinds_are_refused_by_name(tmp_path, kind):
    """Row 13: what the file is, and what would do, instead of a reason that is not one."""
    save_file({k: torch.zeros(n) for k, n in REFUSED[kind].items()}, file := tmp_path / "file.safetensors")
    with pytest.raises(ModelError, match=f"file.safetensors is {kind}"): loaded(file)


def test_eight_channels_are_refused_by_what_they_are(single):
    first = "model.diffusion_model.input_blocks.0.0.weight"
    file = copied(single, "edit.safetensors", lambda s: s | {first: torch.zeros(s[first].shape[0], 8, 3, 3)})
    with pytest.raises(ModelError, match="editing model: its UNet takes 8 channels"): loaded(file)


@pytest.mark.parametrize("kind", ["sd15-inpaint", "sdxl-deep-inpaint"])
def test_an_inpainting_checkpoint_in_one_file(kind, tmp_path):
    folder = tiny.save(tmp_path / "model", kind)
    parts = loaded(tiny.single(folder, tmp_path / "inpaint.safetensors"))
    assert parts.takes_mask and parts.latent_channels == 4
    written = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    assert torch.equal(parts.unet.conv_in.weight, written["conv_in.weight"])


def test_a_checkpoint_without_a_vae_takes_the_one_that_is_named(single, tmp_path):
    """Row 13: NoVAE files."""
    file = copied(single, "novae.safetensors", lambda s: {k: v for k, v in s.items() if not k.startswith("first_stage_model.")})
    with pytest.raises(ModelError, match="novae.safetensors has no VAE of its own: name one in SD_VAE_ID"): loaded(file)
    tiny.vae().save_pretrained(tmp_path / "vae")
    want = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(loaded(file, SD_VAE_ID=str(tmp_path / "vae")).vae.state_dict()["decoder.conv_in.weight"], want["decoder.conv_in.weight"])


def test_weights_of_other_types_are_refused_with_the_file(single):
    file = copied(single, "eight.safetensors", lambda s: {k: v.to(torch.float8_e4m3fn) if v.ndim == 4 else v for k, v in s.items()})
    with pytest.raises(ModelError, match=r"eight.safetensors holds weights of type F8_E4M3"): loaded(file)


def test_every_row_has_a_sampler_that_exists():
    from aura_engine.models import SAMPLERS
    assert {row.sampler for row in ROWS.values()} <= set(SAMPLERS) and all(hasattr(diffusers, s.cls) for s in SAMPLERS.values()) and Path


# rows: methods by their published names, unknown ones refused

def test_whole_checkpoints_are_known_by_their_files_names(single):
    """Row 2: an all-in-one Lightning or Turbo file is drawn as its row, from the file alone."""
    for name, row in (("sdxl_lightning_4step", "sdxl-lightning-4"), ("sd_xl_turbo_1.0_fp16", "sdxl-turbo"), ("sdxl_lightning_1step_x0", "sdxl-lightning-1")):
        parts = loaded(copied(single, f"{name}.safetensors", lambda s: s))
        assert parts.row.name == row and parts.row.guidance == (0, 0, 0)


METHODS = {
    "ByteDance/Hyper-SD/Hyper-SDXL-8steps-CFG-lora.safetensors": ("sdxl-hyper-8-cfg", 8, 5.0, dict(cls="DDIMScheduler", timestep_spacing="trailing")),
    "ByteDance/Hyper-SD/Hyper-SDXL-12steps-CFG-lora.safetensors": ("sdxl-hyper-12-cfg", 12, 5.0, dict(cls="DDIMScheduler", timestep_spacing="trailing")),
    "h1t/TCD-SDXL-LoRA": ("sdxl-tcd", 4, 0.0, dict(cls="TCDScheduler", eta=0.3)),
    "tianweiy/DMD2/dmd2_sdxl_4step_lora_fp16.safetensors": ("sdxl-dmd2-lora-fp16", 4, 0.0, dict(cls="LCMScheduler", timesteps=[999, 749, 499, 249])),
}


@pytest.mark.parametrize("lora", METHODS)
def test_methods_are_drawn_as_their_cards_say(tmp_path, lora):
    """Row 3: the stock pipeline set up by the model card, with the LoRA fused by hand."""
    name, steps, guidance, card = METHODS[lora]
    folder, card = saved(tmp_path / "model", "sdxl", OFFICIAL["sdxl"]), dict(card)
    file = tmp_path / lora if lora.endswith(".safetensors") else tmp_path / lora / "pytorch_lora_weights.safetensors"
    tiny.lora(file, xl=True, kohya=True)
    parts = loaded(folder, SD_LCM_LORA_ID=str(tmp_path / lora))
    assert (parts.row.name, parts.row.steps[1], parts.row.guidance[1]) == (name, steps, guidance) and not any("layers fit" in n for n in parts.notes)
    cls, extra = getattr(diffusers, card.pop("cls")), {k: card.pop(k) for k in ("eta", "timesteps") if k in card}
    base = loaded(folder)
    pipe = diffusers.StableDiffusionXLPipeline(base.vae, *base.text_encoders, *base.tokenizers, parts.unet, cls.from_config(OFFICIAL["sdxl"], **card), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    run = dict(timesteps=extra.pop("timesteps")) if "timesteps" in extra else dict(num_inference_steps=steps)
    want = pipe("a fox", width=128, height=128, guidance_scale=guidance, generator=torch.Generator().manual_seed(3), output_type="latent", **run, **extra).images
    # DDIM's very last alpha is 1 here and 0.99915 there (set_alpha_to_one), which is less than a value of 255
    assert close(drawn(parts, replace(FOX, steps=steps, guidance_scale=guidance)), want, 1e-2 if cls is diffusers.DDIMScheduler else 1e-4)


def test_an_unknown_method_is_refused_with_what_to_do(tmp_path):
    """Row 3: a style given as a method was drawn as LCM without a word."""
    folder, file = saved(tmp_path / "model", "sd15", OFFICIAL["cosine"]), tiny.lora(tmp_path / "ink.safetensors")
    with pytest.raises(Invalid, match="A style belongs in SD_LORAS"): loaded(folder, SD_LCM_LORA_ID=str(file))
    row = loaded(folder, SD_LCM_LORA_ID=str(file), SD_SAMPLER="ddim", SD_STEPS="12", SD_GUIDANCE="3").row
    assert (row.sampler, row.steps[1], row.guidance[1]) == ("ddim", 12, 3.0)
    assert loaded(folder, SD_LCM_LORA_ID=str(tiny.lora(tmp_path / "my-lcm.safetensors"))).row.sampler == "lcm"


def test_guidance_of_cards_that_were_corrected():
    assert ROWS["ssd-1b-lcm"].guidance[1] == 1.0 and ROWS["dreamshaper-xl-v2-turbo"].sampler == "dpm-sde" and ROWS["dreamshaper-xl-v2-turbo"].steps == (3, 6, 8)


def test_a_unet_alone_takes_the_base_that_is_named(tmp_path):
    """Row 11: offline, with a local base."""
    base = saved(tmp_path / "base", "sdxl", OFFICIAL["sdxl"])
    torch.manual_seed(9)
    other = tiny.unet(xl=True)
    save_file({k: v.contiguous() for k, v in other.state_dict().items()}, file := tmp_path / "sdxl_lightning_4step_unet.safetensors")
    parts = loaded(file, SD_BASE_ID=str(base))
    assert parts.row.name == "sdxl-lightning-4" and torch.equal(parts.unet.conv_in.weight, other.conv_in.weight)
    save_file({k: v.contiguous() for k, v in other.state_dict().items()}, mine := tmp_path / "mine.safetensors")
    assert loaded(mine, SD_BASE_ID=str(base)).row.name == "sdxl"
    with pytest.raises(ModelError, match="is a UNet alone: it needs a base: name it in SD_BASE_ID"): loaded(mine)
    with pytest.raises(ModelError, match=f"its base, {SDXL_ID}, cannot be had: .*HF_HUB_OFFLINE is set; SD_BASE_ID can name a folder with one"): loaded(file)


def test_a_local_lcm_unet_takes_the_base_that_is_named(tmp_path):
    """Row 11: a copy of latent-consistency/lcm-sdxl, offline. It was 'none of these'."""
    base, folder = saved(tmp_path / "base", "sdxl", OFFICIAL["sdxl"]), tmp_path / "latent-consistency" / "lcm-sdxl"
    tiny.unet(xl=True, time_cond_proj_dim=32).save_pretrained(folder)
    assert loaded(folder, SD_BASE_ID=str(base)).row.name == "sdxl-lcm"
    with pytest.raises(ModelError, match=f"its base, {SDXL_ID}, cannot be had: .*SD_BASE_ID"): loaded(folder)
    folder.rename(mine := tmp_path / "mine")
    assert loaded(mine, SD_BASE_ID=str(base)).row.name == "sdxl-lcm"
    with pytest.raises(ModelError, match="holds a UNet2DConditionModel alone: name its base in SD_BASE_ID"): loaded(mine)
    with pytest.raises(ModelError, match="holds a AutoencoderKL alone: a VAE belongs in SD_VAE_ID"): loaded(base / "vae")


def test_a_folder_called_lcm_makes_no_method(tmp_path):
    """The last part of a path names a LoRA, not the home of somebody who likes LCM."""
    folder = saved(tmp_path / "model", "sd15", OFFICIAL["cosine"])
    with pytest.raises(Invalid, match="none of the published methods"): loaded(folder, SD_LCM_LORA_ID=str(tiny.lora(tmp_path / "lcm-fan" / "ink.safetensors")))


def test_names_that_mislead_have_their_own_sentence(single, tmp_path):
    """Row 13: capital letters. A LoHa is no LoRA."""
    shutil.copy(single, loud := tmp_path / "MODEL.SAFETENSORS")
    with pytest.raises(Invalid, match="rename it to .safetensors"): loaded(loud)
    save_file({"lora_unet_a.hada_w1_a": torch.ones(1)}, file := tmp_path / "loha.safetensors")
    with pytest.raises(ModelError, match="loha.safetensors is a LoHa or LoKr"): loaded(file)


def test_the_facts_are_part_of_health(tmp_path):
    """Deliverable 1: what the files say, in /health."""
    engine = Engine(load_settings(SD_MODEL_ID=str(saved(tmp_path / "model", "sdxl", OFFICIAL["noob-vpred"])), SD_DEVICE="cpu", SD_BACKEND="torch")).start()
    assert engine.wait_ready(120), engine.reason
    assert engine.health().to_json()["facts"] == "a diffusers folder that predicts v_prediction, with a schedule that ends in pure noise, made for EulerDiscreteScheduler"
    engine.close()


# row 9: what is in the files is in the model, and nothing is made up

@pytest.fixture(scope="module")
def whole(tmp_path_factory): return tiny.save(tmp_path_factory.mktemp("whole") / "model", "sdxl")


def changed(whole, folder, part, change):
    """A copy of the folder with another weights file in one part. -> the folder."""
    shutil.copytree(whole, folder)
    file = next((folder / part).glob("*.safetensors"))
    save_file(change(load_file(file)), file)
    return folder


def part_of(parts, part): return {"unet": parts.unet, "vae": parts.vae, "text_encoder": parts.text_encoders[0], "text_encoder_2": parts.text_encoders[1]}[part]


@pytest.mark.parametrize("part, word", [("text_encoder", "_orig_mod."), ("text_encoder", "text_encoder."), ("text_encoder", "text_model."), ("text_encoder_2", "module."), ("text_encoder_2", "text_encoder_2._orig_mod."), ("unet", "_orig_mod."), ("vae", "module.")])
def test_words_before_names_are_taken_off(whole, tmp_path, part, word):
    """Compared with the tensors in the file. Before, a text encoder was random, another one at each start."""
    folder = changed(whole, tmp_path / "model", part, lambda s: {word + k: v for k, v in s.items()})
    parts = loaded(folder)
    got, want = part_of(parts, part).state_dict(), load_file(next((folder / part).glob("*.safetensors")))
    bare = {k.removeprefix(word).removeprefix("text_model."): v for k, v in want.items()}
    assert {k.removeprefix("text_model.") for k in got} == bare.keys()
    assert all(torch.equal(v, bare[k.removeprefix("text_model.")]) for k, v in got.items())
    assert word == "text_model." or any(f"{part}: its tensors are named {word}" in n for n in parts.notes)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "unet", "vae"])
def test_missing_tensors_are_refused_with_file_and_names(whole, tmp_path, part):
    gone = sorted(load_file(next((whole / part).glob("*.safetensors"))))[2:4]
    folder = changed(whole, tmp_path / "model", part, lambda s: {k: v for k, v in s.items() if k not in gone})
    with pytest.raises(ModelError, match=rf"{part}/.*safetensors lacks 2 tensors: .*{gone[0].removeprefix('text_model.')}"): loaded(folder)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(whole, tmp_path, part, value):
    """One value of one tensor is enough."""
    def spoil(state):
        last = sorted(state)[-1]
        state[last].view(-1)[-1] = value
        return state
    with pytest.raises(ModelError, match=rf"{part}/.*safetensors holds values that are no numbers \("): loaded(changed(whole, tmp_path / "model", part, spoil))


@pytest.mark.parametrize("part, dtype, name", [("text_encoder", torch.int8, "I8"), ("unet", torch.float8_e4m3fn, "F8_E4M3")])
def test_weights_of_a_folder_have_a_type_that_is_run_in(whole, tmp_path, part, dtype, name):
    with pytest.raises(ModelError, match=rf"holds weights of type {name} \("): loaded(changed(whole, tmp_path / "model", part, lambda s: {k: v.to(dtype) if v.numel() > 1000 else v for k, v in s.items()}))


def test_tensors_without_a_place_are_told(whole, tmp_path):
    parts = loaded(changed(whole, tmp_path / "model", "text_encoder", lambda s: s | {"visual.proj": torch.ones(2), "embeddings.position_ids": torch.arange(77)}))
    assert [n for n in parts.notes if "not used" in n] == ["text_encoder: 1 tensors in its file are not used (visual.proj …)"]


@pytest.mark.parametrize("where", ["index", "vae"])
def test_a_part_is_of_a_class_that_is_built_here(whole, tmp_path, where):
    """A folder cannot name a class of its own choice: a VAE that says it is a pipeline was built as one."""
    shutil.copytree(whole, folder := tmp_path / "model")
    if where == "index":
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder": ["transformers", "AutoModel"]}))
        with pytest.raises(ModelError, match="its text_encoder is a AutoModel; allowed: CLIPTextModel"): loaded(folder)
    else:
        (folder / "vae" / "config.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
        with pytest.raises(ModelError, match="SD_VAE_ID=.*its config.json names a StableDiffusionPipeline; allowed: "): loaded(whole, SD_VAE_ID=str(folder / "vae"))


def test_single_files_lack_nothing_either(single):
    for stem, part in (("conditioner.embedders.0.", "text_encoder"), ("conditioner.embedders.1.", "text_encoder_2"), ("model.diffusion_model.", "unet"), ("first_stage_model.", "vae")):
        def less(state, stem=stem):
            gone = [k for k in sorted(state) if k.startswith(stem) and k.endswith("bias")][-1]
            return {k: v for k, v in state.items() if k != gone}
        words = rf"less-{part}.safetensors \({part}\) lacks [1-3] tensors: " if part.startswith("text") else f"less-{part}.safetensors lacks tensors of its UNet or of its VAE"
        with pytest.raises(ModelError, match=words): loaded(copied(single, f"less-{part}.safetensors", less))


def test_a_lone_unet_in_the_original_names_is_the_same_unet(single, tmp_path):
    """As other programs extract it. With a base it was 'not the names the configuration asks for'."""
    folder = single.with_suffix("")
    base = tiny.save(tmp_path / "base", "sdxl-deep")
    file = copied(single, "alone.safetensors", lambda s: {k: v for k, v in s.items() if k.startswith("model.diffusion_model.")})
    got, want = loaded(file, SD_BASE_ID=str(base)).unet.state_dict(), loaded(single).unet.state_dict()
    assert folder.exists() and all(torch.equal(v, want[k]) for k, v in got.items())
    file = copied(single, "wrapped.safetensors", lambda _: {f"_orig_mod.{k}": v.contiguous() for k, v in want.items()})
    with pytest.raises(ModelError, match="is a UNet alone"): loaded(file)
    got = loaded(file, SD_BASE_ID=str(base)).unet.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in got.items())
