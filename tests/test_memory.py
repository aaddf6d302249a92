"""Memory: predicted before weights are read, refused with numbers, and text encoders and transformers held in less of it."""
import importlib.util, re, shutil

import gguf
import modelhub
import peak
import pytest
import tiny
import tiny_flow
import torch
from diffusers import Flux2Transformer2DModel, GGUFQuantizationConfig, ZImageTransformer2DModel
from safetensors.torch import load_file
from test_flow import PHOTO, drawn, run
from aura_engine.config import load_settings
from aura_engine.engine import Engine
from aura_engine.klein import KleinInput, reference_tokens
from aura_engine.loader import load, model_sizes
from aura_engine.memory import GIB, Choice, need_of, net_row
from aura_engine.models import EMBEDDED, KLEIN, ROWS
from aura_engine.planning import plan
from aura_engine.trajectory import TextCache, Trajectory, advance, decode_latents
from aura_engine.types import GenerateRequest, Invalid, ModelError


@pytest.fixture(scope="module", params=["flux2-klein", "z-image-turbo"])
def folder(request, tmp_path_factory): return tiny_flow.save(tmp_path_factory.mktemp(request.param) / "model", request.param)


def read(folder, **settings): return load(load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu", **settings))


def bytes_in(*modules): return sum(p.numel() * p.element_size() for m in modules for p in m.parameters() if not p.is_meta)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_weights_are_those_that_are_loaded(folder, precision):
    parts = read(folder, SD_PRECISION=precision)
    assert parts.need.weights["net"] == bytes_in(parts.unet) and parts.need.weights["text_encoder"] == bytes_in(parts.text_encoders[0])
    assert parts.need.weights["vae"] == bytes_in(parts.vae)


def test_the_weights_of_a_unet_are_counted_the_same_way():
    parts = load(load_settings(SD_MODEL_ID="embedded", SD_DEVICE="cpu"))
    assert sum(parts.need.weights.values()) == bytes_in(parts.unet, parts.vae, *parts.text_encoders)
    assert model_sizes(EMBEDDED, ROWS["embedded"], gpu=False).side == 128


def test_the_work_is_what_a_real_call_holds():
    """Real tensors this time, in a size that takes a moment: what lives at once is what the formula says."""
    net = Flux2Transformer2DModel(**{**peak.KLEIN_4B, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 8, "joint_attention_dim": 512}).bfloat16().eval()
    picture = torch.zeros(1, 128, 16, 16, dtype=torch.bfloat16)
    given = KleinInput(picture, torch.ones(1, dtype=torch.bfloat16), torch.zeros(1, 512, 512, dtype=torch.bfloat16), *reference_tokens((picture,)))
    counted, predicted = peak.peak_of(lambda: given.call(net)), 2 * net_row(KLEIN, net.config, 256)
    assert counted <= 1.05 * predicted < 1.5 * counted


def test_what_does_not_fit_is_refused_before_weights_are_read(folder, tmp_path):
    """With numbers and with what would fit. The weights are noise here: whoever read them would say so."""
    shutil.copytree(folder, tmp_path / "model")
    for file in tmp_path.rglob("*.safetensors"): file.write_bytes(b"noise")
    need = need_of(model_sizes(folder, None, gpu=False), Choice(4))
    with pytest.raises(ModelError) as told: read(tmp_path / "model", SD_PRECISION="fp32", SD_TEXT_ENCODER="device", SD_MEMORY=str((need.peak() - 1) / GIB))
    said = str(told.value)
    assert need.said() in said and "SD_TEXT_ENCODER=release needs" in said and "SD_MEMORY=0" in said
    with pytest.raises(ModelError, match="no setting makes it fit"): read(tmp_path / "model", SD_MEMORY="0.000001")
    with pytest.raises(ModelError, match="damaged|no safetensors"): read(tmp_path / "model", SD_MEMORY="0")


def test_real_sizes_are_refused_by_their_configurations(tmp_path):
    sizes = model_sizes(peak.real_configs(tmp_path, "z-image-turbo"), ROWS["z-image-turbo"], gpu=True)
    counts = {name: count.numbers for name, count in sizes.counts.items()}
    assert round(counts["net"] / 1e9, 2) == 6.15 and sizes.side == 1024
    assert need_of(sizes, Choice(2), cuda=True).peak() > 20 * GIB > need_of(sizes, Choice(2, "release", 8), cuda=True).peak() * 2


def test_a_hub_is_not_asked_for_weights_that_will_not_fit(tmp_path):
    hub, worker = modelhub.shared()
    hub.calm()
    hub.repos, hub.token = {"tester/small": modelhub.files_of(tiny.save(tmp_path / "model"))}, None
    answer = worker("load", tmp_path / "cache", SD_MODEL_ID="tester/small", SD_MEMORY="0.0001")
    assert "SD_MEMORY=0 loads it" in str(answer) and not [path for path in hub.counts("/resolve/") if path.endswith(".safetensors")]


def test_what_is_left_open_is_chosen_so_that_it_fits(folder):
    whole = read(folder).need
    parts = read(folder, SD_PRECISION="fp32", SD_MEMORY=str((whole.peak() - 1) / GIB))
    assert parts.held.encoder == "release" and any("was chosen" in note for note in parts.notes)
    assert parts.need.peak() < whole.peak() and whole.most(whole.peak(), 16) < 16


def test_rows_of_a_call_are_bounded_by_what_fits(folder):
    whole = read(folder).need
    memory = whole.peak(16) - 1
    most = whole.most(memory, 16)
    settings = load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu", SD_PRECISION="fp32", SD_TEXT_ENCODER="device", SD_MEMORY=str(memory / GIB))
    with Engine(settings).start() as engine:
        assert engine.wait_ready(120), engine.reason
        assert max(engine.cost.step(engine.cost.native)) <= engine.parts.most_rows == most * whole.rows < 16
        health = engine.health()
        assert health.memory["predicted"] == whole.peak() and any(f"up to {most * whole.rows} rows" in w for w in health.warnings)
        assert len(engine.submit(plan(GenerateRequest(prompt="a fox", n=3, steps=2), engine.row)).result(120)) == 3


def picture_of(parts, **how):
    t = run(parts, drawn(parts, **how))
    return t.latents, decode_latents(parts, t.latents)[0]


def test_an_encoder_in_its_files_draws_the_same_picture(folder):
    """To the byte. Its weights are never in memory between prompts, and a prompt that is known reads nothing."""
    usual, away = read(folder), read(folder, SD_TEXT_ENCODER="release")
    assert bytes_in(*away.text_encoders) == 0 < bytes_in(*usual.text_encoders)
    for how in (dict(), dict(init=PHOTO, size=(96, 128), steps=8, strength=1.0)):
        (mine, picture), (theirs, other) = picture_of(away, **how), picture_of(usual, **how)
        assert torch.equal(mine, theirs) and picture.tobytes() == other.tobytes()
    assert bytes_in(*away.text_encoders) == 0 and "in its files" in " ".join(away.optimizations)
    texts = TextCache(away)
    Trajectory(away, drawn(away), texts)
    away.text_encoders[0].forward = None                        # whoever calls it now fails
    Trajectory(away, drawn(away, seed=4), texts)


def test_an_encoder_in_half_precision_beside_a_whole_transformer(folder):
    """As on a CPU beside a GPU: what it answers goes to the transformer's type."""
    parts = read(folder)
    parts.text_encoders[0].bfloat16()
    exact, _ = picture_of(read(folder))
    rounded, _ = picture_of(parts)
    assert 0 < (exact - rounded).abs().max() < 0.5 and rounded.dtype == torch.float32


def written(folder, at, kind=gguf.GGMLQuantizationType.Q8_0):
    """The transformer of a folder as a GGUF file: what can be in blocks of 32 is."""
    writer = gguf.GGUFWriter(at, "flux")
    for name, tensor in load_file(folder / "transformer/diffusion_pytorch_model.safetensors").items():
        blocks = tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and "pad_token" not in name
        values = tensor.float().numpy()
        writer.add_tensor(name, gguf.quants.quantize(values, kind) if blocks else values, raw_dtype=kind if blocks else gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return at


def dequantised(folder, file):
    cls = Flux2Transformer2DModel if "klein" in str(folder) else ZImageTransformer2DModel
    return cls.from_single_file(str(file), config=str(folder), subfolder="transformer", dtype=torch.float32, quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32))


def test_memory_that_cannot_be_predicted_is_told(folder, monkeypatch):
    """The model is loaded all the same, as the settings say, and a warning has the reason."""
    def fails(*_): raise KeyError("hidden_size")
    monkeypatch.setattr("aura_engine.loader.model_sizes", fails)
    parts = read(folder, SD_TEXT_ENCODER="release")
    assert any("memory was not predicted" in note and "hidden_size" in note for note in parts.notes)
    assert bytes_in(*parts.text_encoders) == 0 and "in its files" in " ".join(parts.optimizations)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_gguf_file_draws_what_diffusers_draws_with_it(folder, tmp_path, kind):
    file = written(folder, tmp_path / "net.gguf", gguf.GGMLQuantizationType[kind])
    exact, parts = read(folder), read(folder, SD_NET_ID=str(file))
    quantised, _ = picture_of(parts)
    exact.unet, plain = dequantised(folder, file), picture_of(exact)[0]
    stock, _ = picture_of(exact)
    assert torch.equal(quantised, stock) and 0 < (quantised - plain).abs().max()
    many = [drawn(parts, steps=steps, seed=steps) for steps in (4, 6, 8)]
    texts = TextCache(parts)
    crowd = [Trajectory(parts, p, texts) for p in many]
    while waiting := [t for t in crowd if not t.done]: advance(waiting, parts.unet)
    assert max((t.latents - run(parts, p).latents).abs().max() for t, p in zip(crowd, many)) <= 1e-5
    assert bytes_in(parts.unet) < bytes_in(read(folder).unet)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao: pip install 'aura-engine[quant]'")
def test_eight_bits_draw_what_diffusers_draws_with_them(folder):
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig
    exact, parts = read(folder), read(folder, SD_QUANT="int8")
    cls = type(exact.unet)
    exact.unet = cls.from_pretrained(folder / "transformer", dtype=torch.float32, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    assert torch.equal(picture_of(parts)[0], picture_of(exact)[0]) and not torch.equal(picture_of(parts)[0], picture_of(read(folder))[0])


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao: pip install 'aura-engine[quant]'")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_eight_bits_in_company(folder, precision):
    """Mixed calls are each alone: to the bit in calls of one size, closely in calls of other sizes."""
    parts = read(folder, SD_QUANT="int8", SD_PRECISION=precision)
    many = [drawn(parts, steps=steps, seed=steps) for steps in (4, 6, 8)]
    for rows in (8, 0):
        crowd = [Trajectory(parts, p, TextCache(parts)) for p in many]
        while waiting := [t for t in crowd if not t.done]: advance(waiting, parts.unet, rows)
        gap = max((t.latents - run(parts, p, rows).latents).abs().max() for t, p in zip(crowd, many))
        assert gap == 0 if rows or precision == "bf16" else gap <= 1e-5


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is here")
def test_a_missing_package_is_named(folder):
    with pytest.raises(ModelError, match=re.escape("pip install 'aura-engine[quant]'")): read(folder, SD_QUANT="int8")


def test_what_is_no_gguf_is_named(folder):
    with pytest.raises(ModelError, match="is no GGUF file"): read(folder, SD_NET_ID=str(folder / "transformer/diffusion_pytorch_model.safetensors"))
    with pytest.raises(ModelError, match="no such file"): read(folder, SD_NET_ID="./nowhere.gguf")


@pytest.mark.parametrize("setting", [dict(SD_TEXT_ENCODER="release"), dict(SD_QUANT="int8"), dict(SD_NET_ID="./x.gguf")])
def test_settings_of_transformers_are_refused_for_a_unet(setting):
    with pytest.raises(Invalid, match=next(iter(setting))): load(load_settings(SD_MODEL_ID="embedded", SD_DEVICE="cpu", **setting))
