"""Planning: cheap for any input, told in sentences, and what a receipt may ask for. Costs are counts and processor seconds."""
import random, subprocess, sys, time
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import pytest
from PIL import Image
from pydantic import ValidationError

from aura_engine import planning
from aura_engine.models import EMBEDDED, ROWS, fit_size, makes, size_for
from aura_engine.planning import ReplayRequest, differences, intended_word, is_slip, known_words, plan, replay_plan, similar_words
from aura_engine.types import MAX_PROMPT, AuraError, GenerateRequest, Health, Invalid, Receipt, RefineConfig, RefineRequest, error_tree, field_errors, shown

ROW = ROWS["embedded"]
WORDS = known_words(EMBEDDED)
RECEIPT = Receipt("a red apple", "", 128, 128, 4, 1.0, None, 7, 0.7, "lcm", "embedded", None, None, "fp32", "torch", "cpu", {"torch": "2.13.0"})
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def spent(f, *args, **options):
    """(result, processor seconds)"""
    began = time.process_time()
    return f(*args, **options), time.process_time() - began


# words

def random_words(n, length, seed=0):
    pick = random.Random(seed)
    return ["".join(pick.choices(LETTERS, k=length)) for _ in range(n)]


PROMPTS = {
    "random words of five letters": " ".join(random_words(330, 5)), "of six": " ".join(random_words(285, 6)), "of two": " ".join(random_words(600, 2)),
    "one word": "x" * MAX_PROMPT, "pairs": "ab" * 1000, "underscores": "a_" * 1000, "emoji": "🦊" * 1000, "combining marks": "a" + "\u0301" * 1999,
    "what grows in lower case": "ΐ" * MAX_PROMPT, "sharp s": "straße" * 300, "other scripts": "крыса 狐狸 ثعلب " * 100, "mistakes": "strawbery aplpe rockt " * 90,
    "known words": " ".join(sorted(WORDS)[:300])[:MAX_PROMPT], "digits": "1" * 2000, "zero width": "a\u200b" * 1000,
}


@pytest.fixture
def fresh():
    """No word was ever asked for."""
    for f in (intended_word, similar_words): f.cache_clear()


@pytest.mark.parametrize("name", PROMPTS)
def test_any_prompt_is_planned_for_little(name, fresh):
    planning.vocabulary(EMBEDDED)                                                 # built once in a process, at the first request
    made, seconds = spent(plan, GenerateRequest(prompt=PROMPTS[name][:MAX_PROMPT]), ROW)
    assert seconds < 0.5 and len(made.pictures[0].prompt) <= MAX_PROMPT
    assert len(made.notes) <= 2 and all(len(str(n)) < 600 and len(str(n.given)) < 80 for n in made.notes)


def test_words_are_compared_with_few_others(monkeypatch, fresh):
    """330 unknown words against 4,844 known ones are 1.6 million comparisons. An index needs next to none."""
    compared = {"slips": 0, "close": 0}

    def counting_slip(a, b):
        compared["slips"] += 1
        return is_slip(a, b)

    def counting_close(word, words, *args):
        compared["close"] += len(words)
        return get_close_matches(word, words, *args)

    monkeypatch.setattr(planning, "is_slip", counting_slip)
    monkeypatch.setattr(planning, "get_close_matches", counting_close)
    plan(GenerateRequest(prompt=PROMPTS["random words of five letters"]), ROW)
    assert compared["slips"] < 2000 and compared["close"] < 500
    before = dict(compared)
    plan(GenerateRequest(prompt=PROMPTS["random words of five letters"]), ROW)
    assert compared == before                                                     # remembered


def test_the_memory_of_words_is_bounded(fresh):
    for i in range(30): plan(GenerateRequest(prompt=" ".join(random_words(330, 5, seed=i))), ROW)
    plan(GenerateRequest(prompt="x" * MAX_PROMPT), ROW)
    assert intended_word.cache_info().currsize <= 4096 and similar_words.cache_info().currsize <= 4096
    assert intended_word.cache_info().misses < 30 * 330 + 1                               # the long word was not even asked for


def slow_meant(word):
    """What the index replaced: a look at every known word."""
    if len(word) < 5: return None
    near = [k for k in WORDS if abs(len(k) - len(word)) < 2 and (k[0] == word[0] or k[:2] == word[1::-1]) and is_slip(word, k)]
    return next(iter(get_close_matches(word, sorted(near), 1, 0)), None)


def slips_of(word, pick):
    i, letter = pick.randrange(len(word)), pick.choice(LETTERS)
    return pick.choice([word[:i] + word[i + 1:], word[:i] + letter + word[i:], word[:i] + letter + word[i + 1:], word[:i] + word[i:i + 2][::-1] + word[i + 2:]])


def test_the_index_finds_what_the_search_found(fresh):
    pick = random.Random(2)
    tried = [slips_of(w, pick) for w in pick.sample(sorted(WORDS), 150)] + random_words(30, 5)
    assert [intended_word(w, EMBEDDED) for w in tried] == [slow_meant(w) for w in tried]
    assert sum(intended_word(w, EMBEDDED) is not None for w in tried) > 60


def test_notes_are_sentences():
    for row in ROWS.values():
        asks = [GenerateRequest(prompt="a strawbery and a xylophone", steps=99, guidance_scale=29, negative_prompt="blue", resolution="high")]
        asks += [RefineRequest(refine_prompt="x", images=["x"], config=RefineConfig(strength=s, steps=99, negative_prompt="blue")) for s in (0.05, 0.3)]
        for ask in asks:
            for note in plan(ask, row, [Image.new("RGB", (512, 512))]).notes:
                text = str(note)
                assert text[0].isupper() and text[-1] == "." and "->" not in text and "Scale" not in text and len(text) < 300, text


# numbers

def test_a_refinement_remembers_the_steps_that_were_asked():
    photo = Image.new("RGB", (128, 128))
    for name, strength, run in (("sd15-lcm-lora", 0.05, 2), ("sdxl-lightning-4", 0.5, 2), ("embedded", 0.5, 8)):
        ask = RefineRequest(refine_prompt="x", images=["x"], config=RefineConfig(steps=8, strength=strength))
        picture = plan(ask, ROWS[name], [photo]).pictures[0]
        assert (picture.steps, picture.steps_asked) == (run, min(8, ROWS[name].steps[2]))
    assert plan(GenerateRequest(prompt="x"), ROW).pictures[0].steps_asked is None


def test_errors_name_the_field_as_the_request_does():
    for ask in (GenerateRequest(prompt="x", lora="oil"), RefineRequest(refine_prompt="x", images=["x"], config=RefineConfig(lora="oil"))):
        with pytest.raises(Invalid) as e: plan(ask, ROW, [Image.new("RGB", (64, 64))])
        assert [x.loc for x in e.value.errors] == ["lora"]
        assert [x.loc for x in e.value.under("config.", ["lora", "steps"]).errors] == ["config.lora"]


@pytest.mark.parametrize("name", ROWS)
def test_every_size_that_is_planned_may_be_replayed(name):
    row, pick = ROWS[name], random.Random(name)
    ratios = ["1:3", "3:1", "1:1", "9999:3333"] + [f"{w}:{h}" for w, h in ((pick.randint(1, 99), pick.randint(1, 99)) for _ in range(60)) if 1 / 3 <= w / h <= 3]
    for ratio in ratios:
        for resolution in ("standard", "high"): assert makes(row, *size_for(row, ratio, resolution)), (ratio, resolution)
    for _ in range(60):
        side, aspect = pick.uniform(row.native * row.standard, row.native), pick.uniform(1 / 3, 3)
        assert makes(row, *fit_size(row, aspect, side))


def test_few_sizes_may_be_asked_for():
    def count(row, most): return sum(makes(row, w, h) for w in range(64, most, row.multiple) for h in range(64, most, row.multiple))
    assert count(ROW, 513) < 24 and count(ROWS["sdxl"], 4097) < 10_000            # 58,683 receipts of SDXL were once possible


# receipts from outside

def asked(**change): return ReplayRequest.model_validate({"receipt": RECEIPT.to_json() | change})


WRONG = {"width": 2048, "steps": 90, "guidanceScale": 29.0, "loraAlias": "ink", "strength": 0.5}


@pytest.mark.parametrize("field", WRONG)
def test_a_receipt_that_the_model_cannot_follow(field):
    with pytest.raises(Invalid) as e: replay_plan(asked(**{field: WRONG[field]}), ROW)
    assert e.value.errors[0].loc in (f"receipt.{field}", "init") and "embedded" in e.value.detail or field in ("loraAlias", "strength")


HUGE = {
    "a million versions": {"versions": {f"p{i}": "1" for i in range(1_000_000)}}, "long versions": {"versions": {"p" * 10**6: "1" * 10**6}},
    "a million unknown fields": {f"k{i}": 0 for i in range(1_000_000)}, "a long model": {"model": "x" * 10**7}, "a large seed": {"seed": 10**4000},
    "a list for a map": {"versions": [0] * 10**6}, "an unknown sampler": {"scheduler": "x" * 10**6}, "a deep prompt": {"prompt": [[[["x"] * 100] * 100] * 100]},
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_receipt_is_refused_for_little(name):
    body = {"receipt": RECEIPT.to_json() | HUGE[name]}
    began = time.process_time()
    with pytest.raises(ValidationError) as e: ReplayRequest.model_validate(body)
    said = field_errors(e.value)
    assert time.process_time() - began < 1.5 and len(e.value.errors()) <= 2 and sum(len(x.msg) for x in said) < 800


def test_corrections_and_timings_are_not_even_read():
    long = {"corrections": ["x"] * 10**6, "timings": {f"t{i}": 0.1 for i in range(10**6)}}
    (old, todo), seconds = spent(lambda: replay_plan(asked(**long), ROW))
    assert seconds < 1 and old.corrections == () and old.timings == {} and todo.pictures[0].seed == 7


def test_differences_are_few_and_short():
    other = replace(RECEIPT, model="x" * 10**6, versions={f"package-{'y' * 1000}-{i}": "1" for i in range(100_000)})
    said, seconds = spent(differences, RECEIPT, other)
    assert seconds < 3 and len(said) == 21 and sum(map(len, said)) < 6000 and "more values" in said[-1]
    assert differences(RECEIPT, RECEIPT) == [] and differences(RECEIPT, replace(RECEIPT, backend="openvino")) == [
        "The picture may differ: backend was 'torch' then, and is 'openvino' now."]


def test_a_receipt_of_an_earlier_version_is_replayed():
    older = {k: v for k, v in RECEIPT.to_json().items() if k not in ("stepsAsked", "loraAlias", "loraSource")}
    assert replay_plan(ReplayRequest.model_validate({"receipt": older}), ROW)[0] == RECEIPT
    assert asked(stepsAsked=9).receipt.receipt().steps_asked == 9


# bodies

BODIES = {
    "unknown fields": {"prompt": "x"} | {f"k{i}": i for i in range(2_000_000)}, "one unknown field": {"prompt": "x", "k" * 10**6: 1},
    "a large number": {"prompt": "x", "steps": 10**4000}, "a large float": {"prompt": "x", "steps": 1e308}, "no number": {"prompt": "x", "temperature": float("nan")},
    "a list for a prompt": {"prompt": ["x"] * 10**6}, "a map for a prompt": {"prompt": {str(i): i for i in range(10**6)}}, "a long prompt": {"prompt": "x" * 10**7},
    "control characters": {"prompt": "\0" * 2000}, "half characters": {"prompt": "\ud800" * 2000}, "a long ratio": {"prompt": "x", "aspectRatio": "1" * 10**6 + ":1"},
}


@pytest.mark.parametrize("name", BODIES)
def test_a_wrong_body_is_refused_for_little(name):
    began = time.process_time()
    with pytest.raises(ValidationError) as e: GenerateRequest.model_validate(BODIES[name])
    said = field_errors(e.value)
    assert time.process_time() - began < 1 and len(e.value.errors()) == 1 and len(said[0].msg) < 400 and said[0].msg.isprintable()


def test_unknown_fields_are_named_while_they_are_few():
    with pytest.raises(ValidationError) as e: GenerateRequest.model_validate({"prompt": "x", "colour": 1, "flavour": 2})
    assert [x.loc for x in field_errors(e.value)] == ["colour", "flavour"]
    with pytest.raises(ValidationError) as e: RefineRequest.model_validate({"refinePrompt": "x", "images": ["x"], "config": {f"k{i}": 0 for i in range(100)}})
    assert [x.loc for x in field_errors(e.value)] == ["config"] and "'k0'" in field_errors(e.value)[0].msg


def test_a_thousand_pictures_are_not_looked_at():
    with pytest.raises(ValidationError) as e: RefineRequest.model_validate({"refinePrompt": "x", "images": [1] * 10**6})
    assert len(e.value.errors()) <= 5


@pytest.mark.parametrize("value", [["x" * 10**7] * 50, {("k" * 10**6): {"v": ["x" * 10**6] * 50}}, [[[[[["x" * 10**6]]]]]] * 50, 10**9999, object(), range(10**9), b"x" * 10**7, set(range(50))], ids=lambda v: type(v).__name__)
def test_any_value_may_be_shown(value):
    text, seconds = spent(shown, value)
    assert seconds < 0.2 and len(text) <= 81


def test_a_wrong_picture_is_named_by_its_place():
    from aura_engine.images import encode, to_base64
    good = to_base64(encode(Image.new("RGB", (128, 128), "teal")))
    with pytest.raises(Invalid) as e: planning.prepare(RefineRequest(refine_prompt="x", images=[good, "aGk="]), ROW)
    assert e.value.errors[0].loc == "images.1"


# shape of the vocabulary

def test_errors_are_one_tree_of_titles_and_codes():
    classes = [c for c in error_tree() if c.__module__ == "aura_engine.types"]      # the doors have titles of their own
    assert len({c.code for c in classes}) == len(classes) > 18 and all(c.title and c.title == c.__doc__ for c in classes)
    assert all(c().problem()["status"] == c.status for c in classes) and issubclass(Invalid, AuraError)


def test_health_of_another_version_is_read():
    assert Health.from_json({"status": "ready", "unheard": {"of": 1}, "limits": {"steps": [1, 4, 50], "guidance": [1, 1, 4], "native": 128, "most": 128, "new": 1}}).limits.steps == (1, 4, 50)
    with pytest.raises(Invalid, match="status"): Health.from_json({"status": "asleep"})


ALONE = """
import sys
from aura_engine.planning import plan, prepare, replay_plan, differences
heavy = sorted({m.split(".")[0] for m in sys.modules} & {"torch", "fastapi", "starlette", "uvicorn", "diffusers", "numpy"})
assert not heavy, heavy
"""


def test_planning_needs_neither_torch_nor_a_server():
    subprocess.run([sys.executable, "-c", ALONE], cwd=Path(__file__).resolve().parent.parent, check=True)
