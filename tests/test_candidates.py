"""With `SD_PRECISION=auto` a small model is tried in every way this machine has: the fastest that draws what fp32 draws is taken, and told."""
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from aura_engine import candidates, config, engine, loader
from aura_engine.candidates import CANDIDATES, REFERENCE, Candidate, Measured, Trials, TrialsFile
from aura_engine.types import Picture, Plan

AUTO = {"SD_MODEL_ID": "embedded", "SD_DEVICE": "cpu", "SD_BACKEND": "torch", "SD_PRECISION": "auto"}
APPLE = Picture("a red apple", 128, 128, steps=4, guidance_scale=1.0, seed=7)


def settings(**how): return config.load_settings(**AUTO | how)


def measured(candidate, seconds, psnr): return Measured(candidate.backend, candidate.precision, seconds, psnr, 1)


@pytest.fixture(autouse=True)
def quick(monkeypatch): monkeypatch.setattr(candidates, "PROMPTS", candidates.PROMPTS[:2])


@pytest.fixture(scope="module")
def loaded(): return loader.load(settings())


@pytest.fixture
def parts(loaded): return candidates.copy_of(loaded)


@pytest.fixture
def file(tmp_path): return TrialsFile(tmp_path / "precision.json")


def test_only_a_free_choice_is_measured(parts, monkeypatch):
    """fp32 asked for is fp32. A large model, LoRAs by the request and a forced compilation keep what they had."""
    monkeypatch.setattr(candidates, "has_bf16", lambda: True)
    assert candidates.candidates_for(parts, settings()) == [REFERENCE, Candidate("torch", "bf16")]
    for how in ({"SD_PRECISION": "fp32"}, {"SD_LORAS": "a=b"}, {"TORCH_COMPILE": "force"}): assert candidates.candidates_for(parts, settings(**how)) == []
    monkeypatch.setattr(candidates, "SMALL", 1000)
    assert candidates.candidates_for(parts, settings()) == []


def test_a_machine_without_bf16_measures_nothing(parts, file, monkeypatch):
    monkeypatch.setattr(candidates, "has_bf16", lambda: False)
    parts = candidates.choose_precision(parts, settings(), file)
    assert parts.precision == "fp32" and parts.precision_reason is None and not file.path.exists()


@pytest.mark.parametrize("least, wins", [(45, "torch bf16"), (44, "OpenVINO bf16"), (50, "OpenVINO fp32"), (99, "torch fp32")])
def test_the_fastest_within_the_bound_wins(file, least, wins, monkeypatch):
    """What is kept are figures: another bound decides differently, without a new measurement."""
    rows = [measured(c, s, p) for c, s, p in zip(CANDIDATES, (0.8, 0.2, 0.4, 0.6), (99.0, 44.5, 46.0, 92.0))]
    chosen = candidates.fastest(rows, least)
    assert str(chosen.candidate) == wins
    said = candidates.reason_for(chosen, rows, least)
    assert said.startswith(wins) and f"{least} dB" in said and all(str(row) in said for row in rows)


def test_what_is_measured_is_kept_and_followed(loaded, file, monkeypatch):
    """The second start measures nothing. The figures decide, not the order."""
    monkeypatch.setattr(candidates, "has_bf16", lambda: True)
    first = candidates.choose_precision(candidates.copy_of(loaded), settings(), file)
    kept = file.read(candidates.trials_name(loaded, [REFERENCE, Candidate("torch", "bf16")]))
    assert [str(row.candidate) for row in kept] == ["torch fp32", "torch bf16"]
    assert first.precision == candidates.fastest(kept, 45.0).precision and first.precision_reason.startswith(f"torch {first.precision}")
    monkeypatch.setattr(Trials, "run", lambda *a: pytest.fail("measured again"))
    for least, precision in ((0, min(kept, key=lambda row: row.seconds).precision), (99, "fp32")):
        again = candidates.choose_precision(candidates.copy_of(loaded), settings(SD_PRECISION_PSNR=str(least)), file)
        assert again.precision == precision and again.unet.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"NAME": 1}', '{"NAME": [1]}', '{"NAME": [{"backend": "torch", "precision": "fp32", "seconds": 0, "psnr": 99, "company": 0}]}',
                                    '{"NAME": [{"backend": "torch", "precision": "bf16", "seconds": 1, "psnr": 50, "company": 0}]}',
                                    '{"NAME": [{"backend": "torch", "precision": "fp32", "seconds": 1, "psnr": 99, "company": 1e999}]}',
                                    '{"NAME": [{"backend": "torch", "precision": "fp32", "seconds": 1%s, "psnr": 99, "company": 0}]}' % ("0" * 400)])
def test_a_damaged_file_is_one_measurement(file, damage):
    file.path.write_text(damage.replace("NAME", "name"))
    assert file.read("name") == []
    file.write("name", [measured(REFERENCE, 1.0, 99.0)])
    assert len(file.read("name")) == 1


def test_a_disk_that_cannot_be_written_is_no_reason_to_fail(tmp_path):
    (tmp_path / "a file").write_text("")
    TrialsFile(tmp_path / "a file" / "precision.json").write("name", [measured(REFERENCE, 1.0, 99.0)])


def test_a_candidate_that_fails_is_left_out(parts, file, monkeypatch):
    monkeypatch.setattr(candidates, "has_bf16", lambda: True)
    real = Candidate.applied
    def broken(self, parts, s):
        if self.precision == "bf16": raise RuntimeError("no such kernel")
        return real(self, parts, s)
    monkeypatch.setattr(Candidate, "applied", broken)
    parts = candidates.choose_precision(parts, settings(), file)
    assert parts.precision == "fp32" and "bf16" not in parts.precision_reason


def test_a_model_that_draws_nothing_is_not_chosen_for(parts, file, monkeypatch):
    """Its reference has no pictures: the engine goes on as it would without a choice, and its own first picture tells."""
    monkeypatch.setattr(candidates, "has_bf16", lambda: True)
    for p in parts.vae.decoder.parameters(): p.zero_()
    parts = candidates.choose_precision(parts, settings(), file)
    assert parts.precision == "fp32" and parts.precision_reason is None and not file.path.exists()


def test_time_that_is_up_ends_the_measurement(parts, file, monkeypatch):
    """A start on a busy machine does not decide for the next ones."""
    monkeypatch.setattr(candidates, "has_bf16", lambda: True)
    trials = Trials(parts, settings())
    trials.run([REFERENCE, Candidate("torch", "bf16")], patience=0)
    assert [row.candidate for row in trials.rows] == [REFERENCE] and trials.best is not None
    run = Trials.run
    monkeypatch.setattr(Trials, "run", lambda self, tried: run(self, tried, patience=0))
    made = candidates.choose_precision(parts, settings(), file)
    assert made.precision == "fp32" and "only candidate" in made.precision_reason and not file.path.exists()


def test_small_families_choose_too(file, tmp_path, monkeypatch):
    """Stable Diffusion's own parts, small: guidance, two rows a picture."""
    monkeypatch.setattr(candidates, "has_bf16", lambda: True)
    how = settings(SD_MODEL_ID=str(tiny.save(tmp_path / "model")))
    parts = candidates.choose_precision(loader.load(how), how, file)
    assert parts.precision in ("fp32", "bf16") and "torch fp32" in parts.precision_reason


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """An engine that was left the choice, and any bound is good enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "PROMPTS", candidates.PROMPTS[:2])
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(candidates, "has_bf16", lambda: True)
        patch.setattr(candidates, "fastest", lambda rows, least: rows[-1])
        with engine.Engine(settings()).start() as e:
            assert e.wait_ready(120), e.reason
            yield e


def test_health_tells_what_was_chosen_and_why(half):
    h = half.health()
    assert h.precision == "bf16" and h.precision_reason.startswith("torch bf16") and "torch fp32" in h.precision_reason
    assert h.to_json()["precisionReason"] == h.precision_reason
    receipt = half.submit(Plan((APPLE,))).result()[0].receipt
    assert (receipt.precision, receipt.backend) == ("bf16", "torch")


def test_company_changes_nothing_at_one_number_of_rows_in_bf16(half):
    """Equal buckets, equal pictures, to the last bit, whoever shares the call."""
    def made(*prompts):
        together = [candidates.Trajectory(half.parts, replace(APPLE, prompt=p, seed=7 + k), candidates.TextCache(half.parts)) for k, p in enumerate(prompts)]
        while not together[0].done: candidates.advance(together, half.parts.unet, 4)
        latents = torch.cat([t.latents for t in together])
        return np.asarray(candidates.decode_batch(half.parts, torch.cat([latents, latents[:1].expand(4 - len(latents), -1, -1, -1)]))[0][0])
    assert np.array_equal(made("a red apple"), made("a red apple", "a fox", "an owl"))
