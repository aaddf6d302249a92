"""The recipe of the embedded model, start to end, on three drawn shapes: seconds instead of hours, the same code."""
import io
import shutil

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from aura_engine import train
from aura_engine.config import load_settings
from aura_engine.loader import load

NAMES = [["disc", "coin"], ["tile"], ["wedge", "cone"]]


def shape(name, light):
    im, file = Image.new("RGBA", (train.SIDE, train.SIDE)), io.BytesIO()
    pen = ImageDraw.Draw(im)
    {"disc": pen.ellipse, "tile": pen.rectangle, "wedge": lambda box, fill: pen.polygon([(8, 88), (88, 88), (48, 8)], fill=fill)}[name]((8, 8, 88, 88), fill=(40, 70, 120, 255))
    if light: pen.ellipse((34, 40, 54, 60), fill=(230, 240, 255, 255))
    im.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("train")
    torch.save({"names": NAMES, "words": ["forest", "river"], "png": [[shape(v[0], False), shape(v[0], True)] for v in NAMES]}, out / "art.pt")
    how = ["--out", str(out), "--crowd", "40", "--device", "cpu", "--pack", str(out / "model")]
    with pytest.raises(SystemExit): train.main(["--minutes", "1"])                 # five stages, five lengths
    train.main([*how, "--minutes", ".3", ".1", ".2", ".1", ".05"])
    first = {k: torch.load(out / f"{k}.pt", weights_only=True)["step"] for k in ("vae", "text", "unet", "lora", "decoder")}
    train.main([*how, "--minutes", ".3", ".1", ".3", ".1", ".05"])                 # the UNet goes on, the others are finished
    return out, first


@pytest.mark.slow
def test_every_stage_goes_on_where_it_stopped(made):
    out, first = made
    again = {k: torch.load(out / f"{k}.pt", weights_only=True) for k in first}
    assert again["unet"]["step"] > first["unet"] and all(again[k]["step"] == first[k] for k in first if k != "unet")
    assert min(first.values()) > 0 and (out / "losses.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_packed_model_can_be_gone_on_from(made, tmp_path):
    old, new = made[0] / "model", tmp_path / "model"
    shutil.copy(made[0] / "art.pt", tmp_path)
    train.main(["--start", str(old), "--out", str(tmp_path), "--crowd", "40", "--device", "cpu", "--pack", str(new), "--minutes", "0", ".05", ".05", "0", "0"])
    same = {part: all(torch.equal(v, load_file(new / f)[k]) for k, v in load_file(old / f).items())
            for part, f in (("vae", "vae/diffusion_pytorch_model.safetensors"), ("text", "text_encoder/model.safetensors"), ("unet", "unet/diffusion_pytorch_model.safetensors"))}
    assert same == {"vae": True, "text": False, "unet": False}                     # no minutes, nothing changed
    assert (new / "tokenizer" / "tokenizer.json").read_bytes() == (old / "tokenizer" / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_what_is_packed_is_loaded_by_the_engine_with_and_without_the_lora(made):
    folder = made[0] / "model"
    assert {"coin", "cone", "two", "blue"} <= set((folder / "words.txt").read_text().split())
    base = load(load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu"))
    fused = load(load_settings(SD_MODEL_ID=str(folder), SD_LCM_LORA_ID=str(folder / "lcm-lora"), SD_DEVICE="cpu"))
    assert fused.row.sampler == "lcm" and base.row.token_limit == train.TOKENS
    plain, few = (train.generate(p, ["a disc on a blue background"], steps=4) for p in (base, fused))
    assert plain.shape == (1, 3, 128, 128) and not torch.equal(plain, few)
