"""Flow-matching transformers beside the UNets: latents equal to the stock pipelines, company changes nothing, and what is refused."""
import ast, base64, io, re, shutil
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import diffusers
import httpx
import nb
import numpy as np
import openai
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from typer.testing import CliRunner

import tiny_flow
from conftest import ROOT
from aura_engine.batching import StepCost
from aura_engine.cli import cli
from aura_engine.client import AuraClient
from aura_engine.config import load_settings
from aura_engine.engine import Engine
from aura_engine.families import FAMILIES, denoiser_of
from aura_engine.klein import empirical_mu
from aura_engine.loader import load
from aura_engine.masks import Inpainting, Region
from aura_engine.models import FLOW_ROWS, ROWS, last_steps
from aura_engine.optimize import can_openvino, optimize
from aura_engine.planning import ReplayRequest, plan, prepare, replay_plan
from aura_engine.runner import key_of
from aura_engine.static_graphs import saved_graph
from aura_engine.trajectory import TextCache, Trajectory, TimetableKey, advance, decode_latents, make_table
from aura_engine.transformer_graphs import conversion_peak
from aura_engine.types import GenerateRequest, Invalid, ModelError, Picture, RefineRequest

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 96, 3), dtype=np.uint8))
LONG = "many words " * 150
STOCK = {"flux2-klein": "Flux2KleinPipeline", "flux2-klein-base": "Flux2KleinPipeline", "z-image-turbo": "ZImagePipeline"}


def png(im):
    out = io.BytesIO()
    im.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


@pytest.fixture(scope="module", params=list(STOCK))
def family(request, tmp_path_factory):
    folder = tiny_flow.save(tmp_path_factory.mktemp(request.param) / "model", request.param)
    return folder, load(load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu"))


@lru_cache(3)
def pipeline(cls, folder):
    """A stock pipeline of a folder, without its progress bars."""
    pipe = getattr(diffusers, cls).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def z_image(tmp_path_factory): return load(load_settings(SD_MODEL_ID=str(tiny_flow.save(tmp_path_factory.mktemp("z") / "model", "z-image-turbo")), SD_DEVICE="cpu"))


def drawn(parts, size=(128, 128), steps=4, init=None, strength=None, prompt="a red apple", seed=3, mask=None, **more):
    """A picture as planning would make it: a refinement runs the end of its timetable, or looks and runs all."""
    run = steps if strength is None or parts.row.refine == "reference" and mask is None else last_steps(steps, strength)
    if mask is not None: more["inpainting"] = Inpainting(init, mask, Region(0, 0, *init.size))
    return Picture(prompt, *size, steps=run, steps_asked=steps, guidance_scale=parts.row.guidance[1], seed=seed, temperature=1.0, init=init, strength=strength, **more)


def run(parts, p, bucket=0):
    t = Trajectory(parts, p, TextCache(parts))
    while not t.done: advance([t], parts.unet, bucket)
    return t


def stock(folder, parts, p):
    """(latents as the VAE takes them, picture) of the same through diffusers' own pipeline."""
    looks, masked = parts.row.refine == "reference", p.inpainting is not None
    cls = STOCK[parts.row.name]
    if masked: cls = "Flux2KleinInpaintPipeline" if looks else "ZImageInpaintPipeline"
    elif p.init is not None and not looks: cls = "ZImageImg2ImgPipeline"
    pipe = pipeline(cls, folder)
    kw = dict(prompt=p.prompt, height=p.height, width=p.width, num_inference_steps=p.steps_asked, guidance_scale=p.guidance_scale)
    if p.init is not None: kw["image"] = p.init
    if masked: kw |= dict(mask_image=p.inpainting.mask, strength=p.strength)
    elif cls == "ZImageImg2ImgPipeline": kw["strength"] = p.strength
    if p.references and masked: kw["image_reference"] = p.references[0]
    elif p.references: kw["image"] = [p.init, *p.references]
    latents, picture = (pipe(**kw, output_type=kind, generator=torch.Generator().manual_seed(p.seed)).images for kind in ("latent", "pil"))
    return latents, picture[0]


def test_the_row_is_read_from_the_files(family):
    _, parts = family
    assert parts.row.flow and parts.row.native == 128 and type(denoiser_of(parts)) is FAMILIES[parts.row.pipeline]


@pytest.mark.parametrize("how", [dict(), dict(steps=2), dict(steps=8, size=(96, 128)), dict(prompt=LONG), dict(prompt=""),
                                 dict(init=PHOTO, size=(96, 128), steps=8, strength=0.3), dict(init=PHOTO, size=(96, 128), steps=8, strength=0.6),
                                 dict(init=PHOTO, size=(96, 128), strength=1.0)],
                         ids=["plain", "2 steps", "8 steps, upright", "long prompt", "no prompt", "strength 0.3", "strength 0.6", "strength 1"])
def test_a_lone_trajectory_equals_the_pipeline(family, how):
    folder, parts = family
    if parts.row.refine == "reference" and how.get("strength"): how = how | dict(strength=1.0)
    p = drawn(parts, **how)
    latents, picture = stock(folder, parts, p)
    t = run(parts, p)
    mine = t.family.to_vae(t.latents) if parts.row.refine == "reference" else t.latents
    assert (mine - latents).abs().max() <= 1e-5
    gap = np.abs(np.asarray(decode_latents(parts, t.latents)[0], int) - np.asarray(picture, int))
    assert gap.max() <= 1
    assert bool(t.cut) == (how.get("prompt") == LONG)


def ellipse(size, box):
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return mask


BRUSH = ellipse((96, 128), (17, 23, 77, 101))
OTHERS = tuple(Image.fromarray(np.random.default_rng(k).integers(0, 255, (h, w, 3), dtype=np.uint8)) for k, (w, h) in enumerate(((64, 96), (128, 64), (80, 80))))


@pytest.mark.parametrize("strength", [0.4, 0.75, 1.0])
def test_a_mask_is_the_inpaint_pipeline(family, strength):
    """Both families have one: Z-Image's blends with a mask of latents, klein's with a mask in quarters, and looks at the picture too."""
    folder, parts = family
    p = drawn(parts, size=(96, 128), steps=8, init=PHOTO, strength=strength, mask=BRUSH)
    latents, picture = stock(folder, parts, p)
    t = run(parts, p)
    if parts.row.refine == "reference":
        gap = np.abs(np.asarray(decode_latents(parts, t.latents)[0], int) - np.asarray(picture, int))
        assert (t.family.to_vae(t.latents) - latents).abs().max() <= 1e-5 and gap.max() <= 1
    else: assert (t.latents - latents).abs().max() <= 1e-5
    kept = (t.kept.mask == 0).expand_as(t.latents)
    assert 0 < kept.sum() < kept.numel() and torch.equal(t.latents[kept], t.kept.latents[kept])


def looking(family):
    folder, parts = family
    if not parts.row.references: pytest.skip("this model takes one picture")
    return folder, parts


@pytest.mark.parametrize("others", [1, 2, 3])
def test_several_references_are_the_pipelines_list(family, others):
    folder, parts = looking(family)
    p = drawn(parts, size=(96, 128), init=PHOTO, strength=1.0, references=OTHERS[:others])
    latents, picture = stock(folder, parts, p)
    t = run(parts, p)
    assert (t.family.to_vae(t.latents) - latents).abs().max() <= 1e-5
    assert np.abs(np.asarray(decode_latents(parts, t.latents)[0], int) - np.asarray(picture, int)).max() <= 1
    fewer = run(parts, drawn(parts, size=(96, 128), init=PHOTO, strength=1.0, references=OTHERS[:others - 1]))
    assert (t.latents - fewer.latents).abs().max() > 1e-3                      # each is seen


def test_a_mask_and_another_picture_are_the_inpaint_pipeline(family):
    folder, parts = looking(family)
    p = drawn(parts, size=(96, 128), steps=8, init=PHOTO, strength=0.75, mask=BRUSH, references=OTHERS[:1])
    latents, _ = stock(folder, parts, p)
    t = run(parts, p)
    assert (t.family.to_vae(t.latents) - latents).abs().max() <= 1e-5


def test_references_in_company(family):
    """Rows that look at pictures of the same sizes share calls, and each is what it is alone, to the bit in calls of one size."""
    _, parts = looking(family)
    flipped = tuple(image.transpose(Image.Transpose.ROTATE_180) for image in OTHERS)
    many = [drawn(parts, size=(96, 128), steps=2 + seed, seed=seed, init=PHOTO, strength=1.0, references=(OTHERS if seed % 2 else flipped)[:2]) for seed in range(4)]
    crowd = [Trajectory(parts, p, TextCache(parts)) for p in many]
    assert len({t.key for t in crowd} | {key_of(TextCache(parts), p)[0] for p in many}) == 1
    waiting, late = crowd[:2], crowd[2:]
    while waiting:
        advance(waiting, parts.unet, 8)
        waiting, late = [t for t in waiting + late[:1] if not t.done], late[1:]
    for p, t in zip(many, crowd): assert torch.equal(t.latents, run(parts, p, 8).latents)


def test_a_key_knows_the_shapes_that_are_looked_at(family):
    """64x96 and 96x64 have as many tokens; the order of two pictures counts."""
    _, parts = looking(family)
    turned = OTHERS[0].transpose(Image.Transpose.ROTATE_90)
    lists = ((), OTHERS[:1], (turned,), OTHERS[:2], OTHERS[1::-1], OTHERS)
    keys = {key_of(TextCache(parts), drawn(parts, size=(96, 128), init=PHOTO, strength=1.0, references=many))[0] for many in lists}
    assert len(keys) == len(lists)


def test_calls_that_look_at_more_have_fewer_rows_and_cost_more(family):
    _, parts = looking(family)
    native = key_of(TextCache(parts), drawn(parts))[0]
    cost = StepCost(native, {1: 1.0, 2: 1.8, 4: 3.2, 8: 6.0}, {1: 1.0})
    whole = Image.new("RGB", (128, 128))
    rows = {}
    for n in range(4):
        key = key_of(TextCache(parts), drawn(parts, init=whole, strength=1.0, references=(whole,) * n))[0]
        assert cost.step(key)[1] == 2 + n and cost.decode(key)[1] == 1
        rows[n] = max(cost.step(key))
    assert rows == {0: 8, 1: 4, 2: 4, 3: 2}


def test_company_changes_nothing(family):
    """Other steps, prompts, seeds and late joiners in one call, by key, are each alone: exactly in calls of one size."""
    _, parts = family
    many = [drawn(parts, steps=steps, seed=steps, prompt=prompt) for steps in (4, 6, 8) for prompt in ("a red apple", "a fox", LONG)]
    many += [drawn(parts, steps=8, size=(96, 128), init=PHOTO, strength=strength, seed=9) for strength in (0.6, 1.0)]
    texts = TextCache(parts)
    groups = {}
    for p in many: groups.setdefault(key_of(texts, p)[0], []).append((p, Trajectory(parts, p, texts)))
    assert len(groups) == (2 if parts.row.refine == "reference" else 3)
    for key, pairs in groups.items():
        crowd = [t for _, t in pairs]
        assert {t.key for t in crowd} == {key}
        waiting, late = crowd[:2], crowd[2:]
        while waiting:
            advance(waiting, parts.unet, 16)
            waiting = [t for t in waiting + late[:1] if not t.done]
            late = late[1:]
        for p, t in pairs: assert t.done and torch.equal(t.latents, run(parts, p, 16).latents)


def test_mixed_calls_of_other_sizes_are_close(family):
    _, parts = family
    many = [drawn(parts, steps=steps, seed=steps) for steps in (3, 5, 8)]
    texts = TextCache(parts)
    crowd = [Trajectory(parts, p, texts) for p in many]
    while waiting := [t for t in crowd if not t.done]: advance(waiting, parts.unet)
    assert max((t.latents - run(parts, p).latents).abs().max() for t, p in zip(crowd, many)) <= 1e-5


def test_a_key_tells_shapes_apart(family):
    """The network takes the positions of its first row for all: 2:3 and 3:2 have as many tokens and must not share a call."""
    _, parts = family
    texts = TextCache(parts)
    keys = {key_of(texts, drawn(parts, **how))[0] for how in (dict(size=(96, 128)), dict(size=(128, 96)), dict(size=(96, 128), init=PHOTO, strength=1.0), dict(size=(96, 128), prompt="word " * 20))}
    assert len(keys) == 3


def test_threads_measure_while_one_encodes(z_image):
    texts = TextCache(z_image)
    prompts = [f"{i} apples " * (i % 40 + 1) for i in range(200)]
    with ThreadPoolExecutor(4) as pool:
        encoding = pool.submit(lambda: [z_image and texts.family.encode([p], 1) for p in prompts[:20]])
        sizes = list(pool.map(texts.family.measure, prompts))
        encoding.result()
    assert sizes == [texts.family.measure(p) for p in prompts]


def test_official_times(family):
    _, parts = family
    if parts.row.refine == "reference":
        assert empirical_mu(1024, 4) == pytest.approx(2.0307, abs=1e-4) and empirical_mu(4096, 4) == pytest.approx(2.2912, abs=1e-4)
        table = make_table(denoiser_of(parts), parts.scheduler(), TimetableKey(None, 4, size=(1024, 1024)))
        assert [round(t, 4) for t in table.timesteps.tolist()] == [1, 0.9674, 0.9081, 0.7672]
    else:
        table = make_table(denoiser_of(parts), parts.scheduler(), TimetableKey(None, 8, size=(1024, 1024)))
        assert [round(1 - t, 4) for t in table.timesteps.tolist()] == [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3]


def refining(**config): return RefineRequest(refine_prompt="a fox", images=[png(PHOTO)], config=config)


def test_plans(family):
    """Steps, guidance, sizes and strength by the row. A negative prompt and a strength without effect are told."""
    _, parts = family
    row = parts.row
    made = plan(GenerateRequest(prompt="a fox", negative_prompt="blue", steps=100, guidance_scale=20, aspect_ratio="16:9"), row)
    p, said = made.pictures[0], " ".join(map(str, made.notes))
    assert p.steps == row.steps[2] and p.guidance_scale == row.guidance[2] and p.width % 16 == p.height % 16 == 0
    assert ("The negative prompt has no effect" in said) == (not row.cfg)
    p = prepare(refining(strength=0.6, steps=8), row).pictures[0]
    asked = min(max(8, row.steps[0]), row.steps[2])
    if row.refine == "noise": assert (p.steps, p.steps_asked, p.strength) == (last_steps(8, 0.6), 8, 0.6)
    else: assert (p.steps, p.steps_asked, p.strength) == (asked, asked, 1.0)
    told = [str(n) for n in prepare(refining(strength=0.6), row).notes]
    assert any("strength has no effect" in t for t in told) == (row.refine == "reference")
    p = prepare(RefineRequest(refine_prompt="a", images=[png(PHOTO)], mask=png(BRUSH), config={"strength": 0.5, "steps": row.steps[1]}), row).pictures[0]
    assert p.inpainting and p.strength == 0.5 and p.steps == last_steps(row.steps[1], 0.5)
    white = prepare(RefineRequest(refine_prompt="a", images=[png(PHOTO)], mask=png(Image.new("L", (96, 128), 255)), config={"strength": 0.5}), row).pictures[0]
    assert white.inpainting is None and white.strength == (1.0 if row.refine == "reference" else 0.5)
    several = RefineRequest(refine_prompt="a", images=[png(PHOTO)], references=[png(im) for im in OTHERS])
    if row.references: assert [im.size for im in prepare(several, row).pictures[0].references] == [im.size for im in OTHERS]
    else:
        with pytest.raises(Invalid, match=f"references: given 3 pictures, allowed: none: {row.name} takes one picture at a time"): prepare(several, row)


def test_a_reference_that_is_too_small_or_narrow_is_named():
    row = ROWS["flux2-klein"]
    for size in ((63, 200), (64, 600)):
        with pytest.raises(Invalid) as told: prepare(RefineRequest(refine_prompt="a", images=[png(PHOTO)], references=[png(PHOTO), png(Image.new("RGB", size))]), row)
        assert told.value.errors[0].loc == "references.1" and f"{size[0]}x{size[1]}" in told.value.detail
    with pytest.raises(ValueError): RefineRequest(refine_prompt="a", images=[png(PHOTO)], references=["x"] * 4)


def test_the_engine_serves_and_mixes(family):
    """The same engine as for UNets: pictures that share steps, a refinement, previews, receipts, and a replay of both."""
    folder, parts = family
    engine = Engine(load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu")).start()
    assert engine.wait_ready(120), engine.reason
    try:
        limits = engine.health().limits
        assert limits.mask and limits.references == parts.row.references and any("made for UNets" in o for o in engine.health().optimizations)
        steps = parts.row.steps[0]
        made = plan(GenerateRequest(prompt="a fox " * 300, seed=1, n=2, steps=steps), engine.row)
        others = [png(im) for im in OTHERS[:parts.row.references]]
        several = RefineRequest(refine_prompt="a fox", images=[png(PHOTO)], references=others, config={"steps": steps, "seed": 6})
        masked = RefineRequest(refine_prompt="a fox", images=[png(PHOTO)], mask=png(BRUSH), config={"steps": steps, "seed": 7})
        jobs = [engine.submit(plan_) for plan_ in (made, *(prepare(r, engine.row) for r in (refining(steps=steps, seed=5), several, masked)))]
        pictures = [picture for job in jobs for picture in job.result(120)]
        assert len(pictures) == 5 and any("cut" in w for w in jobs[0].warnings)
        for picture in pictures:
            told = picture.receipt.to_json()
            assert told["scheduler"] == "flow" and told["stepsAsked"] in (None, steps)
            start = png(PHOTO) if told.get("strength") else None
            seen = others[:len(told["referenceSha256"])]
            _, again = replay_plan(ReplayRequest(receipt=told, init=start, mask=png(BRUSH) if told["maskSha256"] else None, references=seen), engine.row)
            gap = np.abs(np.asarray(engine.submit(again).result(120)[0].image, int) - np.asarray(picture.image, int))
            assert gap.max() <= 1                                     # alone, in a call of another size
            if seen:
                with pytest.raises(Invalid, match="references: given 1 pictures, allowed: the 3 it looked at"): replay_plan(ReplayRequest(receipt=told, init=start, references=seen[:1]), engine.row)
        assert {len(p.receipt.reference_sha256) for p in pictures} == {0, len(others)}
        with pytest.raises(Invalid, match="scheduler"): replay_plan(ReplayRequest(receipt=told | {"scheduler": "euler"}, init=start), engine.row)
    finally: engine.close()


NO_OPENVINO = "openvino is not installed: pip install 'aura-engine[openvino]'"


@pytest.fixture(scope="module")
def openvino(tmp_path_factory):
    """Converted models go to a folder of this file, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield pytest.importorskip("openvino", reason=NO_OPENVINO)


def with_graphs(folder, **how):
    settings = load_settings(**{"SD_MODEL_ID": str(folder), "SD_DEVICE": "cpu", "SD_BACKEND": "openvino", "SD_PRECISION": "fp32"} | how)
    return optimize(load(settings), settings)


@pytest.fixture(scope="module")
def graphed(openvino, family): return with_graphs(family[0])


def test_openvino_draws_the_same_picture(family, graphed):
    """From text at two aspects, refined, inside a mask, and beside references: each on the one graph, against torch."""
    _, parts = family
    assert graphed.backend == "openvino" and any("one graph for all shapes" in o for o in graphed.optimizations)
    looks = parts.row.refine == "reference"
    ways = [dict(), dict(size=(96, 128), steps=8, prompt=LONG), dict(size=(96, 128), steps=8, init=PHOTO, strength=1.0 if looks else 0.6),
            dict(size=(96, 128), steps=8, init=PHOTO, strength=0.75, mask=BRUSH)]
    if parts.row.references: ways.append(dict(size=(96, 128), init=PHOTO, strength=1.0, references=OTHERS[:2]))
    for how in ways:
        p = drawn(parts, **how)
        one, two = run(graphed, p).latents, run(parts, p).latents
        assert (one - two).abs().max() <= 1e-5 * two.abs().max()
        gap = np.abs(np.asarray(decode_latents(graphed, one)[0], int) - np.asarray(decode_latents(parts, two)[0], int))
        assert gap.max() <= 1 and (gap > 0).mean() < 1e-3
    assert graphed.unet.graphs.compiles == 1


def test_openvino_in_company(family, graphed):
    """Other steps, seeds and a late joiner: exactly what each is alone in calls of one size, closely in calls of other sizes."""
    looks = dict(size=(96, 128), init=PHOTO, strength=1.0, references=OTHERS[:2]) if graphed.row.references else {}
    many = [drawn(graphed, steps=steps, seed=steps, **looks) for steps in (3, 5, 8)]
    for rows, most in ((8, 0), (0, 1e-5)):
        crowd = [Trajectory(graphed, p, TextCache(graphed)) for p in many]
        waiting, late = crowd[:2], crowd[2:]
        while waiting:
            advance(waiting, graphed.unet, rows)
            waiting, late = [t for t in waiting + late if not t.done], []
        for p, t in zip(many, crowd): assert (t.latents - run(graphed, p, rows).latents).abs().max() <= most


def test_openvino_saves_the_graph_of_a_transformer(openvino, family, graphed, monkeypatch):
    """The second start reads it. Other weights get a graph of their own."""
    monkeypatch.setattr(openvino, "convert_model", lambda *a, **k: pytest.fail("converted again"))
    again = with_graphs(family[0])
    p = drawn(graphed)
    assert torch.equal(run(again, p).latents, run(graphed, p).latents) and not again.notes
    other = load(load_settings(SD_MODEL_ID=str(family[0]), SD_DEVICE="cpu")).unet
    next(other.parameters()).data += 1
    assert not saved_graph(other, again.unet.names).exists()


def test_the_engine_serves_with_openvino(openvino, family):
    """Pictures that share steps, a refinement and a mask, with previews, receipts and their replay."""
    folder, _ = family
    engine = Engine(load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu", SD_BACKEND="openvino")).start()
    assert engine.wait_ready(240), engine.reason
    try:
        assert any("OpenVINO" in o for o in engine.health().optimizations)
        steps = engine.row.steps[0]
        masked = RefineRequest(refine_prompt="a fox", images=[png(PHOTO)], mask=png(BRUSH), config={"steps": steps, "seed": 7})
        plans = plan(GenerateRequest(prompt="a fox", seed=1, n=2, steps=steps), engine.row), *(prepare(r, engine.row) for r in (refining(steps=steps, seed=5), masked))
        pictures = [picture for job in [engine.submit(one) for one in plans] for picture in job.result(120)]
        for picture in pictures:
            told = picture.receipt.to_json()
            start, mask = png(PHOTO) if told.get("strength") else None, png(BRUSH) if told["maskSha256"] else None
            _, again = replay_plan(ReplayRequest(receipt=told, init=start, mask=mask), engine.row)
            assert np.abs(np.asarray(engine.submit(again).result(120)[0].image, int) - np.asarray(picture.image, int)).max() <= 1
        assert len(pictures) == 4 and "OpenVINO" not in " ".join(engine.health().warnings)
    finally: engine.close()


def test_openvino_needs_memory_and_says_how_much(openvino, family, monkeypatch):
    """Refused with numbers before anything is converted. SD_MEMORY=0 goes on."""
    folder, parts = family
    assert conversion_peak(parts.unet) == 8 * sum(p.numel() for p in parts.unet.parameters())
    monkeypatch.setattr("aura_engine.optimize.free_memory", lambda: 1000)
    with pytest.raises(ModelError, match=rf"SD_BACKEND=openvino needs about [\d.]+ MiB more to convert {parts.row.name}, and .* are free"): with_graphs(folder)
    assert with_graphs(folder, SD_MEMORY="0").backend == "openvino"


@pytest.mark.parametrize("how", [{"SD_QUANT": "int8"}, {"SD_NET_ID": "net.gguf"}], ids=["int8", "gguf"])
def test_openvino_takes_weights_as_they_are(openvino, family, how):
    _, parts = family
    with pytest.raises(ModelError, match="SD_QUANT and SD_NET_ID"): can_openvino(parts, load_settings(SD_MODEL_ID="x", SD_DEVICE="cpu", SD_BACKEND="openvino", **how))


def test_openvino_is_not_taken_unasked(family):
    _, parts = family
    answer = can_openvino(parts, load_settings(SD_MODEL_ID="x", SD_DEVICE="cpu"))
    assert answer is False or "SD_BACKEND=openvino does it" in answer


@pytest.fixture(scope="module")
def klein_server(make_server, tmp_path_factory):
    folder = tiny_flow.save(tmp_path_factory.mktemp("served") / "model", "flux2-klein")
    return make_server(SD_MODEL_ID=str(folder), SD_DEVICE="cpu")


def test_references_at_every_door(klein_server, tmp_path):
    """/refine, the client with a replay, OpenAI's own client, and the command line: the same picture from the same four."""
    files = {name: tmp_path / f"{name}.png" for name in ("photo", "a", "b", "c")}
    for path, image in zip(files.values(), (PHOTO, *OTHERS)): image.save(path)
    photo, *others = files.values()
    with AuraClient(klein_server.url, mode="local") as client:
        made = client.refine("a fox", photo, references=others, seed=4, steps=2)
        assert client.health()["local"].health.limits.references == 3 and not made.warnings
        again = client.replay(made.receipts[0], photo, references=others)
        assert again.images[0].tobytes() == made.images[0].tobytes() and again.receipts[0].reference_sha256 == made.receipts[0].reference_sha256
        with pytest.raises(Invalid, match="references: given 2 pictures, allowed: the 3"): client.replay(made.receipts[0], photo, references=others[:2])
        without = client.refine("a fox", photo, seed=4, steps=2)
    assert without.images[0].tobytes() != made.images[0].tobytes()
    with openai.OpenAI(base_url=klein_server.url + "/v1", api_key="unused", max_retries=0) as ai:
        edit = lambda pictures, **more: ai.images.edit(image=pictures, prompt="a fox", extra_body={"seed": 4, "num_inference_steps": 2}, **more)
        several = edit([path.open("rb") for path in files.values()])
        assert len(several.data) == 1 and not several.warnings and several.receipts[0]["referenceSha256"] == list(made.receipts[0].reference_sha256)
        assert Image.open(io.BytesIO(base64.b64decode(several.data[0].b64_json))).tobytes() == made.images[0].tobytes()
        assert len(edit([path.open("rb") for path in files.values()], n=2).data) == 2
        with pytest.raises(openai.BadRequestError) as told: edit([photo.open("rb"), ("b.png", b"no picture")])
        assert told.value.param == "image[1]"
        with pytest.raises(openai.BadRequestError) as told: edit([photo.open("rb"), ("b.png", base64.b64decode(png(Image.new("RGB", (20, 200)))))])
        assert told.value.param == "image[1]" and "20x200" in told.value.message
    ran = CliRunner().invoke(cli, ["refine", "a fox", str(photo), *(f"--reference={path}" for path in others), "--seed=4", "--steps=2", "--local", klein_server.url, "-o", str(tmp_path / "out.png")])
    assert ran.exit_code == 0, ran.output
    assert Image.open(tmp_path / "out.png").tobytes() == made.images[0].tobytes()
    ran = CliRunner().invoke(cli, ["replay", str(tmp_path / "out.png"), "--init", str(photo), *(f"--reference={path}" for path in others), "--local", klein_server.url, "-o", str(tmp_path / "again.png")])
    assert ran.exit_code == 0 and Image.open(tmp_path / "again.png").tobytes() == made.images[0].tobytes(), ran.output


def test_a_model_that_takes_one_picture_names_the_field(server):
    r = httpx.post(server.url + "/refine", json={"refinePrompt": "a fox", "images": [png(PHOTO)], "references": [png(PHOTO)]}, timeout=60)
    assert r.status_code == 422 and r.json()["errors"][0]["loc"] == "references" and "takes one picture at a time" in r.json()["detail"]


REFUSED = {"SD_SAMPLER": "lcm", "SD_LCM_LORA_ID": "latent-consistency/lcm-lora-sdv1-5", "SD_VAE_ID": "madebyollin/taesd"}


@pytest.mark.parametrize("name", list(REFUSED))
def test_settings_that_do_not_fit_are_refused(family, name):
    folder, parts = family
    with pytest.raises(Invalid) as told: load(load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu", **{name: REFUSED[name]}))
    assert told.value.errors[0].loc == name and parts.row.name in told.value.detail


def test_a_unet_takes_no_flow_sampler():
    with pytest.raises(Invalid, match="SD_SAMPLER"): load(load_settings(SD_MODEL_ID="embedded", SD_DEVICE="cpu", SD_SAMPLER="flow"))


def test_a_folder_without_its_template_says_so(family, tmp_path):
    folder, _ = family
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"): load(load_settings(SD_MODEL_ID=str(bare), SD_DEVICE="cpu"))


def test_the_encoder_is_cut(family):
    _, parts = family
    whole = {"reference": 29, "noise": 5}[parts.row.refine]
    assert len(parts.text_encoders[0].layers) == {"reference": 27, "noise": 4}[parts.row.refine] < whole
    assert not any("lm_head" in name for name, _ in parts.text_encoders[0].named_parameters())


def rooms_above():
    """Every module above the adapters, but those that deploy and measure presets by name, and the training of the embedded model."""
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        if not path.stem[0].isdigit(): continue
        number, name = nb.room(path.stem)[0], re.findall(r"#\| default_exp (\w+)", path.read_text(encoding="utf-8"))
        if name and (6 <= number <= 14 or number == 19 or path.stem == "17_cli"): yield name[0]


ABOVE = list(rooms_above())
NAMES = re.compile(r"klein|z_?image\b|flux|qwen|sdxl|\bxl\b|added_cond|time_ids|pooled|timestep_cond|chunks?\b(?=.*token)", re.I)


@pytest.mark.parametrize("module", ABOVE)
def test_rooms_above_know_no_family(module):
    """No name of an architecture in code above the adapters: comments and docstrings apart."""
    tree = ast.parse((ROOT / "aura_engine" / f"{module}.py").read_text(encoding="utf-8"))
    docs = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and n.body and isinstance(n.body[0], ast.Expr)}
    words = [(n.lineno, w) for n in ast.walk(tree) if id(n) not in docs for w in ([n.id] if isinstance(n, ast.Name) else [n.attr] if isinstance(n, ast.Attribute) else [n.value] if isinstance(n, ast.Constant) and isinstance(n.value, str) else [])]
    assert not [f"{module}.py:{line}: {word}" for line, word in words if NAMES.search(word)]


def test_no_room_above_was_forgotten(): assert len(ABOVE) >= 25 and {"trajectory", "engine", "openai", "a1111", "client", "widgets", "cli"} <= set(ABOVE)


def trained(folder, parts, at, prefix):
    """A LoRA of random numbers for the attention of a transformer, named as peft's trainers do, under `prefix`."""
    names = [n for n, m in parts.unet.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(("to_q", "to_k", "to_out.0", "to_qkv_mlp_proj"))]
    drawn, tensors = torch.Generator().manual_seed(7), {}
    for name in names:
        out, into = parts.unet.get_submodule(name).weight.shape
        tensors[f"{prefix}{name}.lora_A.weight"] = torch.randn(4, into, generator=drawn)
        tensors[f"{prefix}{name}.lora_B.weight"] = torch.randn(out, 4, generator=drawn)
    save_file(tensors, at)
    return at


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model."])
def test_a_lora_is_what_the_stock_loader_makes_of_it(family, tmp_path, prefix):
    """Equal to diffusers' load_lora_weights. Off again, the model is as it was to the bit. One call has one LoRA."""
    folder, parts = family
    if prefix == "diffusion_model." and parts.row.refine == "reference": pytest.skip("there such names are those of the original program")
    file = trained(folder, parts, tmp_path / "ink.safetensors", prefix)
    with_ink = load(load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu", SD_LORAS=f"ink={file}"))
    p = drawn(parts, lora="ink")
    pipe = getattr(diffusers, STOCK[parts.row.name]).from_pretrained(folder)
    pipe.load_lora_weights(str(file), adapter_name="ink")
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(prompt=p.prompt, height=p.height, width=p.width, num_inference_steps=p.steps, guidance_scale=p.guidance_scale, output_type="latent", generator=torch.Generator().manual_seed(p.seed)).images
    t = run(with_ink, p)
    mine = t.family.to_vae(t.latents) if parts.row.refine == "reference" else t.latents
    plain = run(parts, drawn(parts)).latents
    assert (mine - theirs).abs().max() <= 1e-5 < (t.latents - plain).abs().max()
    assert torch.equal(run(with_ink, drawn(parts)).latents, plain) and t.key != run(with_ink, drawn(parts)).key
    assert with_ink.row.loras == ("ink",)


def test_a_lora_of_another_model_is_refused(family, tmp_path):
    folder, parts = family
    save_file({"transformer.nowhere.lora_A.weight": torch.ones(4, 8), "transformer.nowhere.lora_B.weight": torch.ones(8, 4)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="SD_LORAS=ink=.*(fit|layers)"): load(load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu", SD_LORAS=f"ink={tmp_path / 'x.safetensors'}"))
    with pytest.raises(Invalid, match="SD_LORAS"): load(load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu", SD_LORAS="ink=/nowhere", SD_NET_ID="/nowhere.gguf", SD_MEMORY="0"))


def test_every_row_has_a_family():
    assert {row.pipeline for row in ROWS.values()} == set(FAMILIES)
    assert all(row.precisions == ("bf16", "fp32") and "Apache" in row.note for row in FLOW_ROWS)
