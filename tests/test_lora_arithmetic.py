"""LoRAs against plain matrix products: W + alpha / rank · up · down of each layer, whatever the file's spelling, fused and by alias.

Nothing here asks diffusers or peft what a LoRA means: expectations are computed from the tensors in the file.
"""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from aura_engine.config import load_settings
from aura_engine.loader import load
from aura_engine.types import ModelError

CASES = Path(__file__).parent / "cases" / "loras"


@pytest.fixture(scope="module")
def base(tmp_path_factory): return tiny.save(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def plain(base): return loaded(base)


# SD_SAMPLER says that an unknown LoRA is meant as a method
def loaded(base, **how): return load(load_settings(**{"SD_MODEL_ID": str(base), "SD_DEVICE": "cpu"} | how))
def fused(base, file): return loaded(base, SD_LCM_LORA_ID=str(file), SD_SAMPLER="lcm")


def weights(parts):
    """{kohya's name of a layer: weights} of UNet and text encoder, from the modules' own names."""
    out = {}
    for prefix, model in (("lora_unet_", parts.unet), ("lora_te_", parts.text_encoders[0])):
        for name, p in model.named_parameters():
            if not name.endswith(".weight") or ".lora_" in name: continue
            name = name.removesuffix(".weight").removesuffix(".base_layer")
            if prefix == "lora_te_": name = "text_model." + name.removeprefix("text_model.")
            out[prefix + name.replace(".", "_")] = p.detach()
    return out


def expected(state, before):
    """The changed layers by the formula: alpha / rank · up · down, and for a DoRA rows of the given length."""
    out = {}
    for stem in {k.split(".")[0] for k in state}:
        if stem not in before: continue
        down, up, w = state[f"{stem}.lora_down.weight"], state[f"{stem}.lora_up.weight"], before[stem]
        rank = down.shape[0]
        alpha = state.get(f"{stem}.alpha", torch.tensor(float(rank))).item()
        new = w + alpha / rank * (up.reshape(len(w), rank) @ down.reshape(rank, -1)).reshape(w.shape)
        if f"{stem}.dora_scale" in state: new = new / new.reshape(len(w), -1).norm(dim=1).reshape(-1, *[1] * (w.ndim - 1)) * state[f"{stem}.dora_scale"].reshape(-1, *[1] * (w.ndim - 1))
        out[stem] = new
    return out


FILES = ["alpha_mixed", "resized_dynamic", "dora", "te_qv_only", "unknown_modules"]


@pytest.mark.parametrize("name", FILES)
def test_fused_weights_are_the_formula(base, plain, name):
    """Row 7 and 8: alpha of each layer, rank of each layer, DoRA, text encoders, convolutions."""
    file = CASES / f"sd15-{name}.safetensors"
    before, parts = weights(plain), fused(base, file)
    want, after = expected(load_file(file), before), weights(parts)
    assert want and all((after[k] - v).abs().max() < 1e-5 for k, v in want.items())
    assert all(torch.equal(after[k], v) for k, v in before.items() if k not in want)
    assert max((after[k] - before[k]).abs().max() for k in want) > 0.01
    assert not parts.loras.sources and not any("lora" in n for n, _ in parts.unet.named_modules())


@torch.inference_mode()
def answers(parts):
    config = parts.unet.config
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, config.in_channels, 16, 16, generator=g), torch.randn(2, 7, config.cross_attention_dim, generator=g)
    ids = torch.tensor([[parts.tokenizers[0].bos_token_id, 5, 6, 7, parts.tokenizers[0].eos_token_id]])
    return parts.unet(x, torch.tensor([500.0]), text).sample, parts.text_encoders[0](ids).last_hidden_state


@pytest.mark.parametrize("name", FILES)
def test_by_alias_a_model_answers_as_with_those_weights(base, plain, name):
    file = CASES / f"sd15-{name}.safetensors"
    styled, other = loaded(base, SD_LORAS=f"ink={file},more={tiny.lora(base.parent / 'more.safetensors')}"), loaded(base)
    mine = weights(other)
    for k, v in expected(load_file(file), weights(plain)).items(): mine[k].data.copy_(v)
    for part in ("unet", "text"): styled.loras.use("ink", part)
    for got, want in zip(answers(styled), answers(other), strict=True):
        assert (got - want).abs().max() < 2e-4 * want.abs().max().clamp(min=1)
    assert max((a - b).abs().max() for a, b in zip(answers(styled), answers(plain), strict=True)) > 0.01
    for part in ("unet", "text"): styled.loras.use(None, part)
    assert all(torch.equal(a, b) for a, b in zip(answers(styled), answers(plain), strict=True))


def test_what_does_not_fit_is_counted(base):
    """Row 8: 'k of n layers fit'. Below half of them the file is refused."""
    file = CASES / "sd15-unknown_modules.safetensors"
    assert any("16 of 19 layers fit" in n for n in fused(base, file).notes)
    assert any("SD_LORAS=ink=" in n and "16 of 19 layers fit" in n for n in loaded(base, SD_LORAS=f"ink={file}").notes)
    state = load_file(file)
    strangers = {k for k in state if "down_blocks_7" in k}
    few = {k: v for k, v in state.items() if k in strangers or "mid_block_attentions_0_transformer_blocks_0_attn1_to_q" in k}
    save_file(few, little := base.parent / "little.safetensors")
    with pytest.raises(ModelError, match="only 1 of its 4 layers are in this model"): loaded(base, SD_LORAS=f"ink={little}")


@pytest.mark.parametrize("kind, words", [("lokr", "it is a LoKr"), ("loha", "it is a LoHa"), ("diff", "whole differences")])
def test_other_ways_to_change_a_model_are_refused_by_name(base, kind, words):
    file = CASES / "sd15-lokr.safetensors"
    if kind != "lokr": save_file({f"lora_unet_conv_in.{'hada_w1_a' if kind == 'loha' else 'diff'}": torch.ones(2, 2)}, file := base.parent / f"{kind}.safetensors")
    for how in ({"SD_LORAS": f"ink={file}"}, {"SD_LCM_LORA_ID": str(file), "SD_SAMPLER": "lcm"}):
        with pytest.raises(ModelError, match=words): loaded(base, **how)


def respelled(state, spelling):
    """The tensors of a kohya file in another trainer's names."""
    modules = {n.replace(".", "_"): n for n, _ in tiny.unet().named_modules()}
    out = {}
    for k, v in state.items():
        stem, _, end = k.partition(".")
        path = modules[stem.removeprefix("lora_unet_")]
        if spelling == "peft": out[f"unet.{path}." + {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "alpha": "alpha"}[end]] = v
        if spelling == "raw": out[f"base_model.model.{path}." + {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "alpha": "alpha"}[end]] = v
        if spelling == "old":
            attention, _, layer = path.rpartition(".attn")
            out[f"unet.{attention}.attn{layer[0]}.processor.{layer[2:].removesuffix('.0')}_lora." + {"lora_down.weight": "down.weight", "lora_up.weight": "up.weight", "alpha": "alpha"}[end]] = v
    return out


@pytest.mark.parametrize("spelling", ["peft", "raw", "old"])
def test_every_spelling_is_the_same_lora(base, spelling):
    save_file(respelled(load_file(CASES / "sd15-alpha_mixed.safetensors"), spelling), file := base.parent / f"{spelling}.safetensors")
    one, two = weights(fused(base, file)), weights(fused(base, CASES / "sd15-alpha_mixed.safetensors"))
    assert all((one[k] - v).abs().max() < 1e-6 for k, v in two.items())


def test_the_trainers_settings_in_the_header_count(base, plain):
    """peft writes alpha and rank-stabilised scaling into the header, and no tensor says so."""
    state = {k: v for k, v in load_file(CASES / "sd15-alpha_mixed.safetensors").items() if not k.endswith("alpha")}
    file = base.parent / "settings.safetensors"
    save_file(respelled(state, "peft"), file, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 6, "unet.r": 4, "unet.use_rslora": True})})
    before, after = weights(plain), weights(fused(base, file))
    want = expected(state | {k.replace("lora_down.weight", "alpha"): torch.tensor(6 * 4 / 2.0) for k in state if k.endswith("lora_down.weight")}, before)      # 6 / sqrt(4) is 12 / 4
    assert all((after[k] - v).abs().max() < 1e-5 for k, v in want.items())


def test_an_alpha_for_some_layers_counts(base, plain):
    """peft's alpha_pattern, in the header as diffusers writes it, or in the file that peft writes beside its own."""
    state = {k: v for k, v in load_file(CASES / "sd15-alpha_mixed.safetensors").items() if not k.endswith("alpha")}
    before, modules = weights(plain), {n.replace(".", "_"): n for n, _ in tiny.unet().named_modules()}
    stems = sorted({k.split(".")[0] for k in state})
    odd = stems[0]
    pattern = {modules[odd.removeprefix("lora_unet_")]: 9}
    want = expected(state | {f"{stem}.alpha": torch.tensor(9.0 if stem == odd else 6.0) for stem in stems}, before)
    save_file(respelled(state, "peft"), header := base.parent / "pattern.safetensors", {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 6, "unet.alpha_pattern": pattern})})
    (folder := base.parent / "peft").mkdir()
    save_file(respelled(state, "raw"), folder / "adapter_model.safetensors")
    assert any("its strength is taken as 1: it is peft's own file" in n for n in fused(base, folder).notes)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 6, "alpha_pattern": pattern}))
    for source in (header, folder):
        parts = fused(base, source)
        after = weights(parts)
        assert all((after[k] - v).abs().max() < 1e-5 for k, v in want.items()) and not any("strength" in n for n in parts.notes)
    assert (want[odd] - expected(state | {f"{stem}.alpha": torch.tensor(6.0) for stem in stems}, before)[odd]).abs().max() > 0.01


def test_a_lora_of_the_second_text_encoder_alone(tmp_path):
    """By alias, against the text encoder with the weights of the formula."""
    base, name, g = tiny.save(tmp_path / "model", "sdxl"), "encoder.layers.0.self_attn.q_proj", torch.Generator().manual_seed(0)
    down, up = torch.randn(3, 32, generator=g), torch.randn(32, 3, generator=g)
    stem = f"lora_te2_text_model_{name.replace('.', '_')}"
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.5)}, file := tmp_path / "te2.safetensors")
    styled, other, ids = loaded(base, SD_LORAS=f"ink={file}"), loaded(base), torch.tensor([[1, 5, 6, 7, 2]])
    layer = next(m for n, m in other.text_encoders[1].named_modules() if n.endswith(name))
    def answer(parts): return [encoder(ids).last_hidden_state for encoder in parts.text_encoders]
    before = answer(other)
    layer.weight.data += 1.5 / 3 * up @ down
    styled.loras.use("ink", "text")
    got, want = answer(styled), answer(other)
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(got, want, strict=True))
    assert torch.equal(got[0], before[0]) and (got[1] - before[1]).abs().max() > 0.01


def test_sdxl_in_the_original_programs_names(tmp_path):
    """Blocks numbered through, as most SDXL LoRAs have them: the table of names is tests/tiny.py's, which reads single checkpoints with it."""
    base = tiny.save(tmp_path / "model", "sdxl")
    plain = loaded(base)
    ours = {n: m for n, m in plain.unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    g, state, want = torch.Generator().manual_seed(0), {}, {}
    for name, module in ours.items():
        original = tiny.ldm_unet(name + ".weight").removesuffix(".weight")
        w = module.weight.detach()
        down, up = torch.randn(3, *w.shape[1:], generator=g) * 0.1, torch.randn(len(w), 3, *[1] * (w.ndim - 2), generator=g) * 0.1
        state |= {f"lora_unet_{original.replace('.', '_')}.{k}": v for k, v in (("lora_down.weight", down), ("lora_up.weight", up), ("alpha", torch.tensor(1.5)))}
        want[name] = w + 0.5 * (up.reshape(len(w), 3) @ down.reshape(3, -1)).reshape(w.shape)
    save_file(state, file := tmp_path / "sgm.safetensors")
    parts = fused(base, file)
    assert not any("layers fit" in n for n in parts.notes)
    assert all((m.weight - want[n]).abs().max() < 1e-5 for n, m in parts.unet.named_modules() if n in want)
