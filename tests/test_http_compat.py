"""The dialects, spoken by their own clients to a real server: the `openai` package and Hugging Face's InferenceClient."""
import base64, io

import httpx
import openai
import pytest
from huggingface_hub import InferenceClient
from PIL import Image


@pytest.fixture(scope="module")
def ai(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as client: yield client


def opened(item): return Image.open(io.BytesIO(base64.b64decode(item.b64_json)))


def file(size=(128, 128), colour="teal"):
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("size", ["256x128", "128x256", "1024x1024", "auto"])
def test_generate_width_comes_first(ai, size):
    r = ai.images.generate(model="gpt-image-1", prompt="a fox", size=size, extra_body={"num_inference_steps": 1})
    want = (128, 128) if size == "auto" else tuple(map(int, size.split("x")))
    assert opened(r.data[0]).size == want and r.size == f"{want[0]}x{want[1]}" and r.created > 0


def test_generate_with_the_extras(ai):
    extra = {"seed": 5, "num_inference_steps": 2, "guidance_scale": 1.0, "unheard_of": {"x": 1}}
    r = ai.images.generate(model="dall-e-3", prompt="a fox", n=2, user="me", quality="hd", output_format="webp", extra_body=extra)
    assert [opened(d).format for d in r.data] == ["WEBP", "WEBP"] and [x["seed"] for x in r.receipts] == [5, 6]
    assert ai.images.generate(prompt="a fox", response_format="url", extra_body=extra).data[0].url.startswith("data:image/png;base64,")


def test_edit(ai):
    one = ai.images.edit(image=("a.png", file()), prompt="a green apple", n=2, extra_body={"strength": 0.7})
    two = ai.images.edit(image=[("a.png", file()), ("b.png", file((200, 100)))], prompt="a green apple", size="100x100")
    assert len(one.data) == len(two.data) == 2 and [opened(d).size for d in two.data] == [(100, 100)] * 2
    with pytest.raises(openai.BadRequestError) as e: ai.images.edit(image=("a.png", file()), mask=("m.png", file()), prompt="x")
    assert e.value.param == "mask"


@pytest.mark.parametrize("partial", [0, 1, 3])
def test_stream(ai, partial):
    events = list(ai.images.generate(prompt="an owl", stream=True, partial_images=partial, size="96x128", extra_body={"num_inference_steps": 6}))
    assert [e.type for e in events] == ["image_generation.partial_image"] * partial + ["image_generation.completed"]
    assert [e.partial_image_index for e in events[:-1]] == list(range(partial)) and {opened(e).size for e in events} == {(96, 128)}
    assert events[-1].usage.total_tokens == 0


def test_stream_of_an_edit(ai):
    events = list(ai.images.edit(image=("a.png", file()), prompt="an owl", stream=True, partial_images=1, extra_body={"num_inference_steps": 4}))
    assert [e.type for e in events] == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.parametrize("wrong, param", [({"size": "4096x64"}, "size"), ({"n": 7}, "n"), ({"prompt": "  "}, "prompt"), ({"output_format": "svg"}, "output_format"),
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
    assert httpx.post(server.url + "/v1/images/edits", json={"prompt": "x"}).status_code == 400


def test_models(ai):
    assert [m.id for m in ai.models.list()] == ["embedded"] and ai.models.retrieve("embedded").object == "model"


def test_a_key(make_server):
    url = make_server(AURA_API_KEY="sesame-7").url + "/v1"
    with pytest.raises(openai.AuthenticationError) as e: openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).images.generate(prompt="x")
    assert e.value.code == "invalid_api_key" and e.value.type == "authentication_error"
    assert openai.OpenAI(base_url=url, api_key="sesame-7").images.generate(prompt="x", extra_body={"num_inference_steps": 1}).data


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
