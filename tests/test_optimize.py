"""Every optimisation applies, can be undone or says why not, and draws the picture that the plain model draws."""
import os, re, subprocess, sys, time
from copy import deepcopy
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

import tiny
from aura_engine import compiling, loader, packing, precision, static_graphs
from aura_engine import optimize as opt
from aura_engine.config import load_settings
from aura_engine.engine import Engine
from aura_engine.loader import load
from aura_engine.trajectory import TextCache, Trajectory, advance, decode_latents
from aura_engine.types import ModelError, Picture, Plan

APPLE = Picture("a red apple", 128, 128, steps=3, guidance_scale=1.0, seed=3, temperature=1.0)
NO_OPENVINO = "openvino is not installed: pip install 'aura-engine[openvino]'"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Converted models go to one folder for the whole run, not to the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def small(tmp_path_factory): return str(tiny.save(tmp_path_factory.mktemp("small") / "model"))


@pytest.fixture(scope="module", params=["embedded", "sd15", "sd15-lcm", "sdxl"])
def family(request, tmp_path_factory):
    if request.param == "embedded": return request.param, "embedded"
    return request.param, str(tiny.save(tmp_path_factory.mktemp(request.param) / "model", request.param))


def parts_of(model, plain=False, **how):
    settings = load_settings(**{"SD_MODEL_ID": model, "SD_DEVICE": "cpu", "SD_BACKEND": "torch", "SD_PRECISION": "fp32"} | how)
    return load(settings) if plain else opt.optimize(load(settings), settings)


def picture(parts, p=APPLE, rows=0):
    t = Trajectory(parts, p, TextCache(parts))
    while not t.done: advance([t], parts.unet, rows)
    return t.latents, np.asarray(decode_latents(parts, t.latents)[0], int)


def same(one, two):
    """fp32 by another route: no value off by more than one."""
    gap = np.abs(one[1] - two[1])
    assert gap.max() <= 1 and (gap > 0).mean() < 1e-3
    assert (one[0] - two[0]).abs().max() < 2e-3 * two[0].abs().max()


def test_packed_weights_draw_the_same_picture(family):
    fast, plain = parts_of(family[1]), parts_of(family[1], plain=True)
    assert any("packed" in o for o in fast.optimizations) and fast.backend == "torch"
    for p in (APPLE, replace(APPLE, guidance_scale=3.0, width=192)) if family[0] != "embedded" else (APPLE,): same(picture(fast, p), picture(plain, p))
    layers = [m for m in fast.unet.modules() if isinstance(m, packing.Packed)]
    assert layers and any(m.packed is not None and m._parameters["weight"] is None for m in layers)         # one copy


def test_packed_weights_survive_what_is_done_to_models():
    fast, plain = parts_of("embedded").unet, parts_of("embedded", plain=True).unet
    x = torch.randn(2, 12, 16, 16), torch.full((2,), 500.0), torch.randn(2, 48, plain.config.cross_attention_dim)
    with torch.inference_mode():
        want = plain(*x).sample
        for model in (fast, deepcopy(fast), fast.double().float()): assert torch.allclose(model(*x).sample, want, atol=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(fast.state_dict().values(), plain.state_dict().values(), strict=True))
        fast(*x)
        packing.unpack(fast)
        assert not any(isinstance(m, packing.Packed) for m in fast.modules()) and torch.allclose(fast(*x).sample, want, atol=1e-4)


def test_a_layer_that_cannot_be_packed_runs_as_it_was(monkeypatch):
    odd = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), torch.nn.Conv2d(4, 4, 3, padding="same"), torch.nn.Conv2d(4, 4, 3)).requires_grad_(False)
    assert packing.pack(odd) == 1
    monkeypatch.setattr(packing.PackedConv2d, "arrange", lambda self, w, x: torch.ops.mkldnn._reorder_convolution_weight(w.int(), *self.geometry(), None))
    assert odd(torch.randn(1, 4, 8, 8)).shape == (1, 4, 6, 6) and type(odd[2]) is torch.nn.Conv2d


def test_packed_calls_of_other_sizes_agree():
    fast = parts_of("embedded")
    same(picture(fast, rows=16), picture(fast))


def test_a_doubling_and_its_convolution_are_one_layer(family):
    """Both kinds of decoder, at a latent size that no halving divides. A layer that only looks like it is left alone."""
    plain, fast = parts_of(family[1], plain=True), parts_of(family[1])
    assert any(o.startswith("doubling") for o in fast.optimizations)
    layers = [m for m in fast.vae.decoder.modules() if isinstance(m, torch.nn.ConvTranspose2d)]
    z = torch.randn(2, plain.vae.config["latent_channels"], 7, 9)
    with torch.inference_mode(): one, two = fast.vae.decode(z).sample, plain.vae.decode(z).sample
    assert layers and one.shape == two.shape and (one - two).abs().max() < 1e-3 * two.abs().max()
    others = torch.nn.Sequential(torch.nn.Upsample(scale_factor=2), torch.nn.Conv2d(4, 4, 3, stride=2, padding=1), torch.nn.Upsample(scale_factor=2), torch.nn.Conv2d(4, 4, 1),
                                 torch.nn.Upsample(scale_factor=2, mode="bilinear"), torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Upsample(scale_factor=3), torch.nn.Conv2d(4, 4, 3, padding=1))
    assert packing.double_once(others) == 0


@pytest.mark.parametrize("side", [(8, 8), (9, 7), (10, 6)])
def test_openvino_graphs_double_only_what_is_doubled(openvino, small, side):
    import openvino as ov
    unet = load(load_settings(SD_MODEL_ID=small, SD_DEVICE="cpu")).unet
    names = static_graphs.input_names(unet.config)
    inputs = [torch.randn(1, *x.shape[1:]) if x.ndim < 4 else torch.randn(1, x.shape[1], *side) for x in static_graphs.example_inputs(unet, names)]
    results, graph = [], opt.convert(unet, names, [])
    for changed in (False, True):
        g = graph.clone()
        g.reshape({n: ov.PartialShape(list(x.shape)) for n, x in zip(names, inputs)})
        if changed: assert static_graphs.double_graph(g) == int(not any(n % 2 for n in side))
        results.append(ov.Core().compile_model(g, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "SNIPPETS_MODE": "DISABLE"})([x.numpy() for x in inputs])[0].copy())
    assert np.abs(results[0] - results[1]).max() < 1e-4 * np.abs(results[0]).max()


def test_compiling_on_a_cpu_is_declined_unless_forced():
    parts = parts_of("embedded", TORCH_COMPILE="1")
    assert any(o.startswith("declined: torch.compile") and "force" in o for o in parts.optimizations) and not isinstance(parts.unet, compiling.CompiledUNet)
    forced = parts_of("embedded", TORCH_COMPILE="force")
    assert isinstance(forced.unet, compiling.CompiledUNet) and any("forced" in o for o in forced.optimizations)
    assert opt.bytes_of(forced) == opt.bytes_of(parts) > 10 ** 7                             # what CUDA graphs ask of a compiled one


def test_no_recompiles_after_the_warm_up(small):
    """Counted by torch: one graph a shape while warming up, none afterwards, whatever the strides and the sampler's timestep."""
    parts = parts_of(small, plain=True)
    plain = picture(parts)
    parts.unet = compiling.CompiledUNet(parts.unet, backend="eager")
    counters.clear()
    for rows in (1, 2, 4): picture(parts, rows=rows)
    made = counters["stats"]["unique_graphs"]
    opt.seal(parts)
    for rows in (4, 1, 3, 8, 2): same(picture(parts, replace(APPLE, seed=3), rows), plain)
    assert made == 3 == counters["stats"]["unique_graphs"]


def test_where_there_is_no_compiler_it_runs_without(small, monkeypatch, tmp_path):
    """torch's own compiler, on a machine without a C++ compiler: the same picture, eagerly, and a warning for /health."""
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plain = parts_of(small, plain=True)
    parts = parts_of(small, TORCH_COMPILE="force", SD_BACKEND="torch")
    same(picture(parts), picture(plain))
    same(picture(parts, rows=2), picture(plain))
    told = [n for n in parts.notes if "TORCH_COMPILE" in n]
    assert len(told) == 1 and "InvalidCxxCompiler" in told[0]
    assert compiled_of(parts.unet).failed


def compiled_of(unet):
    """The compiled UNet, whatever is around it."""
    return unet if isinstance(unet, compiling.CompiledUNet) else unet.unet


def test_memory_that_runs_out_is_not_a_compiler_that_fails(small):
    parts = parts_of(small, plain=True)
    def full(graph, inputs): return lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory"))
    parts.unet = compiling.CompiledUNet(parts.unet, parts.notes.append, backend=full)
    with pytest.raises(torch.OutOfMemoryError): picture(parts)
    assert not parts.unet.failed and not parts.notes


def test_a_gpu_is_believed_when_a_kernel_has_run(monkeypatch):
    """As with a driver that is too old: the card is counted, and the first kernel fails."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if torch.cuda.is_available(): pytest.skip("this machine has a GPU that works")
    device, notes = loader.pick_device("auto")
    assert device.type == "cpu" and len(notes) >= 1 and "cuda:0 does not work" in notes[0] and torch.__version__ in notes[0] and "NVIDIA driver" in notes[0]
    with pytest.raises(ModelError, match=f"SD_DEVICE=cuda: cuda:0 does not work.*{re.escape(torch.__version__)}"): loader.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ModelError, match="this machine has cpu.*torch.*NVIDIA driver"): loader.pick_device("cuda")


def test_the_drivers_version_is_read_from_the_kernel_module(tmp_path):
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC version: 12.2.0\n")
    assert loader.nvidia_driver(tmp_path / "version") == "535.183.01" and loader.nvidia_driver(tmp_path / "none") is None


def test_auto_precision_is_measured_and_only_for_large_models(monkeypatch):
    gain = precision.bf16_gain()
    assert gain == 0 or gain > 0.2
    assert parts_of("embedded", SD_PRECISION="auto").precision == "fp32"
    monkeypatch.setattr(opt, "SMALL", 1000)
    parts = parts_of("embedded", SD_PRECISION="auto")
    assert (parts.precision == "bf16") == (gain >= 1.2) and (parts.unet.dtype == torch.bfloat16) == (gain >= 1.2)
    assert any("bf16" in o for o in parts.optimizations)
    assert np.abs(picture(parts)[1] - picture(parts_of("embedded"))[1]).mean() < 6
    assert parts_of("embedded", SD_PRECISION="fp32").precision == "fp32"                     # what is asked for stays


def test_threads_follow_the_container(tmp_path):
    quota = tmp_path / "cpu.max"
    most = precision.cpu_limit(tmp_path / "missing")
    for text, want in (("max 100000", most), ("100000 100000", 1), ("150000 100000", min(2, most)), ("nonsense", most)):
        quota.write_text(text)
        assert precision.cpu_limit(quota) == want


@pytest.mark.parametrize("given, spins", [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)])
def test_threads_that_wait_leave_the_core_to_others(given, spins):
    """Set before torch is imported, which reads it once. What the user says counts."""
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | given
    code = "import aura_engine, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.split() == [str(spins), "False"]


def test_openvino_without_the_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(opt, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"aura-engine\[openvino\]"): parts_of("embedded", SD_BACKEND="openvino")
    assert parts_of("embedded", SD_BACKEND="auto").backend == "torch"


@pytest.fixture
def openvino(): return pytest.importorskip("openvino", reason=NO_OPENVINO)


def test_openvino_draws_the_same_picture(openvino, family):
    """fp32, every family, also guided and at a latent size that does not halve evenly (152 pixels are 19)."""
    fast, plain = parts_of(family[1], SD_BACKEND="openvino"), parts_of(family[1], plain=True)
    assert fast.backend == "openvino" and any("OpenVINO" in o for o in fast.optimizations)
    more = (replace(APPLE, guidance_scale=3.0, width=152, height=104),) if family[0] != "embedded" else ()
    for p in (APPLE, *more): same(picture(fast, p), picture(plain, p))
    photo = decode_latents(plain, picture(plain)[0])[0]
    refined = replace(APPLE, init=photo, strength=0.5)
    same(picture(fast, refined), picture(plain, refined))


@pytest.fixture
def graphs_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "aura_engine" / "openvino"


def files_in(graphs_cache): return {f: f.stat().st_ino for f in graphs_cache.glob("*/graph.*")}


def test_openvino_saves_its_graph_and_compiles_each_shape_once(openvino, small, graphs_cache, monkeypatch):
    one = parts_of(small, SD_BACKEND="openvino")
    files = files_in(graphs_cache)
    assert len(files) == 6                                                                   # UNet and VAE decoder, three files each
    monkeypatch.setattr(openvino, "convert_model", lambda *a, **k: pytest.fail("converted again"))
    two = parts_of(small, SD_BACKEND="openvino")
    assert files_in(graphs_cache) == files and not two.notes
    assert np.array_equal(picture(one)[1], picture(two)[1]) and two.unet.graphs.compiles == 1
    weights = min(graphs_cache.glob("*/graph.bin"), key=lambda f: f.stat().st_size)
    size = weights.stat().st_size
    weights.unlink()                                                                         # the running model still reads it
    weights.write_bytes(bytes(size))                                                         # what a power cut leaves
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(graphs_cache.parents[1]))
    three = parts_of(small, SD_BACKEND="openvino")
    assert three.backend == "openvino" and three.notes == [static_graphs.DAMAGED]
    assert np.array_equal(picture(one)[1], picture(three)[1])
    two.unet.graphs.held.keep = 2
    for rows in (2, 3, 2, 3): picture(two, rows=rows)
    assert two.unet.graphs.compiles == 3 and len(two.unet.graphs.held) == 2


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    """An OpenVINO model of 4 KB of weights: what is saved and read need not be a UNet."""
    ov = pytest.importorskip("openvino", reason=NO_OPENVINO)
    from openvino import opset13 as op
    x = op.parameter([-1, 32], np.float32)
    model = ov.Model([op.matmul(x, op.constant(np.random.default_rng(0).normal(size=(32, 32)).astype("float32")), False, False)], [x])
    model.inputs[0].get_tensor().set_names({"z"})
    return model


@pytest.mark.parametrize("damage", ["half zeros", "cut", "empty", "no digest", "no weights", "a pipe", "a folder", "a file", "a loop"])
def test_a_damaged_graph_is_deleted_and_told(little, tmp_path, damage):
    """Power cuts and full disks leave such files."""
    saved = tmp_path / "a"
    static_graphs.save_graph(little, saved)
    assert static_graphs.read_graph(saved, notes := []) is not None and not notes
    weights = saved / "graph.bin"
    data = weights.read_bytes()
    if damage == "half zeros": weights.write_bytes(data[:len(data) // 2] + bytes(len(data) - len(data) // 2))
    elif damage == "cut": weights.write_bytes(data[:100])
    elif damage == "empty": (saved / "graph.xml").write_bytes(b"")
    elif damage == "no digest": (saved / "graph.sha256").unlink()
    elif damage in ("a pipe", "a folder"):
        (saved / "graph.sha256").unlink()
        os.mkfifo(saved / "graph.sha256") if damage == "a pipe" else (saved / "graph.sha256").mkdir()
    elif damage in ("a file", "a loop"):
        saved.rename(tmp_path.with_name(f"{tmp_path.name} kept"))
        saved.write_bytes(data) if damage == "a file" else saved.symlink_to(saved)
    else: weights.unlink()
    assert static_graphs.read_graph(saved, notes) is None
    assert notes == ["a saved OpenVINO graph was damaged; it was deleted and made again"] and list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_of_a_graph(openvino, little, tmp_path, monkeypatch):
    """It fills up in the middle of the weights. In one way that is an error, in another the file just ends."""
    save = openvino.save_model
    def ends(model, path, **how):
        save(model, path, **how)
        os.truncate(path.with_suffix(".bin"), 1000)
    def fails(model, path, **how):
        ends(model, path, **how)
        raise RuntimeError("No space left on device")
    for full in (ends, fails):
        monkeypatch.setattr(openvino, "save_model", full)
        with pytest.raises((OSError, RuntimeError)): static_graphs.save_graph(little, tmp_path / "a")
        assert list(tmp_path.iterdir()) == []                                                # not even the part that filled it


def test_a_cache_that_cannot_be_written_costs_speed_and_not_the_start(openvino, small, tmp_path, monkeypatch):
    monkeypatch.setattr(static_graphs, "cache_folder", lambda: tmp_path / "a file")
    (tmp_path / "a file").write_text("")
    parts = parts_of(small, SD_BACKEND="openvino")
    assert parts.backend == "openvino" and parts.notes == ["a converted OpenVINO graph could not be saved; every start converts it again"]


def test_the_cache_of_graphs_is_bounded(tmp_path):
    """By number, bytes and age. A pair stays. Files of the flat layout, which nothing reads any more, and dead parts go."""
    month = 31 * 24 * 3600
    for name, age in {"a": 0, "b": 100, "c": 500, "d": 1000, "e": month, "part-dead": 7200, "part-alive": 0}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "graph.bin").write_bytes(bytes(1000))
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    for name in ("old.bin", "old.xml", "new.bin"): (tmp_path / name).write_bytes(bytes(10))
    for name in ("old.bin", "old.xml"): os.utime(tmp_path / name, (0, 0))
    there = lambda: "".join(sorted(d.name for d in tmp_path.iterdir() if static_graphs.Stored(d, 0, 0).is_graph))
    gone = static_graphs.tidy(tmp_path)
    assert there() == "abcd" and {d.path.name for d in gone} == {"e", "old.bin", "old.xml", "part-dead"} and (tmp_path / "part-alive").exists()
    static_graphs.tidy(tmp_path, room=3000)
    assert there() == "abc"
    static_graphs.tidy(tmp_path, keep=1, room=0)
    assert there() == "ab" and static_graphs.tidy(tmp_path / "none") == []


def test_of_two_servers_that_save_the_first_ones_graph_stays(little, tmp_path):
    """Both had begun to convert. Nobody ever sees a half-written graph, because it gets its name when it is complete."""
    seen = []
    for _ in range(2):
        static_graphs.save_graph(little, tmp_path / "a")
        seen.append({f: f.stat().st_ino for f in tmp_path.rglob("*")})
    assert seen[0] == seen[1] and len(seen[0]) == 4 and static_graphs.is_whole_graph(tmp_path / "a")


def calls_of(n): return [torch.randn(1 + k, 32) for k in range(n)]


def test_strange_shapes_after_the_warm_up_compile_nothing(little):
    """Seventeen shapes, one call each, run on the graph that takes all shapes, and agree with their own ones."""
    graphs, calls = static_graphs.Graphs(little, ("z",)), calls_of(17)
    graphs.seal()
    answers = [graphs(call) for call in calls]
    assert graphs.compiles == 0 and len(graphs.held) == 0
    graphs.sealed = False
    assert (graphs(calls[5]) - answers[5]).abs().max() < 1e-4 and graphs.compiles == 1


def test_a_shape_that_comes_often_gets_a_graph_beside_serving(little):
    """One at a time: while another one is compiled, calls go on as they were."""
    graphs, (call,) = static_graphs.Graphs(little, ("z",)), calls_of(1)
    graphs.seal()
    graphs.compiles, graphs.seconds = 1, 1e-9                                                # as if compiling cost nothing
    with static_graphs.COMPILING: graphs(call)
    assert len(graphs.held) == 0
    graphs(call)
    with static_graphs.COMPILING: assert len(graphs.held) == 1 and graphs.compiles == 2


def test_graphs_are_bounded_by_the_memory_of_the_container(tmp_path):
    limit = tmp_path / "memory.max"
    for text, most in (("1000000", 1_000_000), ("max", None), ("", None)):
        limit.write_text(text)
        assert static_graphs.memory_limit((limit, tmp_path / "no such file")) == (most or psutil.virtual_memory().total)


def test_openvino_graph_belongs_to_the_weights(openvino):
    unet = parts_of("embedded", plain=True).unet
    names, before = static_graphs.input_names(unet.config), static_graphs.fingerprint(unet)
    assert before == static_graphs.fingerprint(deepcopy(unet)) and before != static_graphs.fingerprint(unet, names)
    unet.conv_in.weight.mul_(1.001)
    assert static_graphs.fingerprint(unet) != before


def test_openvino_calls_of_other_sizes_agree(openvino):
    """The backend's published tolerance: in f32 as torch's, in bf16 a few values of 255 on average."""
    fast = parts_of("embedded", SD_BACKEND="openvino")
    same(picture(fast, rows=8), picture(fast))
    if not opt.has_bf16(): pytest.skip("this CPU has no bf16 instructions")
    half = parts_of("embedded", SD_BACKEND="openvino", SD_PRECISION="bf16")
    assert np.abs(picture(half)[1] - picture(fast)[1]).mean() < 6
    assert np.array_equal(picture(half, rows=2)[1], picture(half, rows=2)[1])                # the same call, the same picture


def test_a_technique_that_fails_is_left_out(openvino, monkeypatch):
    """A conversion that breaks: torch goes on under auto and says so. Who asked for OpenVINO is told in a sentence."""
    def broken(*a, **k): raise RuntimeError("from the library")
    monkeypatch.setattr(opt, "convert", broken)
    parts = parts_of("embedded", SD_BACKEND="auto")
    assert parts.backend == "torch" and any(o.startswith("declined: OpenVINO") for o in parts.optimizations) and any("packed" in o for o in parts.optimizations)
    same(picture(parts), picture(parts_of("embedded", plain=True)))
    with pytest.raises(ModelError, match="could not be converted"): parts_of("embedded", SD_BACKEND="openvino")


def test_openvino_is_not_taken_where_it_does_not_fit(openvino, monkeypatch):
    with pytest.raises(ModelError, match="SD_LORAS"): parts_of("embedded", SD_BACKEND="openvino", SD_LORAS="a=b")
    monkeypatch.setattr(opt, "SMALL", 1000)
    monkeypatch.setattr(opt, "was_saved", lambda parts: False)
    parts = parts_of("embedded", SD_BACKEND="auto")
    assert parts.backend == "torch" and any(o.startswith("declined: OpenVINO") for o in parts.optimizations)


def test_what_cannot_be_recorded_as_a_cuda_graph_runs_without(small, caplog):
    """Here without a GPU. The third call is made as the first."""
    parts = parts_of(small, plain=True)
    plain = picture(parts)
    parts.unet = compiling.GraphedUNet(parts.unet)
    for _ in range(3): same(picture(parts), plain)
    assert caplog.text.count("could not be recorded") == 1 and set(parts.unet.recordings.recorded.values()) == {None}
    parts.unet.forget()
    assert not parts.unet.recordings.recorded and parts.unet.dtype == torch.float32


def test_a_half_precision_overflow_is_decoded_again_and_told(tmp_path):
    """A real VAE whose first decoder weights are large: finite in fp32, infinite in fp16. The picture is that of fp32. The answer, its receipt and /health say what happened."""
    folder = tiny.save(tmp_path / "model")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_in.weight"] *= 1e5                         # still numbers of fp16, their sums are not; the norms that follow take it out again
    save_file(weights, file, {"format": "pt"})
    p = replace(APPLE, seed=5)
    with Engine(load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu", SD_BACKEND="torch", SD_PRECISION="fp32", AURA_MAX_BATCH="1")).start() as engine:
        assert engine.wait_ready(120), engine.reason
        fine = engine.submit(Plan((p,)))
        want = np.asarray(fine.result()[0].image, int)
        assert not fine.warnings and not any("fp32" in w for w in engine.health().warnings)
        engine.parts.vae.half()                                      # what CUDA does by default; here fp16 asked for runs as fp32
        z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode(): assert not torch.isfinite(engine.parts.vae.decode(z.half()).sample).all()
        job = engine.submit(Plan((p,)))
        made = job.result()[0]
        assert any("decoded again in fp32" in w for w in job.warnings) and "decoded again in fp32" in made.receipt.corrections
        assert "1 pictures had to be decoded again in fp32" in engine.health().warnings
        assert np.abs(np.asarray(made.image, int) - want).max() <= 2  # weights that went through fp16
        assert engine.parts.vae.dtype == torch.float16                # and is half again afterwards


def test_a_start_with_openvino_leaves_the_weights_in_their_file(openvino, small, monkeypatch):
    """bf16 by measurement: text encoder and VAE are rounded, the UNet is not even copied, its graph rounds it. The picture is bf16's."""
    monkeypatch.setattr(opt, "SMALL", 1000)
    monkeypatch.setattr(opt, "bf16_gain", lambda: 2.0)
    settings = load_settings(SD_MODEL_ID=small, SD_DEVICE="cpu", SD_BACKEND="openvino", SD_PRECISION="auto")
    parts = load(settings)
    unet, where = parts.unet, {k: p.data_ptr() for k, p in parts.unet.named_parameters()}
    fast = opt.optimize(parts, settings)
    assert {k: p.data_ptr() for k, p in unet.named_parameters()} == where and unet.dtype == torch.float32
    assert fast.precision == fast.unet.graphs.precision == fast.vae.decode.graphs.precision == "bf16" and fast.vae.dtype == torch.bfloat16
    assert np.abs(picture(fast)[1] - picture(parts_of(small, plain=True))[1]).mean() < 6


def test_int8_is_another_picture_of_the_same_thing(openvino):
    """NNCF, calibrated on three pictures: products in int8, and a picture nearer to fp32's than another seed's is."""
    pytest.importorskip("nncf", reason="nncf is not installed: pip install nncf")
    parts, plain = parts_of("embedded", SD_BACKEND="openvino"), picture(parts_of("embedded", plain=True))[1]
    graphs, parts.unet.graphs = parts.unet.graphs, opt.HeardGraphs(parts.unet.graphs)
    for seed in range(3): picture(parts, replace(APPLE, seed=seed))
    assert len(parts.unet.graphs.calls) == 9
    parts.unet.graphs = opt.quantize(graphs, parts.unet.graphs.calls)
    assert any(o.get_type_name() == "FakeQuantize" for o in parts.unet.graphs.model.get_ops()) and not any(o.get_type_name() == "FakeQuantize" for o in graphs.model.get_ops())
    gap = lambda p: np.abs(picture(parts, p)[1] - plain).mean()
    assert 0 < gap(APPLE) < 0.5 * gap(replace(APPLE, seed=99))
