"""Tiny random-weight models of the real classes, saved as real diffusers folders, UNets, LoRA files and single checkpoints."""
import atexit, re, shutil, tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DPMSolverMultistepScheduler, LatentConsistencyModelPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from aura_engine.models import EMBEDDED


def unet(xl=False, **more):
    kind = dict(sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=8,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=64 if xl else 32)
    if xl: kind |= dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32)
    return UNet2DConditionModel(**kind | more)


def vae():
    return AutoencoderKL(block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                         latent_channels=4, norm_num_groups=4, sample_size=128)


def tiny_vae(): return AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4)


def tokenizer(folder):
    """The embedded model's words, with CLIP's limit of 77."""
    shutil.copytree(EMBEDDED / "tokenizer", folder)
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def text(tok, cls=CLIPTextModel, layers=3, width=32):
    return cls(CLIPTextConfig(vocab_size=len(tok), hidden_size=width, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4, projection_dim=32,
                              bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id))


MADE = {}                                        # what was made before: a copy costs a tenth of making it again


def save(folder, kind="sd15", seed=0, **more):
    """`made`, or a copy of what an earlier test made. -> the folder."""
    folder, what = Path(folder), (kind, seed, *sorted(more.items()))
    torch.manual_seed(seed)
    if what not in MADE: MADE[what] = made(Path(tempfile.mkdtemp(prefix="tiny-")) / "model", kind, seed, **more)
    return Path(shutil.copytree(MADE[what], folder, dirs_exist_ok=True))


@atexit.register
def _clear():
    for folder in MADE.values(): shutil.rmtree(folder.parent, ignore_errors=True)


def made(folder, kind="sd15", seed=0, **more):
    """Make and save one of: sd15, sd15-lcm (guidance embedded in the UNet, LCM's own pipeline class), sdxl, sdxl-deep (two encoders of different size,
    ten layers in the second, by which a single checkpoint is known), sd15-inpaint, sdxl-inpaint, sdxl-deep-inpaint (a UNet of nine channels). `more` goes to save_pretrained."""
    torch.manual_seed(seed)
    folder = Path(folder)
    tok = tokenizer(folder.parent / f"{folder.name}-tokenizer")
    schedule = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    if kind.startswith("sdxl"):
        second, wide = (text(tok, CLIPTextModelWithProjection, 10, 48), 80) if kind.startswith("sdxl-deep") else (text(tok, CLIPTextModelWithProjection), 64)
        cls, channels = (StableDiffusionXLInpaintPipeline, 9) if kind.endswith("inpaint") else (StableDiffusionXLPipeline, 4)
        pipe = cls(vae(), text(tok), second, tok, tok, unet(xl=True, cross_attention_dim=wide, in_channels=channels), schedule)
    else:
        cls, body = {"sd15-lcm": (LatentConsistencyModelPipeline, dict(time_cond_proj_dim=32)), "sd15-inpaint": (StableDiffusionInpaintPipeline, dict(in_channels=9))}.get(kind, (StableDiffusionPipeline, {}))
        body = unet(**body)
        pipe = cls(vae(), text(tok), tok, body, schedule, None, None, requires_safety_checker=False)
    pipe.save_pretrained(folder, safe_serialization=True, **more)
    return folder


def lora(file, xl=False, seed=1, kohya=False):
    """A LoRA for the tiny UNet made with peft, in diffusers' layout or in the one other trainers write. -> the file."""
    torch.manual_seed(seed)
    body = unet(xl=xl)
    body.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    state = {f"unet.{k}": v.contiguous() for k, v in get_peft_model_state_dict(body).items()}
    if kohya:
        def plain(k):
            stem, side = k.removeprefix("unet.").removesuffix(".weight").rsplit(".lora_", 1)
            return f"lora_unet_{stem.replace('.', '_')}.lora_{'down' if side == 'A' else 'up'}.weight"
        state = {plain(k): v for k, v in state.items()}
        state |= {k.replace("lora_down.weight", "alpha"): torch.tensor(4.0) for k in list(state) if "lora_down" in k}
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file)
    return Path(file)


# single checkpoints, in the layout of the original programs

UNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
VAE = {"conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
       "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "downsamplers.0": "downsample", "upsamplers.0": "upsample"}
OPEN_CLIP = {"text_model.encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj",
             "text_model.embeddings.position_embedding.weight": "positional_embedding", "text_model.embeddings.token_embedding": "token_embedding", "text_model.final_layer_norm": "ln_final"}


def renamed(name, words):
    for old, new in words.items(): name = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\1{new}", name)
    return name


def ldm_unet(name):
    """A name in the UNet (one layer a block, attention in the inner ones) -> the original's."""
    if m := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name):
        way, block, kind, layer, rest = m[1], int(m[2]), m[3], int(m[4]), m[5]
        place = 2 * block + (1 if kind.endswith("samplers") else layer) + (way == "down")
        inner = {"resnets": "0", "attentions": "1", "downsamplers": "0", "upsamplers": "2" if block == 0 else "1"}[kind]
        return f"{'input' if way == 'down' else 'output'}_blocks.{place}.{inner}.{renamed(rest, UNET) if kind == 'resnets' else rest.replace('conv.', 'op.') if kind == 'downsamplers' else rest}"
    if m := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        return f"middle_block.{1 if m[1] == 'attentions' else 2 * int(m[2])}.{renamed(m[3], UNET) if m[1] == 'resnets' else m[3]}"
    return renamed(name, UNET)


def ldm_vae(name, blocks=4):
    name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}", name.replace("down_blocks.", "down."))
    return renamed(re.sub(r"((?:up|down)\.\d)\.resnets", r"\1.block", name), VAE)


def open_clip(state):
    """Names of transformers' CLIP with projection -> OpenCLIP's, q, k and v in one matrix."""
    out = {renamed(k, OPEN_CLIP): v for k, v in state.items() if ".self_attn." not in k or "out_proj" in k}
    out["text_projection"] = out.pop("text_projection.weight").T.contiguous()
    for k in [k for k in state if k.endswith("self_attn.q_proj.weight")]:
        for part in ("weight", "bias"):
            out[renamed(k.split(".self_attn")[0], OPEN_CLIP) + f".attn.in_proj_{part}"] = torch.cat([state[k.replace("q_proj.weight", f"{p}_proj.{part}")] for p in "qkv"])
    return out


def single(folder, file):
    """A saved tiny model as one checkpoint file, as a web page would offer it. Its configuration goes into a folder of the same name. -> the file."""
    folder, file = Path(folder), Path(file)
    read = lambda part: load_file(next((folder / part).glob("*.safetensors")))
    xl = (folder / "text_encoder_2").exists()
    state = {f"model.diffusion_model.{ldm_unet(k)}": v for k, v in read("unet").items()} | {f"first_stage_model.{ldm_vae(k)}": v for k, v in read("vae").items()}
    stem = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
    state |= {stem + (k if k.startswith("text_model.") else f"text_model.{k}"): v for k, v in read("text_encoder").items()}
    if xl: state |= {f"conditioner.embedders.1.model.{k}": v for k, v in open_clip(read("text_encoder_2")).items()}
    save_file({k: v.contiguous() for k, v in state.items()}, file)
    shutil.copytree(folder, file.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))
    return file
