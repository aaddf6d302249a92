"""A lone trajectory is the diffusers pipeline: SD 1.5 with a KL VAE, a full LCM UNet, SDXL, on tiny random weights through the real loading path."""
import base64, io, shutil, subprocess, sys
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import modelhub
import tiny, tiny_flow
from conftest import clean_env
from aura_engine.config import load_settings
from aura_engine.engine import Engine
from aura_engine.loader import load
from aura_engine.models import FLOW_ROWS, ROWS, SAMPLERS, SD15_ID, SDXL_ID, SSD_ID, XL, executed_steps
from aura_engine.planning import plan
from aura_engine.trajectory import TextCache, Trajectory, advance, decode_latents
from aura_engine.types import GenerateRequest, ModelError, Picture, Plan, RefineConfig, RefineRequest

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8))
(buffer := io.BytesIO(), PHOTO.save(buffer, "PNG"))
PHOTO_TEXT = base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module", params=["sd15", "sd15-lcm", "sdxl"])
def family(request, tmp_path_factory):
    folder = tiny.save(tmp_path_factory.mktemp(request.param) / "model", request.param)
    return request.param, folder, load(load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu"))


def test_the_row_is_read_from_the_files(family):
    name, _, parts = family
    assert parts.row.name == name and parts.row.native == 128 and parts.row.token_limit == 77


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("init", [None, PHOTO], ids=["txt2img", "img2img"])
@pytest.mark.parametrize("sampler", ["lcm", "ddim", "euler", "euler-x0", "tcd", "dpm"])
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
    fixed, extra = dict(add_watermarker=False) if parts.xl else {}, {}
    extra |= dict(SAMPLERS[p.scheduler].step)                                       # eta, which the pipelines take as an argument of the call
    size = {} if p.init else dict(width=p.width, height=p.height)
    steps = executed_steps(p.steps, p.strength, SAMPLERS[p.scheduler].max_steps)[1] if p.init else p.steps
    if p.init: size = dict(image=p.init, strength=p.strength)

    def call(output):
        pipe = cls(**args, unet=parts.unet, scheduler=parts.scheduler(p.scheduler), **fixed)
        pipe.set_progress_bar_config(disable=True)
        out = pipe(p.prompt, num_inference_steps=steps, guidance_scale=p.guidance_scale, generator=torch.Generator().manual_seed(p.seed), output_type=output, **size, **extra)
        return out.images.float()
    return call


def test_each_family_serves_and_mixes(family):
    """Generation and refinement through the engine, no code but the folder's name changes."""
    name, folder, _ = family
    engine = Engine(load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu")).start()
    assert engine.wait_ready(120), engine.reason
    ask = plan(GenerateRequest(prompt="a fox and an owl " * 100, seed=1, n=2, steps=2), engine.row)
    refine = plan(RefineRequest(refine_prompt="a fox", images=["x"], config=RefineConfig(seed=1, steps=2)), engine.row, [PHOTO])
    jobs = [engine.submit(ask), engine.submit(refine)]
    one, two = (j.result(120) for j in jobs)
    assert len(one) == 2 and len(two) == 1 and two[0].image.size == (128, 128)
    assert any("cut" in w for w in jobs[0].warnings)                       # more than four chunks of 77 tokens
    alone = engine.submit(Plan((replace(ask.pictures[1]),))).result(120)[0]
    assert np.abs(np.asarray(alone.image, int) - np.asarray(one[1].image, int)).max() <= 1
    engine.close()


AT_ONCE = """
from concurrent.futures import ThreadPoolExecutor
import torch
from safetensors.torch import load_file
from aura_engine.config import load_settings
from aura_engine.loader import load
from aura_engine.models import EMBEDDED
settings = load_settings(SD_MODEL_ID="embedded", SD_DEVICE="cpu")
with ThreadPoolExecutor(4) as pool: loaded = list(pool.map(lambda _: load(settings), range(4)))
for parts in loaded:
    for name, module in (("unet", parts.unet), ("vae", parts.vae), ("text_encoder", parts.text_encoders[0])):
        state, written = module.state_dict(), load_file(next((EMBEDDED / name).glob("*.safetensors")))
        assert all(torch.equal(state[k], v.to(state[k].dtype)) for k, v in written.items()), name
assert torch.get_default_dtype() == torch.float32
"""


def test_threads_that_load_at_once_get_the_same_weights():
    """The libraries change torch's initialisers and default type while they build a model, and diffusers even itself at its first import.
    Four starts at once, in a fresh process, are four times the model in the file."""
    done = subprocess.run([sys.executable, "-c", AT_ONCE], env=clean_env(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


# the whole table, under the published names, from a Hub

BASES = {"sd15": SD15_ID, "sdxl": SDXL_ID, "ssd-1b": SSD_ID}


def family_of(row): return next(b for b in ("ssd-1b", "sdxl", "sd15") if row.name.startswith(b) or row.name.startswith("sd-turbo"))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Every repository that the table names, with tiny models in it."""
    at = tmp_path_factory.mktemp("published")
    whole = {kind: modelhub.files_of(tiny.save(at / kind, kind)) for kind in ("sd15", "sd15-lcm", "sdxl")}
    flow = {row.name: modelhub.files_of(tiny_flow.save(at / row.name, row.name)) for row in FLOW_ROWS}
    lone = {xl: file_bytes(save_file, {k: v.contiguous() for k, v in other(xl).state_dict().items()}, at / f"unet-{xl}") for xl in (False, True)}
    fused = {xl: tiny.lora(at / f"lora-{xl}.safetensors", xl, kohya=xl).read_bytes() for xl in (False, True)}
    repos = {}
    for row in ROWS.values():
        xl = row.pipeline == XL
        for i in row.ids: repos[i] = flow.get(row.name) or whole["sd15-lcm" if row.guidance_embedded else "sdxl" if xl else "sd15"]
        for source, data in ((row.unet, lone[xl]), (row.lora, fused[xl])):
            if source and source.endswith(".safetensors"): repos.setdefault("/".join(source.split("/")[:2]), {})["/".join(source.split("/")[2:])] = data
            elif source: repos[source] = {"pytorch_lora_weights.safetensors": data} if source == row.lora else lcm_unet(at / source.replace("/", "-"))
    for name, vae in (("madebyollin/taesd", tiny.tiny_vae()), ("madebyollin/taesdxl", tiny.tiny_vae()), ("madebyollin/sdxl-vae-fp16-fix", tiny.vae())):
        vae.save_pretrained(at / name)
        repos[name] = modelhub.files_of(at / name)
    hub, worker = modelhub.shared()
    hub.calm()
    hub.repos, hub.token = repos, None
    return hub, lambda **kw: worker("serve", at / "cache", **kw)


def other(xl):
    torch.manual_seed(9)
    return tiny.unet(xl=xl)


def lcm_unet(folder):
    torch.manual_seed(5)
    tiny.unet(xl=True, time_cond_proj_dim=32).save_pretrained(folder)
    return modelhub.files_of(folder)


def file_bytes(save, data, path):
    save(data, path)
    return path.read_bytes()


def settings_of(row):
    """What somebody sets to get this row."""
    if row.lora: return {"SD_MODEL_ID": "embedded-base" if row.name.startswith("embedded") else BASES[family_of(row)], "SD_LCM_LORA_ID": row.lora}
    return {"SD_MODEL_ID": row.unet or row.ids[0]}


def of_each_kind():
    """The rows. Of those that differ in their number of steps alone, the last. (test_recipes draws every row.)"""
    kinds = {}
    for row in ROWS.values(): kinds.setdefault((row.pipeline, row.sampler, row.guidance, row.fixed, bool(row.lora), row.ids, row.name.rstrip("-0123456789cfg")), []).append(row.name)
    return [names[-1] for names in kinds.values()]


@pytest.mark.parametrize("name", of_each_kind())
def test_every_row_generates_and_refines(published, name):
    """Only the environment differs. The answer says which numbers were used, and what was put right."""
    hub, serve = published
    row, ask = ROWS[name], {"prompt": "a red apple", "negativePrompt": "blue", "seed": 1}
    out = serve(**settings_of(row), requests=[("/generate", {"prompt": "a red apple", "seed": 1}), ("/generate", {**ask, "steps": 13, "guidanceScale": 25, "aspectRatio": "4:3"}),
                                              ("/refine", {"refinePrompt": "a fox", "images": [PHOTO_TEXT], "config": {"seed": 2, "strength": 0.05}})])
    health, (plain, pushed, refined) = out["health"], out["answers"]
    assert health["status"] == "ready" and health["family"] == name and health["scheduler"] == SAMPLERS[row.sampler].cls, health["reason"]
    assert [a["status"] for a in out["answers"]] == [200] * 3 and all(c > 50 for a in out["answers"] for c in a["colours"])
    assert plain["receipts"][0]["steps"] == row.steps[1] and plain["receipts"][0]["guidanceScale"] == row.guidance[1] and not plain["warnings"]
    assert pushed["receipts"][0]["steps"] == max(row.steps[0], min(13, row.steps[2])) and pushed["receipts"][0]["guidanceScale"] == min(25, row.guidance[2])
    said = {w.split()[0] for w in pushed["warnings"]}
    assert "Guidance" in said and ("Steps" in said) == (not row.steps[0] <= 13 <= row.steps[2]) and ("The" in said) == (not row.cfg)       # the negative prompt
    run, strength = refined["receipts"][0]["steps"], refined["receipts"][0]["strength"]
    if row.fixed: assert run == 1 and strength == 1 / row.steps[0] and any(w.startswith("Strength 0.05 became") for w in refined["warnings"])
    elif row.refine == "reference": assert strength == 1 and any("trength" in w for w in refined["warnings"])
    else: assert run >= 1 and strength == 0.05


def test_the_names_people_set(published):
    """The removed id, a repository with several files, a VAE by its id: each says in /health what it became."""
    hub, serve = published
    health = serve(SD_MODEL_ID="runwayml/stable-diffusion-v1-5", SD_LCM_LORA_ID="ByteDance/Hyper-SD", SD_VAE_ID="madebyollin/taesd", requests=[("/generate", {"prompt": "a fox"})])
    assert health["health"]["family"] == "sd15-hyper-4" and any("removed from the Hub" in w for w in health["health"]["warnings"]) and health["answers"][0]["status"] == 200
    assert serve(SD_MODEL_ID="ByteDance/SDXL-Lightning", SD_VAE_ID="madebyollin/sdxl-vae-fp16-fix")["health"]["family"] == "sdxl-lightning-4"


def test_a_distilled_unet_spares_the_bases(published):
    hub, serve = published
    hub.calm()
    _, worker = modelhub.shared()
    folder = "unspoilt-" + modelhub.etag("", b"lightning")
    told = worker("load", Path(worker.log).parent / folder, SD_MODEL_ID=ROWS["sdxl-lightning-2"].unet)
    assert told["row"] == "sdxl-lightning-2" and told["unet"] == modelhub.fingerprint(other(True))
    assert not hub.counts(f"{SDXL_ID}/resolve/.*/unet/.*safetensors") and hub.counts(f"{SDXL_ID}/resolve/.*/unet/config.json")


MISFITS = {"made for another family": {"SD_MODEL_ID": SDXL_ID, "SD_LCM_LORA_ID": "latent-consistency/lcm-lora-sdv1-5"},
           "does not fit this model": {"SD_MODEL_ID": SDXL_ID, "SD_LCM_LORA_ID": "stranger/lcm-lora"},
           "made for the latents of StableDiffusionXLPipeline": {"SD_MODEL_ID": SD15_ID, "SD_VAE_ID": "madebyollin/taesdxl"},
           "3 .safetensors files; name one of them, as stranger/lcm-many/a.safetensors": {"SD_MODEL_ID": SD15_ID, "SD_LCM_LORA_ID": "stranger/lcm-many"}}


@pytest.mark.parametrize("words", MISFITS)
def test_what_does_not_fit_says_so_and_the_server_stays(published, words):
    hub, serve = published
    fits_sd15 = hub.repos["latent-consistency/lcm-lora-sdv1-5"]
    hub.repos |= {"stranger/lcm-lora": fits_sd15, "stranger/lcm-many": {f"{n}.safetensors": b"x" for n in "abc"}}
    out = serve(**MISFITS[words], requests=[("/generate", {"prompt": "a fox"})])
    assert out["health"]["status"] == "failed" and words in out["health"]["reason"] and out["answers"][0]["status"] == 503
    assert words in out["answers"][0]["detail"]


# parts from files of this machine

def test_a_fused_lora_is_the_lora(tmp_path):
    """The fused UNet answers as the UNet with peft's adapter does, whichever layout the file has."""
    base, inputs = tiny.save(tmp_path / "base"), dict(sample=torch.ones(1, 4, 16, 16), timestep=torch.tensor(500), encoder_hidden_states=torch.ones(1, 7, 32))
    pipe = diffusers.DiffusionPipeline.from_pretrained(base, safety_checker=None)
    plain = pipe.unet(**inputs).sample
    pipe.load_lora_weights(str(tiny.lora(tmp_path / "lcm-a.safetensors")))
    wanted = pipe.unet(**inputs).sample
    assert (wanted - plain).abs().max() > 1e-2
    for name, kohya in (("a", False), ("b", True)):
        file = tiny.lora(tmp_path / f"lcm-{name}.safetensors", kohya=kohya)
        parts = load(load_settings(SD_MODEL_ID=str(base), SD_LCM_LORA_ID=str(file), SD_DEVICE="cpu"))
        assert (parts.unet(**inputs).sample - wanted).abs().max() < 1e-4 and parts.row.name == "sd15-lcm-lora"
        assert not any("lora" in k for k in parts.unet.state_dict())                # fused: nothing left to compute


@pytest.mark.parametrize("file, name", [("Hyper-SD15-8steps-lora.safetensors", "sd15-hyper-8"), ("pytorch_lora_weights.safetensors", "sd15-lcm-lora")])
def test_a_copied_lora_is_known_by_its_file_name(tmp_path, file, name):
    base, made = tiny.save(tmp_path / "base"), tiny.lora(tmp_path / "my-lcm-lora" / file)
    assert load(load_settings(SD_MODEL_ID=str(base), SD_LCM_LORA_ID=str(made), SD_DEVICE="cpu")).row.name == name
    if name == "sd15-lcm-lora": assert load(load_settings(SD_MODEL_ID=str(base), SD_LCM_LORA_ID=str(made.parent), SD_DEVICE="cpu")).row.name == name


@pytest.mark.parametrize("published_as, name", [("stabilityai/sd-turbo", "sd-turbo"), ("somebody/my-turbo", "sd15")])
def test_a_copied_model_is_known_by_the_end_of_its_path(tmp_path, published_as, name):
    (tmp_path / published_as).parent.mkdir(parents=True)
    assert load(load_settings(SD_MODEL_ID=str(tiny.save(tmp_path / published_as)), SD_DEVICE="cpu")).row.name == name


@pytest.mark.parametrize("kind, name", [("sd15", "sd15"), ("sdxl-deep", "sdxl")])
def test_a_single_checkpoint_is_the_folder(tmp_path, kind, name):
    """The original layout, read back by diffusers' own conversion: family told from the header, every weight where it was."""
    folder = tiny.save(tmp_path / kind, kind)
    file = tiny.single(folder, tmp_path / "one.safetensors")
    ours, theirs = (load(load_settings(SD_MODEL_ID=str(s), SD_DEVICE="cpu")) for s in (file, folder))
    assert ours.row.name == name and ours.schedule == theirs.schedule
    for a, b in zip((ours.unet, ours.vae, *ours.text_encoders), (theirs.unet, theirs.vae, *theirs.text_encoders), strict=True):
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items()) and a.state_dict().keys() == b.state_dict().keys()
    shutil.rmtree(file.with_suffix(""))                                            # without its configuration, and without a Hub
    with pytest.raises(ModelError, match=f"its configuration, {BASES[name]}, could not be fetched: .*HF_HUB_OFFLINE.*a folder with it named one"): load(load_settings(SD_MODEL_ID=str(file), SD_DEVICE="cpu"))
    with pytest.raises(ModelError, match="lora.safetensors is a LoRA: it changes a model"): load(load_settings(SD_MODEL_ID=str(tiny.lora(tmp_path / "lora.safetensors")), SD_DEVICE="cpu"))


def test_a_single_checkpoint_from_the_hub(published, tmp_path):
    """Its configuration comes from the family's repository, not its weights."""
    hub, serve = published
    hub.calm()
    hub.repos["somebody/mix"] = {"mix-v3.safetensors": tiny.single(tiny.save(tmp_path / "sd15"), tmp_path / "one.safetensors").read_bytes()}
    _, worker = modelhub.shared()
    told = worker("load", tmp_path / "cache", SD_MODEL_ID="somebody/mix/mix-v3.safetensors")
    assert told["row"] == "sd15" and not hub.counts(f"{SD15_ID}/.*safetensors") and hub.counts(f"{SD15_ID}/.*/unet/config.json")


def test_half_precision_takes_the_half_files(tmp_path):
    folder = tiny.save(tmp_path / "model")
    tiny.save(tmp_path / "half", variant="fp16", seed=3)
    for p in (tmp_path / "half").rglob("*.fp16.safetensors"): shutil.copy(p, folder / p.relative_to(tmp_path / "half"))
    full, half = (load(load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu", SD_PRECISION=p)) for p in ("fp32", "bf16"))
    assert half.dtype == torch.bfloat16 and (full.unet.conv_in.weight - half.unet.conv_in.weight.float()).abs().max() > 0.01      # other weights: the fp16 files
    alone = load(load_settings(SD_MODEL_ID=str(tmp_path / "half"), SD_DEVICE="cpu", SD_PRECISION="fp32"))
    assert alone.dtype == torch.float32 and torch.allclose(alone.unet.conv_in.weight.bfloat16(), half.unet.conv_in.weight)


@pytest.mark.parametrize("vae, size", [("tiny", 1), ("kl", 1)])
def test_another_vae_decodes(tmp_path, vae, size):
    (tiny.tiny_vae() if vae == "tiny" else tiny.vae()).save_pretrained(tmp_path / "vae")
    parts = load(load_settings(SD_MODEL_ID=str(tiny.save(tmp_path / "model")), SD_VAE_ID=str(tmp_path / "vae"), SD_DEVICE="cpu"))
    assert type(parts.vae).__name__ == {"tiny": "AutoencoderTiny", "kl": "AutoencoderKL"}[vae] and parts.vae_scale == 8
    assert decode_latents(parts, torch.randn(1, 4, 16, 16))[0].size == (128, 128)


def test_an_overflowing_vae_is_decoded_in_fp32(tmp_path):
    """What SDXL's VAE does in half precision: NaN, without an error. The picture is made all the same, and the repair is told."""
    parts = load(load_settings(SD_MODEL_ID=str(tiny.save(tmp_path / "model")), SD_DEVICE="cpu", SD_PRECISION="bf16"))
    overflow = parts.vae.decoder.register_forward_hook(lambda m, a, out: out * (float("nan") if out.dtype != torch.float32 else 1))
    image, repaired = decode_latents(parts, torch.randn(1, 4, 16, 16))
    assert repaired and len(image.getcolors(1 << 24)) > 50 and parts.vae.dtype == torch.bfloat16
    overflow.remove()
    assert decode_latents(parts, torch.randn(1, 4, 16, 16))[1] is False


@pytest.mark.parametrize("damage, words", [("pickles", "only pickled weights"), ("editing", "its UNet takes 8 channels"), ("class", "it is a StableDiffusion3Pipeline"), ("shard", "unet lacks 1 of the 2 files of its weights")])
def test_a_folder_that_cannot_be_served_says_why(tmp_path, damage, words):
    folder = tiny.save(tmp_path / "model")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    if damage == "pickles": torch.save({}, weights.with_suffix(".bin")); weights.unlink()
    if damage == "shard": weights.rename(weights.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    if damage == "class": (folder / "model_index.json").write_text((folder / "model_index.json").read_text().replace("StableDiffusionPipeline", "StableDiffusion3Pipeline"))
    if damage == "editing": tiny.unet(in_channels=8).save_pretrained(folder / "unet")
    with pytest.raises(ModelError, match=words): load(load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu"))
