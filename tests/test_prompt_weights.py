"""Prompt weights are read as the web UI that made them popular reads them. The reference below is its rule, written out."""
import random, re, time

import diffusers
import pytest
import torch

import tiny
from aura_engine.config import load_settings
from aura_engine.loader import load
from aura_engine.models import ROWS
from aura_engine.planning import plan
from aura_engine.prompt_weights import MOST_WEIGHT, Piece, has_weights, pieces_of, plain_text, weighted
from aura_engine.trajectory import TextCache, Trajectory, advance
from aura_engine.unets import encode_texts
from aura_engine.types import GenerateRequest, Picture

TOKENS = re.compile(r"\\\(|\\\)|\\\[|\\]|\\\\|\\|\(|\[|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|\)|]|[^\\()\[\]:]+|:")


def reference(text):
    """[[text, weight]] with BREAKs as ["BREAK", None]: every closing bracket multiplies what has been read since it opened."""
    found, round_at, square_at = [], [], []

    def multiply(start, factor):
        for piece in found[start:]:
            if piece[1] is not None: piece[1] *= factor

    for m in TOKENS.finditer(text):
        token, weight = m[0], m[1]
        if token.startswith("\\") and len(token) > 1: found.append([token[1:], 1.0])
        elif token == "(": round_at.append(len(found))
        elif token == "[": square_at.append(len(found))
        elif weight is not None and round_at: multiply(round_at.pop(), float(weight))
        elif token == ")" and round_at: multiply(round_at.pop(), 1.1)
        elif token == "]" and square_at: multiply(square_at.pop(), 1 / 1.1)
        else:
            for i, part in enumerate(re.split(r"\s*\bBREAK\b\s*", token)):
                if i: found.append(["BREAK", None])
                found.append([part, 1.0])
    for start in round_at: multiply(start, 1.1)
    for start in square_at: multiply(start, 1 / 1.1)
    return found


def letters(chunks):
    """Each character with its weight, chunks apart: how pieces are joined does not matter."""
    return [[(ch, p.weight) for p in chunk for ch in p.text] for chunk in chunks]


def reference_letters(text):
    chunks = [[]]
    for piece, weight in reference(text):
        if weight is None: chunks.append([])
        else: chunks[-1] += [(ch, min(max(round(weight, 6), -MOST_WEIGHT), MOST_WEIGHT)) for ch in piece]
    return chunks


CASES = ["a fox", "(fox)", "[fox]", "((fox))", "(a (red:1.3) fox)", "a \\(real\\) fox", "a (red:1.3 fox", "fox)", "(fox", "[fox", "([fox)]", "(fox:0)", "(fox:-1.5)",
         "((a:0) b:2)", "a BREAK b", "(a BREAK b:1.2)", "BREAK", "BREAKFAST", "a:b", "(a:b)", "(a:1.2.3)", "(a:.5)", "(a:5.)", "\\", "a\\", "\\\\(a)", "(:1.2)", "(a : 1.2 )", "(🦊:1.2)", ""]


@pytest.mark.parametrize("text", CASES)
def test_weights_are_read_as_the_reference_reads_them(text):
    ours, theirs = letters(weighted(text)), reference_letters(text)
    assert [[ch for ch, _ in c] for c in ours] == [[ch for ch, _ in c] for c in theirs]
    assert all(a[1] == pytest.approx(b[1], abs=2e-6) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))


def test_so_are_random_ones():
    pick = random.Random(5)
    parts = ["(", ")", "[", "]", ":", "1.3", ":1.3)", ":0)", ":-2)", "\\", "\\(", "fox", " ", "BREAK", " BREAK ", "é", "2.", ".5)"]
    for _ in range(2000):
        text = "".join(pick.choices(parts, k=pick.randrange(14)))
        test_weights_are_read_as_the_reference_reads_them(text)


@pytest.mark.parametrize("text", ["(" * 2000, "[" * 2000, "(" * 999 + "x" + ")" * 999, "(x:9)" * 400, "(x:1e9)" * 280, "([" * 1000, ":" * 2000, "\\" * 2000, "BREAK " * 330, "(" * 500 + ":1.1)" * 300, "(x:" + "9" * 1990 + ")", "(x:" + "9" * 400 + ") y", "(x:" + "9" * 1990, " " * 1999 + "x", "\n" * 1999 + "BREAK"],
                         ids=lambda t: f"{t[:6]}-{len(t)}")
def test_any_prompt_is_read_for_little(text):
    began = time.process_time()
    chunks = weighted(text)
    assert time.process_time() - began < 0.3 and all(abs(p.weight) <= MOST_WEIGHT for c in chunks for p in c) and len(chunks) <= 331


def test_a_prompt_without_weights_is_itself():
    for text in ("a fox, a red barn", "8:30 in the morning", "a fox :)", r"\(o_o\)"):
        assert not has_weights(text) and len(weighted(text)) == 1
    assert weighted("a fox, a red barn") == [[Piece("a fox, a red barn")]] and plain_text("a (red:1.3) fox BREAK on [blue]") == "a red fox on blue"
    assert has_weights("(fox)") and has_weights("a BREAK b")


# what a weight does to an embedding: the web UI's "Original" emphasis, written out with the encoders alone

@pytest.fixture(scope="module", params=["sd15", "sdxl-deep"])
def parts(request, tmp_path_factory):
    folder = tiny.save(tmp_path_factory.mktemp(request.param) / "model", request.param)
    made = load(load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu"))
    for encoder in made.text_encoders:                                     # a fresh one answers embeddings whose mean is 0, unlike any that was trained
        for name, bias in encoder.named_parameters():
            if name.endswith(("norm.bias", "fc2.bias")): bias.normal_(0.3, 0.1, generator=torch.Generator().manual_seed(0))
    return made


def chunks_of(tokenizer, text):
    """[[(id, weight)]] of 75: a full chunk or a BREAK begins the next. In a prompt with marks the web UI's rule: when the chunk is full and its last comma is at
    most 20 tokens back, what follows the comma moves into the next chunk."""
    pieces, comma = reference(text), tokenizer.get_vocab()[",</w>"]
    marked = any(weight != 1 for _, weight in pieces)
    chunks, now, last_comma = [], [], -1
    for piece, weight in pieces:
        if weight is None:
            chunks, now, last_comma = chunks + [now], [], -1
            continue
        for token in tokenizer(piece, add_special_tokens=False).input_ids:
            if token == comma: last_comma = len(now)
            elif marked and len(now) == 75 and last_comma != -1 and len(now) - last_comma <= 20:
                chunks, now, last_comma = chunks + [now[:last_comma + 1]], now[last_comma + 1:], -1
            if len(now) == 75: chunks, now, last_comma = chunks + [now], [], -1
            now.append((token, weight))
    return chunks + [now] if now or not chunks else chunks


def emphasised(parts, text, chunks=0):
    """(embeds [1, T, D], pooled or None) of a prompt, `chunks` of them at least."""
    rows, pooled = [], None
    for tokenizer, encoder in zip(parts.tokenizers, parts.text_encoders):
        split, out = chunks_of(tokenizer, text), []
        for chunk in split + [[]] * (chunks - len(split)):
            ids = [tokenizer.bos_token_id, *(t for t, _ in chunk), *[tokenizer.eos_token_id], *[tokenizer.pad_token_id] * (75 - len(chunk))]
            multipliers = torch.tensor([1.0, *(w for _, w in chunk), *[1.0] * (76 - len(chunk))])
            with torch.no_grad(): answer = encoder(torch.tensor([ids]), output_hidden_states=True)
            z = answer.hidden_states[-2] if parts.xl else answer.last_hidden_state
            original_mean = z.mean()
            z = z * multipliers.reshape(1, 77, 1).expand(z.shape)
            out.append(z * (original_mean / z.mean()))
            if parts.xl and len(out) == 1: pooled = answer[0]
        rows.append(torch.cat(out, 1))
    return torch.cat(rows, -1), pooled


WEIGHTED = ["a fox", "a (red:1.3) fox", "(a [blue] fox:0.7), (((owl)))", "a fox BREAK on (red:1.5)", "a BREAK", "BREAK a (fox)", r"a \(real\) (fox:0)", "(fox:-0.5) and an owl", "a (red fox and an owl:1.2) " * 20,
            "a (fox:1.2), " + "a red owl on a blue background, " * 14, "(fox:1.2), " + "a red owl on blue " * 30, "(fox:1.2) " + "a red owl on a blue background, " * 14 + "BREAK " + "a fox, " * 40,
            "(fox:1.1) " + "owl " * 54 + ", " + "owl " * 40, "(fox:1.1) " + "owl " * 53 + ", " + "owl " * 40, "(fox:1.1) " + "owl " * 74 + ", owl", "a red owl on a blue background, " * 14]


@pytest.mark.parametrize("text", WEIGHTED, ids=lambda t: f"{t[:20]}-{len(t)}")
def test_embeddings_are_those_of_the_reference_formula(parts, text):
    chunks = TextCache(parts).measure(text)
    ours = encode_texts(parts, ["an owl", text], chunks)[1]                # in company, which must not matter
    embeds, pooled = emphasised(parts, text)
    assert ours.embeds.shape == embeds.shape and (ours.embeds - embeds).abs().max() <= 1e-5 * embeds.abs().max().clamp(min=1)
    assert not parts.xl or (ours.pooled - pooled).abs().max() <= 1e-5
    assert torch.equal(encode_texts(parts, [text], chunks)[0].embeds, encode_texts(parts, [text, text], chunks)[1].embeds) and not ours.cut


def test_a_weighted_picture_is_the_pipelines_with_those_embeddings(parts):
    """Prompt and negative prompt of different lengths, through guidance."""
    p = Picture("a (red:1.4) fox BREAK on blue", 128, 128, steps=3, guidance_scale=3.0, seed=3, temperature=1.0, negative_prompt="[noise], (owl:1.2)", scheduler="ddim")
    t = Trajectory(parts, p, TextCache(parts))
    while not t.done: advance([t], parts.unet)
    (yes, pooled), (no, no_pooled) = emphasised(parts, p.prompt, 2), emphasised(parts, p.negative_prompt, 2)
    if parts.xl:
        pipe = diffusers.StableDiffusionXLPipeline(parts.vae, *parts.text_encoders, *parts.tokenizers, parts.unet, parts.scheduler("ddim"), add_watermarker=False)
        given = dict(pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=no_pooled)
    else: pipe, given = diffusers.StableDiffusionPipeline(parts.vae, parts.text_encoders[0], parts.tokenizers[0], parts.unet, parts.scheduler("ddim"), None, None, requires_safety_checker=False), {}
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(prompt_embeds=yes, negative_prompt_embeds=no, num_inference_steps=3, guidance_scale=3.0, width=128, height=128, generator=torch.Generator().manual_seed(3), output_type="latent", **given).images
    assert (t.latents - theirs).abs().max() <= 1e-4 * theirs.abs().max().clamp(min=1)


def test_what_is_beyond_the_last_chunk_is_named(parts):
    text = encode_texts(parts, ["a BREAK b BREAK c BREAK d BREAK an (owl:1.2)"], 4)[0]
    assert text.cut == "an owl"


# where they are not applied

def test_a_setting_makes_brackets_text(tmp_path):
    folder = tiny.save(tmp_path / "model")
    plain = load(load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu", SD_PROMPT_WEIGHTS="0"))
    usual = load(load_settings(SD_MODEL_ID=str(folder), SD_DEVICE="cpu"))
    one, other = (encode_texts(p, [text], 1)[0].embeds for p, text in ((plain, "a (fox)"), (usual, r"a \(fox\)")))
    assert torch.equal(one, other) and not torch.equal(one, encode_texts(usual, ["a (fox)"], 1)[0].embeds)
    assert [str(n) for n in plan(GenerateRequest(prompt="a (fox)"), plain.row).notes] == ["Prompt weights are switched off here: brackets are read as text."]


def test_the_embedded_model_reads_the_words_alone():
    """Its words spread over all tokens, so a weight on one does nothing to be seen. The prompt stays as written, and the answer says so."""
    parts = load(load_settings(SD_MODEL_ID="embedded", SD_DEVICE="cpu"))
    asked = GenerateRequest(prompt="a (red:1.3) fox BREAK on [blue]", negative_prompt="(owl)")
    todo = plan(asked, parts.row)
    assert todo.pictures[0].prompt == asked.prompt and [n.field for n in todo.notes if n.used == "ignored"].count("prompt") == 1
    assert not any("know" in str(n) for n in todo.notes)                    # 1.3 and BREAK are no words
    assert torch.equal(encode_texts(parts, [asked.prompt], 1)[0].embeds, encode_texts(parts, ["a red fox on blue"], 1)[0].embeds)


def test_other_rows_apply_them_without_a_note():
    assert not plan(GenerateRequest(prompt="a (red:1.3) fox"), ROWS["sd15"]).notes and {row.name for row in ROWS.values() if row.weights == "ignored"} == {n for n in ROWS if n.startswith("embedded")}
    assert pieces_of("a (b:2)", "ignored") == [[Piece("a b")]] and pieces_of("a (b:2)", "literal") == [[Piece("a (b:2)")]]
