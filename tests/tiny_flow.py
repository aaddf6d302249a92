"""Tiny flow-matching pipelines of the real classes with random weights, saved as real diffusers folders: FLUX.2-klein and Z-Image."""
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL, AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel,
    ZImagePipeline, ZImageTransformer2DModel)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

# Qwen3's template without tools: `enable_thinking=False` adds an empty thought, as the real one does
TEMPLATE = """{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{%- endif %}"""
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = [("a", "p"), ("p", "l"), ("ap", "pl"), ("appl", "e"), ("r", "e"), ("re", "d"), ("Ġ", "a"), ("Ġ", "red")]
BLOCKS = dict(block_out_channels=(8,) * 4, norm_num_groups=4, layers_per_block=1, sample_size=128,
              down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)


def tokenizer():
    """Qwen's byte-level tokenizer class with all 256 bytes and a few merges."""
    words = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    vocab = {word: i for i, word in enumerate(words)}
    made = Qwen2Tokenizer(vocab=vocab, merges=MERGES, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None,
                          extra_special_tokens=["<|im_start|>"], model_max_length=131072)
    made.chat_template = TEMPLATE
    return made


def encoder(cls, vocabulary, layers):
    return cls(Qwen3Config(vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, head_dim=8,
                           num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)).eval()


def lively(model, seed):
    """Random values everywhere: with zeros (pad tokens, statistics) forgetting one would not be seen."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim < 2 or "pad_token" in name: p.add_(0.1 * torch.randn(p.shape, generator=drawn))
    return model


def klein(tok, distilled=True):
    net = Flux2Transformer2DModel(in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                                  joint_attention_dim=48, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False)
    vae = lively(AutoencoderKLFlux2(latent_channels=4, **BLOCKS), 1)
    vae.bn.running_mean.copy_(torch.linspace(-0.2, 0.3, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 1.5, 16))
    schedule = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return Flux2KleinPipeline(schedule, vae, lively(encoder(Qwen3ForCausalLM, len(tok), 29), 2), tok, lively(net, 3), is_distilled=distilled)


def z_image(tok):
    net = ZImageTransformer2DModel(in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
                                   axes_dims=[4, 6, 6], axes_lens=[1024, 128, 128])
    vae = AutoencoderKL(latent_channels=4, scaling_factor=0.3611, shift_factor=0.1159, **BLOCKS)
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), lively(vae, 1), lively(encoder(Qwen3Model, len(tok), 5), 2), tok, lively(net, 3))


MAKERS = {"flux2-klein": klein, "flux2-klein-base": lambda tok: klein(tok, distilled=False), "z-image-turbo": z_image}


def save(folder, kind, seed=0, **more):
    """Make and save a tiny pipeline of `kind`, a row's name. -> the folder. `more` goes to save_pretrained."""
    torch.manual_seed(seed)
    MAKERS[kind](tokenizer()).save_pretrained(folder, safe_serialization=True, **more)
    return Path(folder)
