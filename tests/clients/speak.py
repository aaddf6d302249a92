"""Python clients of other APIs, each asking a running engine as its own documentation does. Prints {client operation: what came}."""
import io, json, os, sys
from importlib.metadata import version

import openai, webuiapi
from huggingface_hub import InferenceClient
from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper
from litellm import image_generation
from PIL import Image

url, said = sys.argv[1], {}
os.environ |= {"OPENAI_API_KEY": "unused"}

sd = webuiapi.WebUIApi(baseurl=url + "/sdapi/v1", sampler="LCM", steps=2)
fox = sd.txt2img(prompt="a fox", seed=3, width=96, height=64, batch_size=2)
said["webuiapi txt2img"] = [list(im.size) for im in fox.images]
said["webuiapi info"] = fox.info["all_seeds"]
said["webuiapi img2img"] = list(sd.img2img(images=[fox.image], prompt="a red fox", width=96, height=64).image.size)
mask = Image.new("L", (96, 64), "black")
mask.paste("white", (0, 0, 48, 64))
said["webuiapi mask"] = list(sd.img2img(images=[fox.image], mask_image=mask, prompt="a red fox", width=96, height=64, inpaint_full_res=False).image.size)
said["webuiapi png-info"] = sd.png_info(fox.image).info.splitlines()[0]
said["webuiapi models"] = sd.util_get_model_names()
said["webuiapi samplers"] = sd.util_get_sampler_names()
said["webuiapi options"] = sd.util_get_current_model()
said["webuiapi interrupt"] = sd.interrupt()
sd.util_wait_for_ready(check_interval=0.1)
said["webuiapi progress"] = sd.get_progress()["progress"]

made = image_generation(model="openai/gpt-image-1", prompt="a fox", api_base=url + "/v1", api_key="unused", size="1024x1024")
said["litellm image_generation"] = len(made.data[0].b64_json) > 1000
said["LangChain DallEAPIWrapper"] = DallEAPIWrapper(model="dall-e-3", base_url=url + "/v1").run("a fox").startswith(url + "/pictures/")

sys.path.insert(0, sys.argv[2])                               # where the generated client lies
from generated import Client
from generated.api.default import get_health_get, post_generate_post
from generated.models import GenerateRequest

with Client(base_url=url, timeout=60) as client:
    health = get_health_get.sync(client=client)
    answer = post_generate_post.sync(client=client, body=GenerateRequest(prompt="a fox", steps=1))
    said["generated Python client"] = [health.ready, health.limits.native, len(answer.images), answer.receipts[0].prompt]

def told(call):
    """"works", or what the engine said."""
    try: call()
    except RuntimeError as error: return json.loads(error.args[1])["detail"]                  # webuiapi's
    except Exception as error: return str(getattr(error, "message", error)).splitlines()[0][:200]
    return "works"


held = io.BytesIO()
fox.image.save(held, "PNG")
png, hole = held.getvalue(), io.BytesIO()
Image.new("RGBA", fox.image.size, (0, 0, 0, 0)).save(hole, "PNG")
images = openai.OpenAI(base_url=url + "/v1", max_retries=0).images
hf = InferenceClient(base_url=url)
table = {
    "webuiapi": dict.fromkeys(("txt2img", "img2img", "mask", "png-info", "models", "samplers", "options", "progress", "interrupt"), "works"),
    "litellm": {"image_generation": "works"}, "langchain-community": {"DallEAPIWrapper": "works"},
    "openapi-python-client": {"health": "works", "generate": "works"},
    "openai": {
        "generate": told(lambda: images.generate(model="gpt-image-1", prompt="a fox").data[0].b64_json[0]),
        "generate, address (dall-e-3)": told(lambda: images.generate(model="dall-e-3", prompt="a fox").data[0].url[0]),
        "edit": told(lambda: images.edit(image=("a.png", png), prompt="a red fox").data[0]),
        "edit with a mask": told(lambda: images.edit(image=("a.png", png), mask=("m.png", hole.getvalue()), prompt="a red fox").data[0]),
        "stream": told(lambda: [event.type for event in images.generate(model="gpt-image-1", prompt="a fox", stream=True)][0]),
        "11 pictures": told(lambda: images.generate(prompt="a fox", n=11)),
        "variations": told(lambda: images.create_variation(image=("a.png", png)))},
    "huggingface_hub": {
        "text_to_image": told(lambda: hf.text_to_image("a fox").size),
        "image_to_image": told(lambda: hf.image_to_image(png, prompt="a red fox").size)},
}
table["webuiapi"]["upscale (extra-single-image)"] = told(lambda: sd.extra_single_image(fox.image))
said["table"] = table
said["versions"] = {name: version(name) for name in ("webuiapi", "litellm", "langchain-community", "openai", "openapi-python-client")}
print(json.dumps(said))
