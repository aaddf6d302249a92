"""LoRAs by the request: SD_LORAS names them, a request picks one by its alias, and nobody's picture depends on what the others asked for."""
import base64, io, json, subprocess, sys
from dataclasses import replace

import diffusers
import httpx
import numpy as np
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

import modelhub
import tiny
from conftest import clean_env
from aura_engine import optimize as opt
from aura_engine import packing
from aura_engine.client import AuraClient
from aura_engine.config import SettingsError, load_settings
from aura_engine.engine import Engine
from aura_engine.loader import load, quiet
from aura_engine.models import SAMPLERS
from aura_engine.planning import plan
from aura_engine.trajectory import TextCache, Trajectory, advance
from aura_engine.types import GenerateRequest, Invalid, Picture, Plan, RefineConfig, RefineRequest
from aura_engine.widgets import Compare

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8))
(buffer := io.BytesIO(), PHOTO.save(buffer, "PNG"))
PHOTO_TEXT = base64.b64encode(buffer.getvalue()).decode()
FOX = Picture("a red fox", 128, 128, steps=4, guidance_scale=3.0, seed=3, temperature=1.0, negative_prompt="blue")


def texts_too(base, folder, seed):
    """A LoRA of the UNet and of each text encoder, written by diffusers itself. -> the folder."""
    torch.manual_seed(seed)
    with quiet(): pipe = diffusers.DiffusionPipeline.from_pretrained(base, safety_checker=None)
    layers = lambda m, names: (m.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=names, init_lora_weights=False)), get_peft_model_state_dict(m))[1]
    made = {"unet_lora_layers": layers(pipe.unet, ["to_q", "to_v", "proj_in", "conv1"])}
    for name in ("text_encoder", "text_encoder_2"):
        if getattr(pipe, name, None): made[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(layers(getattr(pipe, name), ["q_proj", "v_proj"]))
    pipe.save_lora_weights(folder, **made)
    return folder


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def family(request, tmp_path_factory):
    """(folder of the model, {alias: source}): `ink` changes the UNet alone and has kohya's layout, `clay` is diffusers' and changes the text encoders too."""
    at = tmp_path_factory.mktemp(request.param)
    base = tiny.save(at / "model", request.param)
    return base, {"ink": str(tiny.lora(at / "ink.safetensors", request.param == "sdxl", seed=1, kohya=True)), "clay": str(texts_too(base, at / "clay", 2))}


def settings(base, loras, **how):
    return load_settings(**{"SD_MODEL_ID": str(base), "SD_DEVICE": "cpu", "SD_BACKEND": "torch", "SD_LORAS": ",".join(f"{a}={s}" for a, s in loras.items())} | how)


def stock(base, source, p):
    """Latents of diffusers' own pipeline, with that LoRA loaded as its manual says."""
    with quiet(): pipe = diffusers.DiffusionPipeline.from_pretrained(base)
    if source:
        with quiet(): pipe.load_lora_weights(source)
    sampler = SAMPLERS[p.scheduler]
    pipe.scheduler = getattr(diffusers, sampler.cls).from_config({**{k: v for k, v in pipe.scheduler.config.items() if k not in ("use_karras_sigmas", "timestep_spacing", "algorithm_type")}, **sampler.config})
    pipe.set_progress_bar_config(disable=True)
    return pipe(p.prompt, negative_prompt=p.negative_prompt or None, width=p.width, height=p.height, num_inference_steps=p.steps, guidance_scale=p.guidance_scale,
                generator=torch.Generator().manual_seed(p.seed), output_type="latent").images


def alone(parts, p, rows=0):
    t = Trajectory(parts, p, TextCache(parts))
    while not t.done: advance([t], parts.unet, rows)
    return t.latents


@pytest.mark.parametrize("sampler", ["lcm", "euler", "dpm"])
def test_a_picture_with_an_alias_is_the_pipelines(family, sampler):
    """Alone, and in turns with others, as the engine takes them: every alias, and none, is what diffusers draws with that LoRA. And they differ."""
    base, loras = family
    parts, plain = load(settings(base, loras)), load(settings(base, {}))
    mine = [replace(FOX, scheduler=sampler, lora=a, seed=s, guidance_scale=g) for a in (None, "ink", "clay") for s, g in ((3, 3.0), (4, 1.0))]
    texts = TextCache(parts)
    crowd = [Trajectory(parts, p, texts) for p in mine]
    for k in range(FOX.steps):
        for alias in ((None, "ink", "clay"), ("clay", None, "ink"))[k % 2]: advance([t for t in crowd if t.picture.lora == alias], parts.unet)
    for t, p in zip(crowd, mine, strict=True):
        assert t.done and (t.latents - alone(parts, p)).abs().max() <= 1e-3
        assert (t.latents - stock(base, loras.get(p.lora), p)).abs().max() <= 1e-3
        if p.lora is None: assert torch.equal(alone(parts, p), alone(plain, p))            # to the last bit: none on is the model as it is
        else: assert (t.latents - alone(plain, replace(p, lora=None))).abs().max() > 0.1


def test_texts_are_encoded_once_where_the_lora_leaves_them_alone(family):
    base, loras = family
    parts = load(settings(base, loras))
    texts, calls = TextCache(parts), []
    parts.text_encoders[0].register_forward_hook(lambda *_: calls.append(1))
    one = {a: texts(texts.keys(replace(FOX, lora=a))[-1]).embeds for a in (None, "ink", "clay", None, "ink")}
    assert len(calls) == 2 and torch.equal(one[None], one["ink"]) and (one[None] - one["clay"]).abs().max() > 1e-2


def test_a_crowd_through_the_engine(family):
    """None, ink and clay at once: calls hold one alias each, all pictures are those that each alone would be, and nothing is read after the start."""
    base, loras = family
    engine = Engine(settings(base, loras)).start()
    assert engine.wait_ready(120), engine.reason
    called, unet = [], engine.parts.unet
    unet.register_forward_hook(lambda m, args, out: called.append((engine.parts.loras.on["unet"], len(args[0]))))
    reads = []
    engine.parts.loras.layers["unet"][0].register_load_state_dict_pre_hook(lambda *_: reads.append(1))
    mine = [replace(FOX, steps=2 + i % 3, seed=i, guidance_scale=(1.0, 3.0)[i % 2], lora=(None, "ink", "clay")[i % 3], init=PHOTO if i % 4 == 3 else None, strength=0.5 if i % 4 == 3 else None) for i in range(12)]
    jobs = [engine.submit(Plan((p,))) for p in mine]
    crowd = [j.result(120)[0] for j in jobs]
    assert {a for a, _ in called} == {None, "ink", "clay"} and not reads
    done = len(called)
    lone = [engine.submit(Plan((p,))).result(120)[0] for p in mine]
    assert done <= len(called) - done                                     # companions shared calls, or at least took no more of them
    for p, a, b in zip(mine, crowd, lone, strict=True):
        assert np.abs(np.asarray(a.image, int) - np.asarray(b.image, int)).max() <= 1
        assert (a.receipt.lora, a.receipt.lora_alias, a.receipt.lora_source) == (None, p.lora, loras.get(p.lora))
    engine.close()


def test_beside_a_fused_method(family, tmp_path):
    """SD_LCM_LORA_ID for all, an alias for one: the pipeline with both, and the receipt has both."""
    base, loras = family
    method = tiny.lora(tmp_path / "lcm.safetensors", base.parent.name.startswith("sdxl"), seed=7)
    parts = load(settings(base, loras, SD_LCM_LORA_ID=str(method)))
    p = replace(FOX, scheduler="lcm", guidance_scale=1.5, negative_prompt="")
    with quiet():
        pipe = diffusers.DiffusionPipeline.from_pretrained(base)
        for name, source in (("method", str(method)), ("ink", loras["ink"])): pipe.load_lora_weights(source, adapter_name=name)
        pipe.set_adapters(["method", "ink"])
    inputs = dict(sample=torch.ones(1, 4, 16, 16), timestep=torch.tensor(500), encoder_hidden_states=torch.ones(1, 7, parts.unet.config.cross_attention_dim))
    if parts.xl: inputs["added_cond_kwargs"] = {"text_embeds": torch.ones(1, 32), "time_ids": torch.ones(1, 6)}
    parts.loras.use("ink")
    with torch.inference_mode(): assert (parts.unet(**inputs).sample - pipe.unet(**inputs).sample).abs().max() < 1e-3
    with torch.inference_mode(): assert alone(parts, replace(p, lora="ink")).isfinite().all() and parts.row.sampler == "lcm"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_optimised_with_aliases(family, precision):
    """What would freeze the weights is declined, with the reason. Packed weights stay packed while aliases come and go."""
    base, loras = family
    s = settings(base, loras, SD_PRECISION=precision, SD_BACKEND="auto", TORCH_COMPILE="force")
    parts, plain = opt.optimize(load(s), s), load(s)
    said = "; ".join(parts.optimizations)
    assert parts.backend == "torch" and "declined: torch.compile (SD_LORAS" in said
    assert not opt.find_spec("openvino") or "declined: OpenVINO (SD_LORAS" in said
    assert {p.dtype for p in parts.unet.parameters()} == {torch.float32 if precision == "fp32" else torch.bfloat16}
    for alias in (None, "ink", "clay", None): gap = (alone(parts, replace(FOX, lora=alias)) - (want := alone(plain, replace(FOX, lora=alias)))).abs().max(); assert gap < (2e-3 if precision == "fp32" else 0.5) * want.abs().max()
    if "packed" in said:
        packed = [m for m in parts.unet.modules() if isinstance(m, packing.Packed)]
        assert packed and all(m.packed is not None for m in packed if m in [l.base_layer for l in parts.loras.layers["unet"]])


# what is asked for, and what may be

def test_an_unknown_alias_is_refused_with_those_there_are(family):
    row = load(settings(*family)).row
    assert plan(GenerateRequest(prompt="x", lora="clay", n=2), row).pictures[1].lora == "clay" and plan(GenerateRequest(prompt="x"), row).pictures[0].lora is None
    refining = RefineRequest(refine_prompt="x", images=["x"], config=RefineConfig(lora="oil"))
    for ask, loc in ((GenerateRequest(prompt="x", lora="oil"), "lora"), (refining, "lora")):
        with pytest.raises(Invalid) as e: plan(ask, row, [PHOTO])
        assert (e.value.errors[0].loc, e.value.errors[0].given, e.value.errors[0].allowed) == (loc, "'oil'", "ink, clay")


@pytest.mark.parametrize("value, words", [("ink", "alias=id"), ("=a/b", "alias=id"), ("ink=", "alias=id"), ("a b=c/d", "alias=id"), ("ink=a/b,ink=c/d", "twice")])
def test_a_wrong_setting_says_so(value, words):
    with pytest.raises(SettingsError, match=f"(?s)SD_LORAS.*{words}"): load_settings(SD_LORAS=value)


WRONG = {"another base": "does not fit this model", "no lora": "and no LoRA", "pickle": "only safetensors", "missing": "no such file or folder", "cut": "damaged", "nan": "values that are no numbers",
         "latent-consistency/lcm-lora-sdv1-5": "belongs in SD_LCM_LORA_ID"}


@pytest.mark.parametrize("how", WRONG)
def test_what_does_not_fit_fails_at_the_start(tmp_path, how):
    """/health says which alias, which source and why. The server stays up."""
    good, file = tiny.lora(tmp_path / "good.safetensors"), tmp_path / "bad.safetensors"
    if how == "another base": tiny.lora(file, xl=True)
    if how == "no lora": save_file({"x": torch.zeros(1)}, file)
    if how == "pickle": torch.save({}, file := tmp_path / "bad.ckpt")
    if how == "cut": file.write_bytes(good.read_bytes()[:500])
    if how == "nan": save_file({k: v * (float("nan") if i == 0 else 1) for i, (k, v) in enumerate(load_file(good).items())}, file)
    source = how if "/" in how else str(file)
    engine = Engine(settings(tiny.save(tmp_path / "model"), {"ink": str(good), "clay": source})).start()
    assert not engine.wait_ready(120)
    health = engine.health().to_json()
    assert health["status"] == "failed" and f"SD_LORAS=clay={source}" in health["reason"] and WRONG[how] in health["reason"] and health["loras"] == ["ink", "clay"]


# from the Hub

def test_from_the_hub(tmp_path):
    """Ids and files by the usual path: fetched once, their progress told. What the Hub does not have is named."""
    hub, worker = modelhub.shared()
    hub.calm()
    hub.repos["artist/ink"] = {"pytorch_lora_weights.safetensors": tiny.lora(tmp_path / "a.safetensors").read_bytes()}
    hub.repos["artist/more"] = {"v1.safetensors": b"x", "v2.safetensors": tiny.lora(tmp_path / "b.safetensors", kohya=True).read_bytes()}
    base, cache = str(tiny.save(tmp_path / "model")), tmp_path / "cache"
    told = worker("load", cache, SD_MODEL_ID=base, SD_LORAS="ink=artist/ink,clay=artist/more/v2.safetensors")
    assert told["row"] == "sd15" and {s["file"] for s in told["seen"]} >= {"artist/more/v2.safetensors"}, told
    assert hub.counts("artist/ink.*safetensors") and not hub.counts("v1.safetensors")
    hub.calm()
    out = worker("serve", cache, SD_MODEL_ID=base, SD_LORAS="ink=artist/ink,clay=artist/more/v2.safetensors", requests=[("/generate", {"prompt": "a fox", "lora": "clay", "steps": 2})])
    assert out["answers"][0]["receipts"][0]["loraSource"] == "artist/more/v2.safetensors" and not hub.counts("resolve")           # from the cache
    assert "SD_LORAS=ink=artist/gone: the Hub has no such model" in worker("load", cache, SD_MODEL_ID=base, SD_LORAS="ink=artist/gone")["reason"]


# through the real server

@pytest.fixture(scope="module")
def served(make_server, tmp_path_factory):
    at = tmp_path_factory.mktemp("served-from-a-long-path-as-people-have-them")      # two sources that differ in their last letters only
    base = tiny.save(at / "model")
    loras = {"ink": str(tiny.lora(at / "ink.safetensors", kohya=True)), "clay": str(texts_too(base, at / "clay", 2))}
    start = lambda loras: make_server(SD_MODEL_ID=base, SD_LORAS=",".join(f"{a}={s}" for a, s in loras.items()))
    return start(loras), loras, start


def test_the_routes(served):
    server, loras, _ = served
    with httpx.Client(base_url=server.url, timeout=120) as web:
        assert web.get("/health").json()["loras"] == ["ink", "clay"] and not any("SD_LORAS" in w for w in web.get("/health").json()["warnings"])
        made = {a: web.post("/generate", json={"prompt": "a fox", "seed": 5, "steps": 3, **({"lora": a} if a else {})}).json() for a in (None, "ink", "clay")}
        assert len({m["images"][0] for m in made.values()}) == 3 and web.post("/generate", json={"prompt": "a fox", "seed": 5, "steps": 3, "lora": None}).json()["receipts"][0]["loraAlias"] is None
        assert [(m["receipts"][0]["loraAlias"], m["receipts"][0]["loraSource"]) for m in made.values()] == [(None, None), *loras.items()]
        ask = {"refinePrompt": "a fox", "images": [PHOTO_TEXT], "config": {"seed": 2, "steps": 3}}
        refined = [web.post("/refine", json={**ask, "config": {**ask["config"], **more}}).json() for more in ({}, {"lora": "clay"})]
        assert refined[0]["images"] != refined[1]["images"] and refined[1]["receipts"][0]["loraAlias"] == "clay"
        for route, body, loc in (("/generate", {"prompt": "x", "lora": "oil"}, "lora"), ("/refine", {**ask, "config": {"lora": "INK"}}, "config.lora")):
            r = web.post(route, json=body)
            assert r.status_code == 422 and r.json()["errors"][0]["loc"] == loc and r.json()["errors"][0]["allowed"] == "ink, clay", r.text
        schemas = web.get("/openapi.json").json()["components"]["schemas"]
        assert all(schemas[name]["properties"]["lora"]["enum"] == ["ink", "clay", None] for name in ("GenerateRequest", "RefineConfig", "ImagesRequest"))
        theirs = web.post("/v1/images/generations", json={"prompt": "a fox", "seed": 5, "num_inference_steps": 3, "lora": "ink"}).json()
        assert theirs["receipts"][0]["loraAlias"] == "ink"
        refused = web.post("/v1/images/generations", json={"prompt": "a fox", "lora": "oil"})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "lora"


def test_a_tag_in_the_prompt(served):
    """AUTOMATIC1111's clients ask by a tag: the picture is that of `lora`, and a weight that cannot be had is told."""
    with httpx.Client(base_url=served[0].url + "/sdapi/v1", timeout=120) as sd:
        assert [x["alias"] for x in sd.get("/loras").json()] == ["ink", "clay"]
        ask = {"seed": 5, "steps": 2, "width": 64, "height": 64}
        said = [sd.post("/txt2img", json={**ask, "prompt": f"a fox{tag}"}).json() for tag in ("", " <lora:ink:1>", " <lora:ink:0.4>", " <lora:oil:1>")]
    infos = [json.loads(x["info"]) for x in said]
    assert [x["receipts"][0].get("loraAlias") for x in infos] == [None, "ink", "ink", None] and all(x["prompt"] == "a fox" for x in infos)
    plain, ink, less, oil = ([Image.open(io.BytesIO(base64.b64decode(x["images"][0]))).tobytes()] for x in said)
    assert plain == oil != ink == less and "Lora: ink" in infos[1]["infotexts"][0]
    assert not infos[1]["warnings"] and "0.4" in " ".join(infos[2]["warnings"]) and "known are ink, clay" in " ".join(infos[3]["warnings"])


def test_replay(served):
    """The same picture from the receipt and from the PNG. Another file under the alias is told. An alias that is gone is an error with those there are."""
    server, loras, start = served
    made = server.post("/generate", {"prompt": "a fox", "seed": 5, "steps": 3, "lora": "clay"})
    for ask in ({"receipt": made["receipts"][0]}, {"image": made["images"][0]}):
        again = server.post("/replay", ask)
        assert pixels(again) == pixels(made) and again["warnings"] == [] and again["receipts"][0]["loraAlias"] == "clay"
    other = start({"clay": loras["ink"]})
    changed = other.post("/replay", {"receipt": made["receipts"][0]})
    assert pixels(changed) != pixels(made)
    assert any(loras["clay"] in w and loras["ink"] in w for w in changed["warnings"]), changed["warnings"]
    gone = httpx.post(start({}).url + "/replay", json={"image": made["images"][0]}, timeout=60)
    assert gone.status_code == 422 and gone.json()["errors"][0] | {"msg": ""} == {"loc": "receipt.loraAlias", "given": "'clay'", "allowed": gone.json()["errors"][0]["allowed"], "msg": ""} and "none are set" in gone.json()["detail"]
    plain = server.post("/generate", {"prompt": "a fox", "seed": 5, "steps": 3})
    old = {k: v for k, v in plain["receipts"][0].items() if not k.startswith("lora") or k == "lora"}               # a receipt from before there were aliases
    assert pixels(server.post("/replay", {"receipt": old})) == pixels(plain)


def pixels(answer): return Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).tobytes()


def test_client_command_and_comparison(served, tmp_path):
    server, loras, _ = served
    with AuraClient(server.url, mode="local") as client:
        assert client.generate("a fox", lora="ink", seed=1, steps=2).receipts[0].lora_source == loras["ink"]
        assert client.refine("a fox", [PHOTO], lora="clay", seed=1, steps=2).receipts[0].lora_alias == "clay"
        with pytest.raises(Invalid, match="allowed: ink, clay"): client.generate("a fox", lora="oil")
        grid = Compare(client, "a fox", x=("lora_alias", [None, "ink", "clay", "oil"]), y=("steps", [2])).wait(120)
        assert len({grid.results[a, 2].image.tobytes() for a in (None, "ink", "clay")}) == 3 and isinstance(grid.results["oil", 2], Invalid)
    aura = lambda *argv: subprocess.run([sys.executable, "-c", "from aura_engine.cli import main; main()", "generate", "a fox", "--local", server.url, "--mode", "local", "--steps", "2", "--json", *argv], cwd=tmp_path, env=clean_env(), capture_output=True, text=True)
    assert json.loads(aura("--lora", "clay").stdout)["receipts"][0]["loraAlias"] == "clay" and "allowed: ink, clay" in aura("--lora", "oil").stdout
