"""Tiny random-weight models of the real classes, saved as real diffusers folders."""
import shutil

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
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


def tokenizer(folder):
    """The embedded model's words, with CLIP's limit of 77."""
    shutil.copytree(EMBEDDED / "tokenizer", folder)
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def text(tok, cls=CLIPTextModel):
    return cls(CLIPTextConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, projection_dim=32,
                              bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id))


def save(folder, kind="sd15"):
    """Make and save one of: sd15, sd15-lcm (guidance embedded in the UNet), sdxl."""
    torch.manual_seed(0)
    tok = tokenizer(folder.parent / f"{folder.name}-tokenizer")
    schedule = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    if kind == "sdxl":
        pipe = StableDiffusionXLPipeline(vae(), text(tok), text(tok, CLIPTextModelWithProjection), tok, tok, unet(xl=True), schedule)
    else:
        body = unet(time_cond_proj_dim=32) if kind == "sd15-lcm" else unet()
        pipe = StableDiffusionPipeline(vae(), text(tok), tok, body, schedule, None, None, requires_safety_checker=False)
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder
