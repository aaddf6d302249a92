"""The bytes of all tensors that are alive at once, counted while torch runs a network: real sizes with fake tensors, or real ones."""
import json, weakref
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel, UNet2DConditionModel, ZImageTransformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aura_engine.klein import KleinInput, reference_tokens
from aura_engine.unet_input import UNetInput
from aura_engine.z_image import z_answer


class Peak(TorchDispatchMode):
    """`most` bytes of storages that were made while it was open and lived at the same time."""
    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if not isinstance(t, torch.Tensor): continue
            storage = t.untyped_storage()
            key, n = storage._cdata, storage.nbytes()
            if key in given or key in self.known: continue
            self.known.add(key)
            self.now += n
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.gone, key, n)
        return out

    def gone(self, key, n):
        self.now -= n
        self.known.discard(key)


def peak_of(call, *modes):
    """The `most` of one call."""
    counting = Peak()
    with torch.no_grad():
        if modes:
            with modes[0], counting: call()
        else:
            with counting: call()
    return counting.most


@contextmanager
def made_in(dtype):
    """New modules have this type: a fake module cannot be converted."""
    torch.set_default_dtype(dtype)
    try: yield
    finally: torch.set_default_dtype(torch.float32)


KLEIN_4B = dict(in_channels=128, num_layers=5, num_single_layers=20, attention_head_dim=128, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False)
XL_UNET = dict(block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10),
               down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True)


def klein_call(net, side, dtype):
    h = side // 16
    picture = torch.zeros(1, 128, h, h, dtype=dtype)
    given = KleinInput(picture, torch.ones(1, dtype=dtype), torch.zeros(1, 512, 7680, dtype=dtype), *reference_tokens((picture,)))
    return lambda: given.call(net)


def z_call(net, side, dtype):
    h = side // 8
    given = torch.zeros(1, 16, h, h, dtype=dtype), torch.ones(1, dtype=dtype), torch.zeros(1, 512, 2560, dtype=dtype), torch.full((1,), 512)
    return lambda: z_answer(net, *given)


def unet_call(net, side, dtype):
    h = side // 8
    given = UNetInput(torch.zeros(1, 4, h, h, dtype=dtype), torch.ones(1), torch.zeros(1, 77, net.config.cross_attention_dim, dtype=dtype))
    return lambda: given.call(net)


def vae_call(net, side, dtype):
    z = torch.zeros(1, 32, side // 8, side // 8, dtype=dtype)
    return lambda: net.decode(z, return_dict=False)


REAL = (("klein", lambda: Flux2Transformer2DModel(**KLEIN_4B), klein_call, (1024, 512)), ("Z-Image", lambda: ZImageTransformer2DModel(n_layers=2), z_call, (1024, 512)),
        ("SD 1.5", lambda: UNet2DConditionModel(cross_attention_dim=768), unet_call, (512, 768)), ("SDXL", lambda: UNet2DConditionModel(**XL_UNET), unet_call, (1024,)),
        ("VAE", AutoencoderKLFlux2, vae_call, (1024, 512)))


def real_rows(dtype=torch.bfloat16):
    """(name, side, bytes counted, configuration) of one row through each real network. Its weights are fake and take no memory."""
    for name, make, calling, sides in REAL:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, made_in(dtype): net = make().eval()
        for side in sides:
            with fake: call = calling(net, side, dtype)
            yield name, side, peak_of(call, fake), dict(net.config)


QWEN_4B = dict(model_type="qwen3", vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
VAE_16 = dict(latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
              scaling_factor=0.3611, shift_factor=0.1159, sample_size=1024)
PUBLISHED = {
    "flux2-klein": ("Flux2KleinPipeline", "Flux2Transformer2DModel", KLEIN_4B, "Qwen3ForCausalLM", "AutoencoderKLFlux2", {"sample_size": 1024}),
    "z-image-turbo": ("ZImagePipeline", "ZImageTransformer2DModel", {}, "Qwen3Model", "AutoencoderKL", VAE_16)}


def real_configs(folder, row):
    """The folder with the configurations of a published model, and without its weights."""
    pipeline, net, settings, encoder, vae, of_vae = PUBLISHED[row]
    index = {"_class_name": pipeline, "is_distilled": True, "transformer": ["diffusers", net], "vae": ["diffusers", vae], "text_encoder": ["transformers", encoder],
             "tokenizer": ["transformers", "Qwen2Tokenizer"], "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    files = {"model_index.json": index, "transformer/config.json": {"_class_name": net, **settings}, "vae/config.json": {"_class_name": vae, **of_vae}, "text_encoder/config.json": QWEN_4B}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder
