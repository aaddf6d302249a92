"""Python clients of other APIs, each asking a running engine as its own documentation does. Prints {client operation: what came}."""
import json, os, sys
from importlib.metadata import version

import webuiapi
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
said["versions"] = {name: version(name) for name in ("webuiapi", "litellm", "langchain-community", "openai", "openapi-python-client")}
print(json.dumps(said))
