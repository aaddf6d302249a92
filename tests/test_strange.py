"""Folders and files as people have them, which nobody would make on purpose: read right, or refused with a sentence that a person can act on."""
import json, re, shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import tiny
from aura_engine.models import ALIASES, EMBEDDED, resolve_id
from aura_engine.optimize import draw
from aura_engine.types import AuraError
from test_checkpoints import loaded

WEIGHTS = "diffusion_pytorch_model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5136000000\n"
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """A folder with tiny models: sd (a folder), xl.safetensors (one file, its configuration beside it), style.safetensors (a LoRA)."""
    at = tmp_path_factory.mktemp("strange")
    tiny.save(at / "sd")
    tiny.single(tiny.save(at / "deep", "sdxl-deep"), at / "xl.safetensors")
    tiny.lora(at / "style.safetensors")
    tiny.lora(at / "style-xl.safetensors", xl=True, kohya=True)
    return at


def single(at, name, change):
    save_file({k: v.clone().contiguous() for k, v in change(load_file(at / "xl.safetensors")).items()}, file := at / f"{name}.safetensors")
    if not file.with_suffix("").exists(): file.with_suffix("").symlink_to(at / "xl")
    return file


def folder(at, name, change):
    """A copy of the folder with the UNet's folder changed. -> the folder."""
    shutil.copytree(at / "sd", at / name)
    change(at / name / "unet")
    return at / name


def sharded(unet, lose=None):
    made = UNet2DConditionModel.from_pretrained(unet)
    shutil.rmtree(unet)
    made.save_pretrained(unet, max_shard_size="300KB")
    if lose: next(unet.glob(lose)).unlink()


def linked(unet, whole=True):
    (unet / WEIGHTS).rename(unet.parent / "blob")
    if not whole: (unet.parent / "blob").unlink()
    (unet / WEIGHTS).symlink_to(unet.parent / "blob")


def mixed(unet): save_file({k: v.bfloat16() if i % 2 else v for i, (k, v) in enumerate(load_file(unet / WEIGHTS).items())}, unet / WEIGHTS)
def part(state, stem): return {k.removeprefix(stem): v for k, v in state.items() if k.startswith(stem)}


def config(file, **values):
    """A change: these values in a configuration of the folder (None: without the key)."""
    def change(unet):
        path = unet.parent / file
        made = json.loads(path.read_text()) | values
        path.write_text(json.dumps({k: v for k, v in made.items() if v is not None}))
    return change


def scheduler(**values): return config("scheduler/scheduler_config.json", **values)


def hollow(unet):
    for file in (unet.parent / "tokenizer").iterdir():
        if file.name != "tokenizer_config.json": file.unlink()


def fewer_words(unet):
    file = unet.parent / "text_encoder/model.safetensors"
    save_file({k: v[:500].clone() if "token_embedding" in k else v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    config("text_encoder/config.json", vocab_size=500)(unet)


def program(*names):
    def change(unet):
        (unet / WEIGHTS).unlink()
        for name in names: (unet / name).write_bytes(b"x")
    return change


def twice(unet):
    sharded(unet)
    shutil.copy(unet.parent.parent / "sd/unet" / WEIGHTS, unet)


def another_unet(unet):
    shutil.rmtree(unet)
    shutil.copytree(unet.parent.parent / "deep/unet", unet)


def old_words(unet, merges=None):
    """The tokenizer as two files, as libraries kept it for years, with another merges.txt."""
    at = unet.parent / "tokenizer"
    model = json.loads((at / "tokenizer.json").read_text())["model"]
    (at / "tokenizer.json").unlink()
    (at / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(m) for m in model["merges"])]
    (at / "merges.txt").write_bytes(("\r\n".join(lines) + "\r\n").encode() if merges is None else merges)


def another_kind(**more):
    def change(unet):
        shutil.rmtree(unet)
        tiny.unet(**more).save_pretrained(unet)
    return change


def hidden(unet):
    for name in ("unet/._" + WEIGHTS, "tokenizer/._tokenizer.json", "scheduler/._scheduler_config.json", ".DS_Store"): (unet.parent / name).write_bytes(b"\0\5\x16\7")


BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
FOLDERS = {                                       # what is done to the UNet's folder: the refusal's words, or None
    "half": (lambda u: (u / WEIGHTS).rename(u / "diffusion_pytorch_model.fp16.safetensors"), None), "shards": (sharded, None), "links": (linked, None), "mixed": (mixed, None),
    "another name": (lambda u: (u / WEIGHTS).rename(u / "diffusion_pytorch_model.non_ema.safetensors"), "unet has no weights of the usual name; if diffusion_pytorch_model.non_ema.safetensors are those, rename it to"),
    "lost shard": (lambda u: sharded(u, "*00002-of*"), r"unet lacks 1 of the \d+ files of its weights"), "lost index": (lambda u: sharded(u, "*index.json"), r"unet is in \d+ files and lacks their index"),
    "dead link": (lambda u: linked(u, False), f"no safetensors weights for unet; unet/{WEIGHTS} links to a file that is not there"),
    "pointer": (lambda u: (u / WEIGHTS).write_bytes(POINTER), f"in unet, {WEIGHTS} is a pointer of Git LFS and not the file: fetch it with `git lfs pull`"),
    "empty": (lambda u: (u / WEIGHTS).write_bytes(b""), f"in unet, {WEIGHTS} is empty"),
    "cut": (lambda u: (u / WEIGHTS).write_bytes((u / WEIGHTS).read_bytes()[:50_000]), f"in unet, {WEIGHTS} is damaged: it has 50,000 of its [0-9,]+ bytes"),
    "byte order mark": (lambda u: (u / "config.json").write_text("\ufeff" + (u / "config.json").read_text(), encoding="utf-8"), "unet/config.json is damaged: it is no JSON"),
    "no words": (hollow, r"its tokenizer has \d words and its text encoder 5,"), "fewer words": (fewer_words, "its tokenizer has 5,.* words and its text encoder 500"),
    "no length": (config("tokenizer/tokenizer_config.json", model_max_length=None), None), "oblong": (config("unet/config.json", sample_size=[16, 12]), None), "LMS": (scheduler(_class_name="LMSDiscreteScheduler"), None),
    "flow": (scheduler(_class_name="FlowMatchEulerDiscreteScheduler"), "its UNet comes with a FlowMatchEulerDiscreteScheduler"), "sigmoid": (scheduler(beta_schedule="sigmoid"), "its noise grows by a schedule named sigmoid"),
    "CosXL": (scheduler(_class_name="EulerDiscreteScheduler", timestep_type="continuous", sigma_max=120.0), "its EulerDiscreteScheduler runs between two sigmas"),
    "few bits": (config("unet/config.json", quantization_config=BITS), "unet has numbers of few bits, for bitsandbytes"), "few bits for words": (config("text_encoder/config.json", quantization_config=BITS), "text_encoder has numbers of few bits"),
    "ONNX": (program("model.onnx"), "unet has weights of ONNX alone"), "OpenVINO": (program("openvino_model.xml", "openvino_model.bin"), "unet has weights of OpenVINO alone"), "GGUF": (program("unet-Q4_K.gguf"), "unet has weights of GGUF alone"),
    "twice": (twice, "the same weights are there twice"), "another family's": (another_unet, "its UNet is of SDXL's kind and takes 80 numbers a word, its text encoders give 32"),
    "no vae": (config("model_index.json", vae=None), "its model_index.json names no vae, which a StableDiffusionPipeline has"), "own program": (config("model_index.json", unet=["my_unet", "UNet2DConditionModel"]), r"needs a program of its own \(my_unet\)"),
    "a list": (lambda u: (u.parent / "scheduler/scheduler_config.json").write_text("[]"), "scheduler_config.json is no configuration: it holds a list"),
    "other sizes": (config("text_encoder/config.json", intermediate_size=128), "the weights do not have the shapes the configuration asks for"),
    "two files of words": (old_words, None), "no merges": (lambda u: old_words(u, b"#version: 0.2\n"), "its tokenizer does not know how its words are put together"),
    "UTF-16": (lambda u: (u / "config.json").write_text("{}", encoding="utf-16"), "unet/config.json is a text in UTF-16: save it in UTF-8"), "NaN": (lambda u: (u / "config.json").write_text('{"norm_eps": NaN}'), "no JSON .NaN is no number"),
    "hidden": (hidden, None), "upper": (lambda u: u.rename(u.parent / "UNet"), "there is no configuration for unet .there is a folder UNet"), "half fetched": (lambda u: (u / WEIGHTS).rename(u / (WEIGHTS + ".incomplete")), "the download of unet's weights has not ended"),
    "activation": (config("text_encoder/config.json", hidden_act="wonder"), "text_encoder/config.json has hidden_act 'wonder', which this version of its library does not know"), "UNet's activation": (config("unet/config.json", act_fn="wonder"), "unet/config.json has act_fn 'wonder'"),
    "a word for a number": (scheduler(beta_start="0.001"), "its scheduler_config.json has beta_start '0.001', where a number from 0 is needed"), "no steps": (scheduler(num_train_timesteps=0), "num_train_timesteps 0, where a number from 2 is needed"),
    "classes": (another_kind(num_class_embeds=10), "its UNet wants a class besides words"), "twice as many": (another_kind(out_channels=8), "its UNet gives 8 channels, its VAE takes 4"),
    "fp8": (lambda u: save_file({k: v.to(torch.float8_e4m3fn) if v.ndim == 1 else v for k, v in load_file(u / WEIGHTS).items()}, u / WEIGHTS), "holds weights of type F8_E4M3"),
    "no json": (lambda u: (u.parent / "text_encoder/config.json").write_text("{"), "text_encoder/config.json is damaged: it is no JSON"),
}


@pytest.mark.parametrize("how", FOLDERS)
def test_folders(at, how):
    change, words = FOLDERS[how]
    made = folder(at, how, change)
    if words is None:
        parts = loaded(made)
        got, want = parts.unet.state_dict(), load_file(at / "sd/unet" / WEIGHTS)
        assert (parts.row.native, parts.tokenizers[0].model_max_length) == (128, 77)
        assert all((got[k] - v).abs().max() < 0.01 * v.abs().max().clamp(min=1) for k, v in want.items())
    else:
        with pytest.raises(AuraError, match=words): loaded(made)


BYTES = {"empty": (b"", "is empty"), "pointer": (POINTER, "is a pointer of Git LFS"), "archive": (b"7z\xbc\xaf" + b"\0" * 99, "is an archive: unpack it"), "answer": (b'{"error": "Unauthorized"}', "is a text in JSON"), "list": (b"\2\0\0\0\0\0\0\0[]", "is damaged: its header cannot be read"), "odd line": (b'\7\0\0\0\0\0\0\0{"a":5}', "is damaged: its header cannot be read"),
         "longer": (b"\2\0\0\0\0\0\0\0{}more", "is damaged: 4 bytes follow its 10"), "page": (b"<!DOCTYPE html>" + b" " * 5000, "is a web page, saved in place of the file"), "pickle": (b"PK\3\4\0\0\x08\x08" + b"\0" * 99, "is a pickled file by another name"),
         "gguf": (b"GGUF" + b"\0" * 4 + b"\xff" * 99, "is a GGUF file by another name"), "noise": (b"\xff" * 99, "is damaged, or no safetensors file"), "header": (b"\x99\0\0\0\0\0\0\0{", "is damaged: it ends inside its header")}


@pytest.mark.parametrize("how", BYTES)
def test_files_that_are_none(at, how):
    data, words = BYTES[how]
    (at / f"{how}.safetensors").write_bytes(data)
    for setting in ({}, {"SD_VAE_ID": str(at / f"{how}.safetensors")}, {"SD_LORAS": f"ink={at / how}.safetensors"}):
        with pytest.raises(AuraError, match=f"{how}.safetensors {words}"): loaded(at / "sd" if setting else at / f"{how}.safetensors", **setting)


KINDS = {"SDXL's textual inversion": ("a textual inversion", ["clip_g", "clip_l"]), "diffusers' one": ("a textual inversion", ["<cat>"]), "T5": ("a T5 text encoder", ["encoder.block.0.x", "decoder.block.0.x"]), "films": ("a video model", ["model.diffusion_model.x", "conditioner.embedders.0.open_clip.x"]), "ControlNet's LoRA": ("a ControlNet", ["input_hint_block.0.x", "lora_controlnet"]), "SD3": ("a Stable Diffusion 3 model", ["joint_blocks.x"]),
         "training": ("a training program's dictionary", ["state_dict.model.x"]), "one in all": ("a whole model in diffusers' names", ["unet.x", "vae.x"]), "ControlNet": ("a ControlNet", ["controlnet_cond_embedding.x", "down_blocks.x", "mid_block.x"]),
         "motion": ("a motion module", ["down_blocks.0.motion_modules.0.x", "mid_block.x"]), "IP-Adapter": ("an IP-Adapter", ["image_proj.x", "ip_adapter.1.x"]), "clip": ("a text encoder", ["text_model.encoder.x"]), "UNet": ("a UNet alone", ["input_blocks.0.x", "output_blocks.0.x"])}


@pytest.mark.parametrize("how", KINDS)
def test_other_kinds(at, how):
    kind, names = KINDS[how]
    save_file({n: torch.zeros(2) for n in names}, file := at / "kind.safetensors")
    with pytest.raises(AuraError, match=f"kind.safetensors is {kind}[^:]*: "): loaded(file)
    with pytest.raises(AuraError, match=f"SD_LORAS=.*it is {kind}[^:]*, and no LoRA"): loaded(at / "sd", SD_LORAS=f"ink={file}")


def test_a_vae_in_one_file(at):
    """In both spellings, with and without the prefix, and out of a whole checkpoint: the same tensors."""
    want, stem = load_file(at / "deep/vae" / WEIGHTS), "first_stage_model."
    files = [at / "deep/vae" / WEIGHTS, single(at, "vae", lambda s: part(s, stem)), single(at, "prefixed", lambda s: {k: v for k, v in s.items() if k.startswith(stem)}), at / "xl.safetensors"]
    for file in files:
        got = loaded(at / "sd", SD_VAE_ID=str(file)).vae.state_dict()
        assert all(torch.equal(got[k], v) for k, v in want.items()), file
    bare = single(at, "novae", lambda s: {k: v for k, v in s.items() if not k.startswith(stem)})
    parts = loaded(bare, SD_VAE_ID=str(files[1]))
    assert torch.equal(parts.vae.state_dict()["decoder.conv_in.weight"], want["decoder.conv_in.weight"])
    assert any("has no VAE to compare it with" in note for note in parts.notes), parts.notes
    for source, words in ((at / "style.safetensors", "style.safetensors is a LoRA, and no VAE"), (at / "sd", "it holds a whole model; name the folder of the part in it")):
        with pytest.raises(AuraError, match=words): loaded(at / "sd", SD_VAE_ID=str(source))
    with pytest.raises(AuraError, match="is a VAE: it belongs in SD_VAE_ID"): loaded(files[1])


VAES = {"scale": (dict(scaling_factor=0.13025), "scaling_factor 0.13025, not 0.18215"), "shift": (dict(shift_factor=0.1), "shift_factor 0.1, not None"), "statistics": (dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4), "latents_mean"),
        "channels": (16, "channels 16, not 4"), "size": (3, "pixels a side 4, not 8")}


@pytest.mark.parametrize("how", VAES)
def test_a_vae_of_another_family_is_refused_by_its_latents(at, how):
    """For a model with a VAE, and for a file without one."""
    change, words = VAES[how]
    blocks = 3 if change == 3 else 4
    vae = AutoencoderKL(block_out_channels=(8,) * blocks, down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks, norm_num_groups=4, latent_channels=16 if change == 16 else 4)
    vae.save_pretrained(folder := at / f"vae-{how}")
    if isinstance(change, dict): (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | change))
    bare = single(at, "bare", lambda s: {k: v for k, v in s.items() if not k.startswith("first_stage_model.")})
    for model in (at / "sd", bare):
        with pytest.raises(AuraError, match=words): loaded(model, SD_VAE_ID=str(folder))


def test_a_vae_in_one_file_may_say_its_family_in_its_name(at):
    shutil.copy(at / "deep/vae" / WEIGHTS, file := at / "sdxl_vae.safetensors")
    assert ["its name says SDXL" in note for note in loaded(at / "sd", SD_VAE_ID=str(file)).notes] == [True]


def test_what_only_the_metadata_says(at):
    """ModelSpec's and kohya's words for v-prediction are read, told, and give way to a setting."""
    for words, sampler in (({"modelspec.prediction_type": "v"}, "dpm"), ({"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, "euler")):
        save_file(load_file(at / "xl.safetensors"), file := at / "said.safetensors", metadata=words)
        if not file.with_suffix("").exists(): file.with_suffix("").symlink_to(at / "xl")
        parts = loaded(file)
        assert (parts.schedule["prediction_type"], parts.row.sampler) == ("v_prediction", sampler) and "says in its header that it predicts v" in parts.notes[0]
        assert loaded(file, SD_PREDICTION="epsilon").schedule["prediction_type"] == "epsilon"


def test_a_vae_that_means_something_else_by_its_latents_is_told(at):
    """Two families' VAEs have the same shapes: the model's own encodes a picture, which the other one decodes."""
    shutil.copytree(EMBEDDED / "vae", other := at / "turned")
    assert not loaded("embedded-base", SD_VAE_ID=str(other)).notes
    state, last = load_file(other / WEIGHTS), {"encoder": 0, "decoder": 1}
    for part, dim in last.items():
        name = max((k for k in state if k.startswith(part) and k.endswith("weight")), key=lambda k: int(k.split(".")[2])) if part == "encoder" else "decoder.layers.0.weight"
        state[name] = state[name].roll(1, dim).contiguous()
    bias = name_of_bias(state)
    state[bias] = state[bias].roll(1)
    save_file(state, other / WEIGHTS)
    notes = loaded("embedded-base", SD_VAE_ID=str(other)).notes
    assert len(notes) == 1 and re.search(r"comes back \d+ of 255 off through it, one that it encodes itself \d+: it looks like", notes[0])


def name_of_bias(state): return max((k for k in state if k.startswith("encoder") and k.endswith("bias")), key=lambda k: int(k.split(".")[2]))


def test_a_vae_of_another_width_is_refused_with_both_shapes(at):
    AutoencoderKL(block_out_channels=(16,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4).save_pretrained(at / "wide")
    for kind, words in ((at / "wide", r"its tensor encoder.conv_in.weight has the shape \[16, 3, 3, 3\], in this model it has \[8,"), (at / "vae-channels", "channels 16, not 4")):
        if not kind.exists(): AutoencoderKL(block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, latent_channels=16).save_pretrained(kind)
        with pytest.raises(AuraError, match=words): loaded(at / "sd", SD_VAE_ID=str(kind / WEIGHTS))
    tiny.tiny_vae().save_pretrained(at / "taesd")
    with pytest.raises(AuraError, match="is a tiny VAE: name its folder in SD_VAE_ID"): loaded(at / "sd", SD_VAE_ID=str(at / "taesd" / WEIGHTS))


def test_settings_that_a_newer_library_wrote_are_told(at):
    def newer(unet):
        for name in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"): config(name, wonder=True, _diffusers_version="99.0", quiet_wonder=None, old=False)(unet)
    notes = loaded(folder(at, "newer", newer)).notes
    assert sorted(notes) == sorted(f"{name}: wonder is not known to this version of diffusers and not used" for name in ("unet/config.json", "vae/config.json", "scheduler_config.json"))


def test_an_lcm_in_one_file_is_one(tmp_path):
    """Its guidance is an input of the UNet, which only one tensor tells: it was drawn as Stable Diffusion 1.5."""
    own = tiny.save(tmp_path / "lcm", "sd15-lcm")
    file, plain = tiny.single(own, tmp_path / "one.safetensors"), tiny.save(tmp_path / "plain")
    shutil.rmtree(file.with_suffix(""))
    file.with_suffix("").symlink_to(plain)
    parts, want = loaded(file), loaded(own)
    assert parts.row.name == "sd15-lcm" and not parts.notes
    assert all(torch.equal(v, want.unet.state_dict()[k]) for k, v in parts.unet.state_dict().items())


def test_a_checkpoint_with_a_base_gives_its_unet_alone_and_says_so(at):
    notes = loaded(at / "xl.safetensors", SD_BASE_ID=str(at / "deep")).notes
    assert len(notes) == 1 and notes[0].startswith("xl.safetensors: only its UNet is used, the other parts are the base's (")
    with pytest.raises(AuraError, match="SD_BASE_ID=.* is one file: a base is a folder or a repository"): loaded(at / "deep/unet", SD_BASE_ID=str(at / "xl.safetensors"))


def test_what_a_download_left_undone(at):
    shutil.copy(at / "style.safetensors", file := at / "half.safetensors")
    (at / "half.safetensors.aria2").write_bytes(b"")
    with pytest.raises(AuraError, match="half.safetensors is not whole: aria2 has not ended"): loaded(at / "sd", SD_LORAS=f"ink={file}")


def test_weights_that_are_to_be_scaled_are_refused(at):
    with pytest.raises(AuraError, match="scaled.safetensors holds weights that are to be scaled"): loaded(single(at, "scaled", lambda s: s | {"model.diffusion_model.out.2.scale_weight": torch.ones(1)}))


@pytest.mark.parametrize("key", ["edm_mean", "edm_vpred.sigma_max", None])
def test_other_noise_in_one_file(at, key):
    if key: file, words = single(at, "edm", lambda s: s | {key: torch.zeros(4)}), "is an EDM model"
    else: file, words = single(at, "average", lambda s: {k.replace("model.diffusion_model.", "model_ema.diffusion_model"): v for k, v in s.items()}), "is the running average of a training run"
    with pytest.raises(AuraError, match=words): loaded(file)


def test_a_unet_takes_a_base_of_its_own_family(at):
    with pytest.raises(AuraError, match="they belong to different families"): loaded(at / "deep/unet", SD_BASE_ID=str(at / "sd"))


def test_a_unet_in_the_original_names_without_a_prefix(at):
    file = single(at, "comfy", lambda s: part(s, "model.diffusion_model."))
    got, want = loaded(file, SD_BASE_ID=str(at / "deep")).unet.state_dict(), load_file(at / "deep/unet" / WEIGHTS)
    assert all(torch.equal(got[k], v) for k, v in want.items())


def test_tensors_that_nobody_reads_are_told(at):
    """A running average, leftovers of a merge, tensors in a UNet that it has no place for. Not the numbers of a schedule."""
    more = {**{f"model_ema.diffusion_modelx{i}": torch.zeros(250, 250) for i in range(4)}, "lora_unet_a.alpha": torch.zeros(1), "model.diffusion_model.label_emb.9.weight": torch.zeros(3)}
    file = single(at, "more", lambda s: s | more | {"alphas_cumprod": torch.zeros(1000), "model_ema_decay": torch.zeros(1), "denoiser.sigmas": torch.zeros(1000)})
    parts = loaded(file)
    assert parts.notes == ["more.safetensors: 1 tensors named lora_unet_a.… (0.0 MB) are not used", "more.safetensors: 4 tensors named model_ema.… (1.0 MB) are not used", "more.safetensors: 1 tensors of its unet are not used"]
    assert not loaded(at / "xl.safetensors").notes


def test_loras_that_are_none_of_this_model(at):
    with pytest.raises(AuraError, match=r"does not fit this model .* at unet .*attn2.to_k it takes 64 numbers, the model has 32"): loaded(at / "sd", SD_LORAS=f"ink={at / 'style-xl.safetensors'}")
    with pytest.raises(AuraError, match="it is an SDXL checkpoint, and no LoRA"): loaded(at / "sd", SD_LORAS=f"ink={at / 'xl.safetensors'}")
    save_file({f"transformer.transformer_blocks.0.attn.to_q.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}, file := at / "flux.safetensors")
    with pytest.raises(AuraError, match="it changes a transformer"): loaded(at / "sd", SD_LORAS=f"ink={file}")
    kohya = load_file(tiny.lora(at / "kohya.safetensors", kohya=True))
    for zero in ("alpha", "lora_down"):
        save_file({k: 0 * v if zero in k else v for k, v in kohya.items()}, file := at / "zero.safetensors")
        assert loaded(at / "sd", SD_LORAS=f"ink={file}").notes == [f"SD_LORAS=ink={file}: all it adds is zero"]
    save_file(kohya | load_file(at / "style.safetensors"), file := at / "two-spellings.safetensors")
    with pytest.raises(AuraError, match=r"it holds unet down_blocks.* twice \("): loaded(at / "sd", SD_LORAS=f"ink={file}")
    save_file({k: v.to(torch.int8) for k, v in kohya.items()}, file := at / "whole-numbers.safetensors")
    with pytest.raises(AuraError, match="it holds whole numbers"): loaded(at / "sd", SD_LORAS=f"ink={file}")
    save_file({"lora_unet_a.w_norm": torch.ones(2)}, file := at / "norms.safetensors")
    with pytest.raises(AuraError, match=r"nothing in it is known \(lora_unet_a.w_norm"): loaded(at / "sd", SD_LORAS=f"ink={file}")
    save_file({"lora_unet_a.diff": torch.ones(2)}, file := at / "differences.safetensors")
    with pytest.raises(AuraError, match="differences.safetensors is a file of whole differences: it changes a model"): loaded(file)
    with pytest.raises(AuraError, match=r"it has 2 .safetensors files; name one of them, as two/"):
        (at / "two").mkdir()
        for name in "ab": shutil.copy(at / "style.safetensors", at / "two" / f"{name}.safetensors")
        loaded(at / "sd", SD_LORAS=f"ink={at / 'two'}")
    save_file(load_file(at / "style.safetensors") | {"bundle_emb.cat.string_to_param.*": torch.zeros(4, 32), "odd.x": torch.zeros(1)}, file := at / "bundle.safetensors")
    notes = loaded(at / "sd", SD_LORAS=f"ink={file}").notes
    assert [n.rpartition(": ")[2] for n in notes] == ["1 tensors of words for prompts (bundle_emb) come with it and are not used", "1 tensors are no part of a LoRA and are not used (odd.x …)"]


NAMES = {"m.zip": "unpack the archive", "x.safetensors.crdownload": "its download has not ended", "m.safetensors.index.json": "name the folder with the whole model", "$HOME/m": "variables are not filled in", "models--own--model": "write own/model", "a/b/": "write it without the slash at its end", " a/b": "write it without spaces around it", "xl.Safetensors": "rename it to .safetensors", "xl.safetensors/": "without the slash",
         "model.gguf": "GGUF holds numbers of few bits", "model.sft": "rename it to .safetensors", "'a/b'": "write it without quotes", "https://huggingface.co/a/b": "write what follows the Hub's address: a/b", "sdxl": "a name on the Hub has an owner",
         "https://huggingface.co/a/b/blob/main/c.safetensors?x=1": "address: a/b/c.safetensors", "https://civitai.com/models/1": "download the file", "file:///a": "without file://", "gone": "no such file or folder"}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_none(at, name):
    if name == "xl.Safetensors": shutil.copy(at / "xl.safetensors", at / name)
    with pytest.raises(AuraError, match=re.escape(NAMES[name])): loaded(f"{at}/{name}" if name == "gone" or name.startswith("xl") else name)


def test_folders_that_hold_models(at):
    (at / "cache/snapshots/abc").mkdir(parents=True)
    (at / "hollow").mkdir()
    shutil.copytree(at / "sd", at / "outer/between/model")
    shutil.copytree(at / "sd", at / "folder.safetensors")
    shutil.copytree(at / "sd", at / "headless")
    (at / "headless/model_index.json").unlink()
    for name, words in (("cache", "name a version in it, as snapshots/abc"), ("hollow", "the folder is empty"), ("outer", "it holds a model further inside: name outer/between/model"), ("folder.safetensors", "it is a folder with the ending of a file"), ("headless", "no model_index.json"), ("", r"it is a folder of \d+ models: name one of them, as ")):
        with pytest.raises(AuraError, match=words): loaded(at / name)


def test_removed_names_become_their_mirrors():
    for name, mirror in ALIASES.items(): assert resolve_id(name)[0] == mirror and mirror in resolve_id(name)[1]
    assert resolve_id("runwayml/stable-diffusion-inpainting")[0] == "stable-diffusion-v1-5/stable-diffusion-inpainting"


def test_an_inpainting_unet_is_drawn_with_in_the_waterfall(tmp_path):
    parts = loaded(tiny.save(tmp_path / "model", "sd15-inpaint"))
    assert draw(parts, torch.zeros(1, 7, 32), 16, steps=1).pixels.shape == (1, 3, 128, 128)


def test_the_notebook_names_tests_that_there_are():
    """04b's table of kinds."""
    text = "\n".join("".join(cell["source"]) for cell in json.loads((TESTS.parent / "nbs/04b_facts.ipynb").read_text(encoding="utf-8"))["cells"])
    rows = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", text, re.M)
    here = "\n".join(file.read_text(encoding="utf-8") for file in TESTS.glob("test_*.py"))
    assert [int(number) for number, _ in rows] == list(range(1, 17))
    for _, tests in rows: assert tests and all(f"def {name}(" in here for name in re.findall(r"test_\w+", tests)), tests
