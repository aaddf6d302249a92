"""Python clients of other APIs, each asking a running engine as its own documentation does.

Prints {client: {"version": …, "seen": {operation: "works", or what the client's user reads}}}: only what happened here.
"""
import asyncio, io, json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import litellm, openai, webuiapi
from huggingface_hub import InferenceClient
from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper
from PIL import Image

url, locked, generated = sys.argv[1:4]           # an engine, one that wants the key "sesame-7", the generated client's folder
os.environ["OPENAI_API_KEY"] = "unused"
rows = {}


def said_by(error):
    """What a client's user reads: the engine's sentence, as this client hands it on."""
    if isinstance(error, RuntimeError) and len(error.args) > 1: return json.loads(error.args[1])["detail"]     # webuiapi's
    return str(getattr(error, "message", error)).splitlines()[0][:200]


def tries(client, operation):
    """Decorates a try, which says whether what came is what was asked for. It runs at once; what was seen is a row's entry."""
    def run(attempt):
        try: came = attempt()
        except Exception as error: came = said_by(error)
        seen = rows.setdefault(f"{client} (Python)", {"version": version(client), "seen": {}})["seen"]
        seen[operation] = "works" if came is True else f"not as asked: {came!r}" if not isinstance(came, str) else came
        return attempt
    return run


def png(im):
    held = io.BytesIO()
    im.save(held, "PNG")
    return held.getvalue()


# generated from openapi.json

sys.path.insert(0, generated)
from generated import Client
from generated.api.default import get_health_get, post_generate_post
from generated.models import GenerateRequest, Problem


def health():
    with Client(base_url=url) as client: return get_health_get.sync(client=client)
def ask(call, body):
    with Client(base_url=url, timeout=60) as client: return call.sync(client=client, body=body)


@tries("openapi-python-client", "health")
def _(): return health().ready and health().limits.native == 128
@tries("openapi-python-client", "generate")
def _():
    answer = ask(post_generate_post, GenerateRequest(prompt="a fox", steps=1))
    return len(answer.images) == 1 and answer.receipts[0].prompt == "a fox"
@tries("openapi-python-client", "errors")
def _():
    answer = ask(post_generate_post, GenerateRequest(prompt=" "))
    return isinstance(answer, Problem) and answer.errors[0].loc == "prompt"


# openai

ai = openai.OpenAI(base_url=url + "/v1", max_retries=0)
fox = ("fox.png", png(Image.new("RGB", (96, 64), "teal")))
hole = ("hole.png", png(Image.new("RGBA", (96, 64))))


@tries("openai", "generate")
def _(): return len(ai.images.generate(model="gpt-image-1", prompt="a fox", n=2).data[1].b64_json) > 1000
@tries("openai", "generate, address (dall-e-3)")
def _(): return ai.images.generate(model="dall-e-3", prompt="a fox").data[0].url.startswith(url + "/pictures/")
@tries("openai", "generate, 10 pictures")
def _(): return len(ai.images.generate(prompt="a fox", n=10).data) == 10
@tries("openai", "generate, 11 pictures")
def _(): return ai.images.generate(prompt="a fox", n=11)
@tries("openai", "generate, long prompt")
def _(): return "first 1,997" in ai.images.generate(prompt="an owl " * 900).warnings[0]
@tries("openai", "generate, with await")
def _(): return len(asyncio.run(openai.AsyncOpenAI(base_url=url + "/v1").images.generate(prompt="a fox")).data) == 1
@tries("openai", "edit")
def _(): return len(ai.images.edit(image=fox, prompt="a red fox").data) == 1
@tries("openai", "edit, several pictures")
def _(): return len(ai.images.edit(image=[fox, fox], prompt="a red fox").data) == 2
@tries("openai", "edit with a mask")
def _(): return len(ai.images.edit(image=fox, mask=hole, prompt="a red fox").data) == 1
@tries("openai", "variations")
def _(): return ai.images.create_variation(image=fox)
@tries("openai", "stream")
def _():
    events = list(ai.images.generate(model="gpt-image-1", prompt="a fox", stream=True, partial_images=1))
    return [e.type for e in events] == ["image_generation.partial_image", "image_generation.completed"]
@tries("openai", "stream of an edit")
def _(): return [e.type for e in ai.images.edit(image=fox, prompt="a fox", stream=True)][-1] == "image_edit.completed"
@tries("openai", "cancel")
def _():
    stream = ai.images.generate(prompt="an owl", n=4, stream=True, partial_images=3, extra_body={"num_inference_steps": 50})
    next(iter(stream))
    stream.close()
    end = time.monotonic() + 10
    while (left := health().queue.length) and time.monotonic() < end: time.sleep(0.1)
    return left == 0
@tries("openai", "errors")
def _():
    try: ai.images.generate(prompt="a fox", size="4096x64")
    except openai.BadRequestError as error: return (error.status_code, error.param, error.code) == (400, "size", "invalid_value")
@tries("openai", "models")
def _(): return [m.id for m in ai.models.list()] == ["embedded"] == [ai.models.retrieve("embedded").id]
@tries("openai", "key")
def _(): return len(openai.OpenAI(base_url=locked + "/v1", api_key="sesame-7").images.generate(prompt="a fox").data) == 1
@tries("openai", "no key")
def _(): return openai.OpenAI(base_url=locked + "/v1").images.generate(prompt="a fox")


# huggingface_hub

hf = InferenceClient(base_url=url)


@tries("huggingface_hub", "text_to_image")
def _(): return hf.text_to_image("a fox", width=128, height=96).size == (128, 96)
@tries("huggingface_hub", "image_to_image")
def _(): return hf.image_to_image(fox[1], prompt="a red fox", target_size={"width": 96, "height": 64}).size == (96, 64)
@tries("huggingface_hub", "key")
def _(): return InferenceClient(base_url=locked, api_key="sesame-7").text_to_image("a fox").size == (128, 128)


# litellm, LangChain

LITE = {"model": "openai/gpt-image-1", "api_base": url + "/v1", "api_key": "unused"}


@tries("litellm", "image_generation")
def _(): return len(litellm.image_generation(prompt="a fox", size="1024x1024", **LITE).data[0].b64_json) > 1000
@tries("litellm", "image_edit")
def _(): return len(litellm.image_edit(image=[io.BytesIO(fox[1])], prompt="a red fox", **LITE).data[0].b64_json) > 1000
@tries("langchain-community", "DallEAPIWrapper")
def _(): return DallEAPIWrapper(model="dall-e-3", base_url=url + "/v1").run("a fox").startswith(url + "/pictures/")


# webuiapi

sd = webuiapi.WebUIApi(baseurl=url + "/sdapi/v1", sampler="LCM", steps=2)
drawn = sd.txt2img(prompt="a fox", seed=3, width=96, height=64, batch_size=2)
area = Image.new("L", (96, 64))
area.paste("white", (0, 0, 48, 64))


@tries("webuiapi", "txt2img")
def _(): return [im.size for im in drawn.images] == [(96, 64)] * 2 and drawn.info["all_seeds"] == [3, 4]
@tries("webuiapi", "another sampler")
def _(): return next(w for w in sd.txt2img(prompt="a fox", sampler_name="Euler a").info["warnings"] if w.startswith("sampler_name"))
@tries("webuiapi", "img2img")
def _(): return sd.img2img(images=[drawn.image], prompt="a red fox", width=96, height=64).image.size == (96, 64)
@tries("webuiapi", "mask")
def _():
    made = sd.img2img(images=[drawn.image], mask_image=area, mask_blur=0, prompt="a red fox", width=96, height=64, inpaint_full_res=False).image
    kept = (48, 0, 96, 64)
    return made.convert("RGB").crop(kept).tobytes() == drawn.image.convert("RGB").crop(kept).tobytes()
@tries("webuiapi", "png-info")
def _(): return sd.png_info(drawn.image).info == drawn.info["infotexts"][0]
@tries("webuiapi", "models")
def _(): return sd.util_get_model_names() == ["embedded"]
@tries("webuiapi", "samplers")
def _(): return sd.util_get_sampler_names() == ["LCM"]
@tries("webuiapi", "lists (schedulers, upscalers, LoRAs, styles, hypernetworks)")
def _():
    empty = (sd.get_upscalers(), sd.get_latent_upscale_modes(), sd.get_loras(), sd.get_prompt_styles(), sd.get_hypernetworks(), sd.get_sd_vae())
    return len(sd.get_schedulers()) > 0 and empty == ([],) * 6
@tries("webuiapi", "options")
def _():
    sd.set_options({"sd_model_checkpoint": "embedded", "CLIP_stop_at_last_layers": 2})
    return sd.util_get_current_model() == "embedded"
@tries("webuiapi", "embeddings, scripts, face restorers")
def _(): return sd.get_embeddings()["loaded"] == {} and sd.get_scripts()["txt2img"] == [] and sd.get_face_restorers() == []
@tries("webuiapi", "cmd-flags, memory")
def _(): return sd.get_cmd_flags()["api"] and sd.get_memory()["ram"]["used"] > 0
@tries("webuiapi", "progress and interrupt of a running job")
def _():
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(sd.txt2img, prompt="an owl", steps=50, batch_size=8, seed=1)
        while not 0 < (part := sd.get_progress()["progress"]) < 1: assert not drawing.done()
        sd.interrupt()
        ended = drawing.result(60)
    sd.util_wait_for_ready(check_interval=0.1)
    return 0 < part < 1 and 1 <= len(ended.images) <= 8 and "interrupted after step" in " ".join(ended.info["warnings"])
@tries("webuiapi", "errors")
def _(): return sd.txt2img(prompt="a fox", width=9000)
@tries("webuiapi", "upscale (extra-single-image)")
def _(): return sd.extra_single_image(drawn.image)
@tries("webuiapi", "key (Basic)")
def _():
    guarded = webuiapi.WebUIApi(baseurl=locked + "/sdapi/v1", sampler="LCM", steps=1)
    guarded.set_auth("anybody", "sesame-7")
    return len(guarded.txt2img(prompt="a fox").images) == 1


print(json.dumps(rows))
