"""The recipe of the embedded model, start to end, on three drawn shapes: seconds instead of hours, the same code."""
import shutil

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file

from aura_engine import train
from aura_engine.art import make_shapes
from aura_engine.config import load_settings
from aura_engine.loader import load
from aura_engine.nets import TOKENS, decoder_gigaflops, make_vae
from aura_engine.score import draw_prompts

PARTS = {
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text": "text_encoder/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("train")
    make_shapes(out / "art.pt")
    how = ["--out", str(out), "--crowd", "40", "--device", "cpu", "--pack", str(out / "model")]
    with pytest.raises(SystemExit): train.main(["--minutes", "1"])                 # five stages, five lengths
    train.main([*how, "--minutes", ".3", ".1", ".2", ".1", ".05"])
    kept = {k: torch.load(out / f"{k}.pt", weights_only=True) for k in train.STAGE_NAMES}
    longer = str(kept["unet"]["spent"] / 60 + .1)                                  # a step on a slow machine may take more than it was given
    train.main([*how, "--minutes", ".3", ".1", longer, ".1", ".05"])               # the UNet goes on, the others are finished
    return out, {k: state["step"] for k, state in kept.items()}


@pytest.mark.slow
def test_every_stage_goes_on_where_it_stopped(made):
    out, first = made
    again = {k: torch.load(out / f"{k}.pt", weights_only=True) for k in first}
    assert again["unet"]["step"] > first["unet"] and all(again[k]["step"] == first[k] for k in first if k != "unet")
    assert min(first.values()) > 0 and (out / "losses.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_pool_goes_on_where_it_stopped(made, tmp_path):
    art = train.Art(made[0] / "art.pt", "cpu")
    vae = AutoencoderTiny.from_pretrained(made[0] / "model" / "vae").requires_grad_(False)
    scenes = train.every_single(len(art))[:24]
    part = tmp_path / "pool.part"
    whole = train.encode_in_parts(art, vae, scenes, part, at_once=8)
    torch.save(whole[:8], part)                                  # it stopped after the first eight
    encoded = []
    vae.encoder.register_forward_pre_hook(lambda module, given: encoded.append(len(given[0])))
    assert torch.equal(train.encode_in_parts(art, vae, scenes, part, at_once=8), whole)
    assert sum(encoded) == 16 and sorted(f.name for f in tmp_path.iterdir()) == ["pool.part"]


@pytest.mark.slow
def test_a_packed_model_can_be_gone_on_from(made, tmp_path):
    old, new = made[0] / "model", tmp_path / "model"
    shutil.copy(made[0] / "art.pt", tmp_path)
    train.main(["--start", str(old), "--out", str(tmp_path), "--crowd", "40", "--device", "cpu", "--pack", str(new),
                "--minutes", "0", ".05", ".05", "0", "0"])
    def same(file):
        a, b = load_file(old / file), load_file(new / file)
        return all(torch.equal(v, b[k]) for k, v in a.items())
    unchanged = {part: same(file) for part, file in PARTS.items()}
    assert unchanged == {"vae": True, "text": False, "unet": False}                # no minutes, nothing changed
    token_files = [folder / "tokenizer" / "tokenizer.json" for folder in (old, new)]
    assert token_files[0].read_bytes() == token_files[1].read_bytes()


@pytest.mark.slow
def test_what_is_packed_is_loaded_by_the_engine_with_and_without_the_lora(made):
    folder = made[0] / "model"
    assert {"coin", "cone", "two", "blue"} <= set((folder / "words.txt").read_text().split())
    base = load(load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu"))
    fused = load(load_settings(SD_MODEL_ID=str(folder), SD_LCM_LORA_ID=str(folder / "lcm-lora"), SD_DEVICE="cpu"))
    assert fused.row.sampler == "lcm" and base.row.token_limit == TOKENS
    plain, few = (draw_prompts(p, ["a disc on a blue background"]) for p in (base, fused))
    assert plain.shape == (1, 3, 128, 128) and not torch.equal(plain, few)


def test_a_decode_costs_a_third_of_the_third_version():
    assert decoder_gigaflops(make_vae()) <= 1.3
