"""Fused norms compute what torch's do. Recorded decoders and text encoders answer as the plain ones and notice when weights have moved."""
import os, subprocess, sys
from importlib.util import find_spec

import pytest, torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from aura_engine import compiling
from aura_engine.group_norms import FusedNorm, FusedResnet, fuse_norms, is_usual_block

INTERPRETED = """
import torch
from aura_engine import group_norms as gn
for dtype in (torch.float32, torch.float16, torch.bfloat16): gn.check_kernels(torch.device("cpu"), dtype)
x, norm = torch.randn(1, 64, 7, generator=torch.Generator().manual_seed(0)), gn.FusedNorm(32, 64)     # a VAE's attention has no rows and columns
with torch.inference_mode(): assert (norm(x) - torch.nn.functional.group_norm(x, 32)).abs().max() < 1e-5
gn.sum_up = None                                                 # the kernels are what ran
try: norm(x)
except TypeError: print("kernels")
"""


@pytest.mark.skipif(not find_spec("triton"), reason="Triton comes with torch for NVIDIA cards")
def test_kernels_compute_what_torch_does():
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, timeout=300, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.stdout.strip() == "kernels", done.stderr[-2000:]


def random_vae():
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(16, 32), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    for norm in (m for m in vae.modules() if isinstance(m, nn.GroupNorm)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return vae.eval().requires_grad_(False)


@torch.inference_mode()
def test_fused_blocks_answer_as_before_and_keep_their_weights():
    vae, z = random_vae(), torch.randn(2, 4, 8, 8)
    before, names = vae.decode(z, return_dict=False)[0], list(vae.state_dict())
    assert fuse_norms(vae) == 10 and fuse_norms(vae) == 0 and list(vae.state_dict()) == names
    assert (vae.decode(z, return_dict=False)[0] - before).abs().max() < 1e-5 * before.std() * 10
    encoded = vae.encode(torch.randn(1, 3, 16, 16)).latent_dist.mean
    assert torch.isfinite(encoded).all() and any(isinstance(m, FusedResnet) for m in vae.encoder.modules())


def test_a_block_that_does_more_stays_as_it_is():
    unet = UNet2DConditionModel(sample_size=8, cross_attention_dim=32, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=8,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), resnet_time_scale_shift="scale_shift")
    given = torch.randn(1, 4, 8, 8), torch.tensor([9.0]), torch.randn(1, 7, 32)
    with torch.inference_mode():
        before = unet(*given, return_dict=False)[0]
        assert fuse_norms(unet) == 0 and any(type(m) is FusedNorm for m in unet.modules())
        assert torch.allclose(unet(*given, return_dict=False)[0], before, atol=1e-5)
    block = random_vae().decoder.mid_block.resnets[0]
    assert is_usual_block(block)
    block.conv2 = nn.Sequential(block.conv2)                     # as a LoRA's layer would be
    assert not is_usual_block(block)


def recorded(function, given, pool):
    """Stands for a CUDA graph where there is no GPU: plays what was computed when it was made, from the weights of then."""
    return compiling.Recording(None, given, given.call(function))


@torch.inference_mode()
def test_a_recorded_decode_notices_moved_weights_and_tiles(monkeypatch):
    vae, z = random_vae(), torch.randn(1, 4, 8, 8)
    plain = vae.decode(z, return_dict=False)[0]
    vae.decode = compiling.GraphedDecode(vae)
    seen = []
    monkeypatch.setattr(compiling, "record", lambda function, given, pool: seen.append(given.value.shape))
    for _ in range(4): assert torch.equal(vae.decode(z, return_dict=False)[0], plain)
    assert len(seen) == 1                                        # the second call of a shape is recorded, or not at all
    vae.to(torch.float64).to(torch.float32)                      # a decode in another precision: the weights are elsewhere now
    for _ in range(3): vae.decode(z, return_dict=False)
    assert len(seen) == 2
    vae.enable_tiling()
    for _ in range(3): vae.decode(torch.randn(1, 4, 8, 16), return_dict=False)
    assert len(seen) == 2 and torch.equal(vae.decode(z).sample, plain)


@torch.inference_mode()
def test_a_recorded_text_encoder_gives_all_its_outputs(monkeypatch):
    sizes = dict(vocab_size=99, hidden_size=16, intermediate_size=32, projection_dim=16, num_hidden_layers=2, num_attention_heads=2)
    encoder, ids = CLIPTextModel(CLIPTextConfig(**sizes)).eval(), torch.arange(8)[None]
    plain, states = encoder(ids), encoder(ids, output_hidden_states=True)
    encoder.forward = compiling.GraphedText(encoder)
    monkeypatch.setattr(compiling.Recording, "play", lambda self, given: compiling.tree_map(torch.clone, self.output))
    monkeypatch.setattr(compiling, "record", recorded)
    for _ in range(3):
        again, deep = encoder(ids), encoder(ids, output_hidden_states=True)
        assert type(again) is type(plain) and torch.equal(again.last_hidden_state, plain.last_hidden_state) and again.hidden_states is None
        assert len(deep.hidden_states) == 3 and torch.equal(deep.hidden_states[-2], states.hidden_states[-2]) and torch.equal(deep[0], states[0])
