"""The dialects, spoken by their own clients to a real server: the `openai` package and Hugging Face's InferenceClient."""
import base64, io, json, time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from aura_engine.a1111 import ABSENT, MEANINGFUL, Txt2Img, unmet
from aura_engine.dialects import shortened


@pytest.fixture(scope="module")
def ai(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as client: yield client


def opened(item): return Image.open(io.BytesIO(base64.b64decode(item.b64_json)))


def file(size=(128, 128), colour="teal"):
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def hole(size):
    """A picture whose left half is transparent, as OpenAI marks what is to be drawn."""
    im, out = Image.new("RGBA", size, "teal"), io.BytesIO()
    im.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    im.save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("names, param", [(["image"], "image"), (["image[]"], "image[]"), (["image[]", "image[]"], "image[1]"), (["image[]"] * 5, "image")])
def test_an_edits_pictures_are_called_as_the_client_calls_them(server, names, param):
    parts = [(name, ("a.png", file() if i < len(names) - 1 else b"no picture")) for i, name in enumerate(names)]
    r = httpx.post(server.url + "/v1/images/edits", data={"prompt": "x"}, files=parts)
    assert (r.status_code, r.json()["error"]["param"]) == (400, param), r.text


@pytest.mark.parametrize("size", ["256x128", "128x256", "1024x1024", "auto"])
def test_generate_width_comes_first(ai, size):
    r = ai.images.generate(model="gpt-image-1", prompt="a fox", size=size, extra_body={"num_inference_steps": 1})
    want = (128, 128) if size == "auto" else tuple(map(int, size.split("x")))
    assert opened(r.data[0]).size == want and r.size == f"{want[0]}x{want[1]}" and r.created > 0


def test_generate_with_the_extras(ai):
    extra = {"seed": 5, "num_inference_steps": 2, "guidance_scale": 1.0, "unheard_of": {"x": 1}}
    r = ai.images.generate(model="gpt-image-1", prompt="a fox", n=2, user="me", quality="hd", output_format="webp", extra_body=extra)
    assert [opened(d).format for d in r.data] == ["WEBP", "WEBP"] and [x["seed"] for x in r.receipts] == [5, 6]


def test_edit(ai):
    one = ai.images.edit(image=("a.png", file()), prompt="a green apple", n=2, extra_body={"strength": 0.7})
    two = ai.images.edit(image=[("a.png", file()), ("b.png", file((200, 100)))], prompt="a green apple", size="100x100")
    assert len(one.data) == len(two.data) == 2 and [opened(d).size for d in two.data] == [(100, 100)] * 2
    assert "not composed" in two.warnings[0]
    masked = ai.images.edit(image=("a.png", file((200, 100))), mask=("m.png", hole((200, 100))), prompt="a green apple", extra_body={"seed": 1, "num_inference_steps": 2})
    made = np.asarray(opened(masked.data[0]).convert("RGB"), int)
    assert made.shape == (100, 200, 3) and masked.size == "200x100" and masked.receipts[0]["maskSha256"]
    assert (made[:, 110:] == (0, 128, 128)).all() and (made[:, :90] != (0, 128, 128)).any()
    with pytest.raises(openai.BadRequestError) as e: ai.images.edit(image=("a.png", file()), mask=("m.png", file()), prompt="x")
    assert e.value.param == "mask" and "transparency" in e.value.message


def test_an_edit_in_json(server):
    picture = "data:image/png;base64," + base64.b64encode(file()).decode()
    for more in ({"image": picture}, {"image": [picture]}, {"images": [{"image_url": picture}]}):
        r = httpx.post(server.url + "/v1/images/edits", json={"prompt": "a fox", "num_inference_steps": 1, **more}, timeout=60)
        assert r.status_code == 200 and len(r.json()["data"]) == 1, r.text
    for more, param in (({}, "image"), ({"images": [{"file_id": "file-1"}]}, "images[0].file_id"), ({"image": "http://example.com/a.png"}, "image"), ({"images": [{"image_url": picture}, {"image_url": "http://example.com/a.png"}]}, "images[1].image_url"), ({"images": ["http://example.com/a.png"]}, "images[0]"), ({"image": [picture] * 5}, "image"), ({"image": picture, "strength": 7}, "strength")):
        r = httpx.post(server.url + "/v1/images/edits", json={"prompt": "a fox", **more})
        assert (r.status_code, r.json()["error"]["param"]) == (400, param), r.text


def test_addresses(ai, server):
    """The old models answer with an address by default. Anybody who has it may fetch the picture, nobody can guess it."""
    items = ai.images.generate(model="dall-e-3", prompt="a fox", n=2, size="96x64", extra_body={"num_inference_steps": 1}).data
    assert len({i.url for i in items}) == 2 and all(i.b64_json is None and i.url.startswith(server.url + "/pictures/") for i in items)
    r = httpx.get(items[0].url)
    assert r.headers["content-type"] == "image/png" and Image.open(io.BytesIO(r.content)).size == (96, 64) and httpx.head(items[0].url).status_code == 200
    assert httpx.get(items[0].url[:-8] + "xxxx.png").status_code == 404 and httpx.get(server.url + "/pictures/..%2fapp.py").status_code == 404
    assert opened(ai.images.generate(model="dall-e-2", prompt="a fox", response_format="b64_json", extra_body={"num_inference_steps": 1}).data[0])


def test_what_has_no_effect_is_said(ai):
    r = ai.images.generate(model="dall-e-3", prompt="an owl " * 900, quality="best", style="vivid", size="512x512", n=10, response_format="b64_json",
                           extra_body={"background": "transparent", "output_compression": 50, "num_inference_steps": 1})
    said = " ".join(r.warnings)
    assert len(r.data) == 10 and all(word in said for word in ("first 1,997", "style", "background", "output_compression", "enlarged to 512x512"))
    small, large = (len(base64.b64decode(ai.images.generate(prompt="an owl", output_format="jpeg", output_compression=q, size="256x256",
                                                            extra_body={"seed": 1, "num_inference_steps": 1}).data[0].b64_json)) for q in (10, 95))
    assert small * 3 < large
    assert [r.receipts[0]["steps"] for r in (ai.images.generate(prompt="an owl", quality=q) for q in ("low", "high"))] == [2, 6]


def test_no_variations(ai):
    with pytest.raises(openai.BadRequestError) as e: ai.images.create_variation(image=file())
    assert e.value.param == "model" and "images.edit" in e.value.message


@pytest.mark.parametrize("partial", [0, 1, 3])
def test_stream(ai, partial):
    events = list(ai.images.generate(prompt="an owl", stream=True, partial_images=partial, size="96x128", extra_body={"num_inference_steps": 6}))
    assert [e.type for e in events] == ["image_generation.partial_image"] * partial + ["image_generation.completed"]
    assert [e.partial_image_index for e in events[:-1]] == list(range(partial)) and {opened(e).size for e in events} == {(96, 128)}
    assert events[-1].usage.total_tokens == 0


def test_stream_of_an_edit(ai):
    events = list(ai.images.edit(image=("a.png", file()), prompt="an owl", stream=True, partial_images=1, extra_body={"num_inference_steps": 4}))
    assert [e.type for e in events] == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.parametrize("wrong, param", [({"size": "4096x64"}, "size"), ({"n": 11}, "n"), ({"n": 5, "size": "2048x2048"}, "n"), ({"extra_body": {"guidance_scale": 99}}, "guidance_scale"), ({"prompt": "  "}, "prompt"), ({"output_format": "svg"}, "output_format"),
                                          ({"extra_body": {"num_inference_steps": 0}}, "num_inference_steps")])
def test_errors_are_in_their_shape(ai, wrong, param):
    """As OpenAI's own: 400, never 422."""
    with pytest.raises(openai.BadRequestError) as e: ai.images.generate(**{"prompt": "x", **wrong})
    assert e.value.status_code == 400 and e.value.param == param and e.value.code == "invalid_value" and e.value.type == "invalid_request_error" and "allowed" in e.value.message


def test_errors_that_no_handler_sees(server):
    r = httpx.post(server.url + "/v1/images/generations", content=b"{", headers={"content-type": "application/json"})
    assert r.status_code == 400 and r.json()["error"]["code"] == "malformed" and r.headers["content-type"] == "application/json"
    assert httpx.get(server.url + "/v1/nothing").json()["error"]["code"] == "not_found"
    assert httpx.post(server.url + "/v1/images/edits", content=b"--x\r\nbroken", headers={"content-type": "multipart/form-data; boundary=x"}).status_code == 400


@pytest.mark.parametrize("path, said", [("/v1/chat/completions", "/v1/images/generations"), ("/v1", "/v1/images/generations"), ("/v1/audio/speech", "/v1/models"),
                                        ("/images/generations", "ends in /v1"), ("/models", "/v1/models")])
def test_what_is_not_there_says_what_is(server, path, said):
    for r in (httpx.post(server.url + path, json={}), httpx.get(server.url + path)): assert r.status_code == 404 and said in r.text


def test_unknown_fields_are_named_and_numbers_are_numbers(ai, server):
    """A slip of the pen is not ignored silently, whether it comes as JSON or in a form."""
    r = ai.images.generate(prompt="a fox", user="me", moderation="low", extra_body={"num_inference_steps": 1, "cfg": 7})
    assert r.warnings == ["cfg 7 has no effect: it is not known here."]
    form = httpx.post(server.url + "/v1/images/edits", data={"prompt": "x", "num_inference_steps": "1", "n": "2", "input_fidelity": "high"}, files={"image": file()}, timeout=60).json()
    assert len(form["data"]) == 2 and form["warnings"] == ["input_fidelity 'high' has no effect: it is not known here."]
    for wrong, words in (({"n": "2"}, "a whole number"), ({"n": True}, "a whole number"), ({"stream": "yes"}, "true or false")):
        r = httpx.post(server.url + "/v1/images/generations", json={"prompt": "x", **wrong})
        assert r.status_code == 400 and words in r.json()["error"]["message"], r.text


def test_models(ai):
    assert [m.id for m in ai.models.list()] == ["embedded"] and ai.models.retrieve("embedded").object == "model"
    assert httpx.get(f"{ai.base_url}models/").json()["object"] == "list"
    assert httpx.post(f"{ai.base_url}images/generations/", json={"prompt": " "}).status_code == 400       # not 404


def test_a_key(make_server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)      # offline, it would not even call this machine
    url = make_server(AURA_API_KEY="sesame-7").url + "/v1"
    with pytest.raises(openai.AuthenticationError) as e: openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).images.generate(prompt="x")
    assert e.value.code == "invalid_api_key" and e.value.type == "authentication_error"
    assert openai.OpenAI(base_url=url, api_key="sesame-7").images.generate(prompt="x", extra_body={"num_inference_steps": 1}).data
    sd = url.replace("/v1", "/sdapi/v1")
    assert [httpx.get(sd + "/options", auth=auth).status_code for auth in (None, ("me", "wrong"), ("me", "sesame-7"))] == [401, 401, 200]
    said = httpx.get(sd + "/options").json()
    assert said["error"] == "An API key is needed" and "Bearer" in said["detail"] and "Basic" in said["detail"]
    with pytest.raises(HfHubHTTPError, match="needs its API key"): InferenceClient(base_url=url.removesuffix("/v1"), api_key="wrong").text_to_image("x")


def test_inference_client(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)      # offline, it would not even call this machine
    client = InferenceClient(base_url=server.url)
    assert client.text_to_image("a fox", width=128, height=96, num_inference_steps=2, seed=3).size == (128, 96)
    again = [client.text_to_image("a fox", num_inference_steps=2, seed=3).tobytes() for _ in range(2)]
    assert again[0] == again[1]


def test_inference_protocol(server):
    for accept, format in (("image/webp", "WEBP"), ("image/*", "PNG"), ("*/*", "PNG")):
        r = httpx.post(server.url + "/", json={"inputs": "a fox", "parameters": {"num_inference_steps": 1, "scheduler": "any"}}, headers={"Accept": accept}, timeout=60)
        assert Image.open(io.BytesIO(r.content)).format == format
    assert httpx.post(server.url + "/", json={"inputs": ""}).status_code == 422
    assert "scheduler" in httpx.post(server.url + "/", json={"inputs": "a fox", "parameters": {"num_inference_steps": 1, "scheduler": "any"}}, timeout=60).headers["x-aura-warnings"]


def test_image_to_image(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    client = InferenceClient(base_url=server.url)
    made = client.image_to_image(file(), prompt="a green apple", num_inference_steps=2, target_size={"width": 96, "height": 64})
    assert made.size == (96, 64)
    ours = httpx.post(server.url + "/", json={"inputs": "a fox", "parameters": {"num_inference_steps": 1}}, timeout=60).content
    assert client.image_to_image(ours).size == (128, 128)                       # bare bytes: a picture of ours knows its prompt
    bare = {"content": file(), "headers": {"content-type": "image/png"}, "timeout": 60}
    assert httpx.post(server.url + "/?prompt=a+fox", **bare).headers["content-type"] == "image/png"
    assert httpx.post(server.url + "/", **bare).json()["errors"][0]["loc"] == "prompt"
    text = base64.b64encode(file()).decode()
    for body, loc in (({"inputs": text}, "parameters.prompt"), ({"inputs": "a fox", "parameters": {"prompt": "x"}}, "inputs"),
                      ({"inputs": text, "parameters": {"prompt": "x", "strength": 5}}, "parameters.strength")):
        r = httpx.post(server.url + "/", json=body)
        assert r.status_code == 422 and r.json()["errors"][0]["loc"] == loc, r.text


# AUTOMATIC1111

@pytest.fixture(scope="module")
def sd(server):
    with httpx.Client(base_url=server.url + "/sdapi/v1", timeout=60) as client: yield client


def first(r):
    """The first picture and `info` of an answer."""
    return Image.open(io.BytesIO(base64.b64decode(r.json()["images"][0]))), json.loads(r.json()["info"])


# As these programs send it, in November 2026.
LIBRECHAT = {"prompt": "a fox, detailed", "negative_prompt": "blurry", "cfg_scale": 4.5, "steps": 22, "width": 1024, "height": 1024}
OPEN_WEBUI = {"prompt": "a fox", "batch_size": 2, "width": 512, "height": 512, "steps": 4, "negative_prompt": "", "sampler_name": "DPM++ 2M Karras", "scheduler": "Karras"}
SILLYTAVERN = {"prompt": "a fox", "negative_prompt": "", "sampler_name": "Euler a", "scheduler": "Automatic", "steps": 20, "cfg_scale": 7, "width": 512, "height": 512,
               "restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 2, "denoising_strength": 0.7, "hr_second_pass_steps": 0, "seed": -1, "clip_skip": 1,
               "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"}, "override_settings_restore_afterwards": True, "save_images": True, "send_images": True,
               "do_not_save_grid": False, "do_not_save_samples": False, "url": "http://localhost:7860", "auth": ""}


@pytest.mark.parametrize("body", [LIBRECHAT, OPEN_WEBUI, SILLYTAVERN], ids=["LibreChat", "Open WebUI", "SillyTavern"])
def test_txt2img_as_programs_ask(sd, body):
    r = sd.post("/txt2img", json=body)
    assert r.status_code == 200, r.text
    picture, info = first(r)
    assert picture.size == (body["width"], body["height"]) and len(r.json()["images"]) == body.get("batch_size", 1) == len(info["all_seeds"]) == len(info["infotexts"])
    assert picture.info["parameters"] == info["infotexts"][0] and "aura" in picture.info and f"Size: {body['width']}x{body['height']}" in info["infotexts"][0]
    said = " ".join(info["warnings"])
    assert "enlarged" in said and ("sampler_name" in said) == ("sampler_name" in body)


def test_what_sd_programs_look_for(sd, server):
    options = sd.get("/options").json()
    assert options["sd_model_checkpoint"] == "embedded" == sd.get("/sd-models").json()[0]["title"] and sd.get("/samplers").json()[0]["name"] == "LCM"
    for name in ("upscalers", "latent-upscale-modes", "prompt-styles", "hypernetworks", "loras", "sd-vae", "sd-modules"): assert sd.get("/" + name).json() == []
    assert sd.get("/schedulers").json()[0]["name"] == "automatic" and sd.get("/memory").json()["ram"]["used"] > 0 and sd.get("/cmd-flags").json()["api"]
    assert sd.post("/options", json={**options, "sd_model_checkpoint": "other"}).status_code == 200 and sd.get("/progress").json()["state"]["job_count"] == 0
    assert [httpx.get(server.url + path).status_code for path in ("/internal/ping", "/queue/status")] == [200, 200]
    assert sd.post("/interrupt").status_code == 200 and sd.post("/refresh-checkpoints").status_code == 200


def test_img2img_and_png_info(sd):
    r = sd.post("/img2img", json={"init_images": ["data:image/png;base64," + base64.b64encode(file()).decode()], "prompt": "a fox <lora:ink:0.5>", "width": 96, "height": 64, "seed": 3, "steps": 4})
    picture, info = first(r)
    assert picture.size == (96, 64) and info["seed"] == 3 and "ink" in " ".join(info["warnings"]) and "<lora" not in info["prompt"]
    teal, black = (base64.b64encode(file((200, 100), c)).decode() for c in ("teal", "black"))
    inverted = {"init_images": [teal], "mask": black, "inpainting_mask_invert": 1, "prompt": "a fox", "steps": 2, "inpaint_full_res": False, "width": 200, "height": 100}
    assert sd.post("/img2img", json={**inverted, "inpainting_mask_invert": 0}).json()["fields"] == ["mask"]     # nothing is white
    assert first(sd.post("/img2img", json=inverted))[0].size == (200, 100)
    held = sd.post("/png-info", json={"image": r.json()["images"][0]}).json()
    assert held["info"] == info["infotexts"][0] and held["parameters"]["Denoising strength"] == "0.75" and json.loads(held["items"]["aura"])["seed"] == 3
    assert sd.post("/png-info", json={"image": base64.b64encode(file()).decode()}).json() == {"info": "", "items": {}, "parameters": {}}


@pytest.mark.parametrize("body, field", [({"prompt": ""}, "prompt"), ({"prompt": "x", "width": 9000}, "width"), ({"prompt": "x", "batch_size": 5, "n_iter": 3}, "batch_size"),
                                         ({"prompt": "x", "cfg_scale": "many"}, "cfg_scale"), ({"prompt": "x", "steps": True}, "steps"), ({"prompt": "x", "cfg_scale": True}, "cfg_scale")])
def test_sd_errors_name_the_field(sd, body, field):
    r = sd.post("/txt2img", json=body)
    assert r.status_code == 422 and r.json()["fields"] == [field] and field in r.json()["detail"]


def test_progress_and_interrupt_are_the_callers_own(sd, server):
    """A task is that of a client's address: another one neither sees nor ends it."""
    other = httpx.Client(base_url=server.url + "/sdapi/v1", transport=httpx.HTTPTransport(local_address="127.0.0.2"))
    with other, ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(sd.post, "/txt2img", json={"prompt": "an owl", "steps": 50, "batch_size": 10, "force_task_id": "mine"})
        while not (said := sd.get("/progress").json())["current_image"] and not drawing.done(): time.sleep(0.02)
        assert 0 < said["progress"] < 1 and said["state"]["job"] == "mine" and said["state"]["job_count"] == 10 and said["eta_relative"] > 0
        assert sd.get("/progress", params={"id_task": "none"}).json()["progress"] == 0 == other.get("/progress").json()["progress"]
        assert httpx.post(server.url + "/internal/progress", json={"id_task": "mine"}).json()["active"]
        other.post("/interrupt")
        assert not drawing.done() and sd.get("/progress", params={"id_task": "mine", "skip_current_image": "true"}).json()["current_image"] is None
        sd.post("/interrupt")
        ended = drawing.result(30).json()
    info = json.loads(ended["info"])
    assert 1 <= len(ended["images"]) <= 10 and len(info["all_seeds"]) == len(ended["images"])
    assert any("interrupted after step" in said for said in info["warnings"]) and "interrupted" in " ".join(info["receipts"][-1]["corrections"])


def test_the_operators_limits(make_server):
    """AURA_MAX_PICTURES refuses, AURA_MAX_PROMPT cuts, at the doors of other APIs."""
    server = make_server(AURA_MAX_PICTURES=2, AURA_MAX_PROMPT=100)
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="at most 2 pictures"): client.images.generate(prompt="a fox", n=3)
        made = client.images.generate(prompt="a fox " * 40, n=2, extra_body={"num_inference_steps": 1})
    assert len(made.data) == 2 and len(made.receipts[0]["prompt"]) == 97 and "first 97 were used" in made.warnings[0]
    r = httpx.post(server.url + "/sdapi/v1/txt2img", json={"prompt": "a fox", "n_iter": 3})
    assert r.status_code == 422 and "at most 2" in r.json()["detail"]


@pytest.mark.parametrize("name", MEANINGFUL)
def test_true_is_no_harmless_number(name):
    """True equals 1 and 1.0: what is asked for in this way is said to be missing all the same, and what is off is not."""
    ask = lambda value: unmet(Txt2Img.model_validate({"prompt": "x", name: value}))
    assert [note.field for note in ask(True)] == [name] and not ask(False) and not ask(None)


@pytest.mark.parametrize("off", [{"enable_hr": False}, {"restore_faces": 0.0}, {"styles": []}, {"alwayson_scripts": {}}, {"script_name": "None"}, {"clip_skip": 1}, {"eta": 0}, {"eta": 1.0}, {"subseed_strength": 0.0}])
def test_what_is_off_is_not_spoken_of(off): assert not unmet(Txt2Img.model_validate({"prompt": "x", **off}))


@pytest.mark.parametrize("path, way", [("skip", "interrupt"), ("interrogate", "png-info"), ("extra-single-image", "img2img"), ("extra-batch-images", "img2img")])
def test_sd_routes_that_are_not_there_say_what_would_do(sd, path, way):
    r = sd.post("/" + path, json={})
    assert r.status_code == 404 and f"/sdapi/v1/{path}" in ABSENT and way in r.json()["detail"]
    net = httpx.get(str(sd.base_url).replace("/sdapi/v1/", "/controlnet/version"))
    assert net.status_code == 404 and "img2img" in net.json()["detail"] and net.json()["errors"]


def test_a_prompt_is_cut_at_the_end_of_a_word():
    notes = []
    assert shortened("an owl " * 9, notes, most=12) == "an owl an" and shortened("an owl flies", notes, most=6) == "an owl" and shortened("owl" * 99, notes, most=100) == ("owl" * 99)[:100]
    assert "first 9 were used" in str(notes[0].text) and notes[0].used == "9 characters"


def test_a_missing_or_unknown_route_of_a_job_is_named(server):
    for body, said in (({"route": "generat", "request": {}}, "given 'generat', allowed: 'generate', 'refine', 'replay'."), ({"request": {}}, "given nothing, allowed: a value (this field is required).")):
        r = httpx.post(server.url + "/jobs", json=body)
        assert r.status_code == 422 and r.json()["detail"] == f"route: {said}"
