"""The waterfall's command on a small model: every contender really draws, the same picture, and the figures land in the file and the tables."""
import json, subprocess, sys

import pytest

from aura_engine import waterfall
from conftest import ROOT, clean_env

PLAIN, TORCH, _, OPENVINO, GENAI, TINY = waterfall.REAL


def command(*argv, **env):
    env = clean_env(HF_HUB_OFFLINE=1, OMP_NUM_THREADS=1, **env)
    return subprocess.run([sys.executable, "-m", "aura_engine.waterfall", *map(str, argv)], cwd=ROOT, env=env,
                          capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_command_measures_and_stores(tmp_path):
    """Each contender in a process of its own, through Engine.submit and openvino-genai's pipeline. Then a cold start from the graph that was saved."""
    for package in ("openvino", "openvino_genai"): pytest.importorskip(package)
    done = command("--size", "small", "--rounds", 2, "--only", PLAIN, "--only", OPENVINO, "--only", GENAI, "--work", tmp_path / "work", "--out", tmp_path / "out" / "waterfall.json")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "waterfall.json").read_text())
    rows = {r["name"]: r for r in results["rows"]}
    assert list(rows) == [PLAIN, OPENVINO, GENAI] and not results["absent"] and results["machine"]["cpu"]
    assert rows[PLAIN]["gain"] == 1 and all(r["seconds"] > 0 and r["cpu"] > 0 and r["rounds"] == 2 and r["gigabytes"] > 0.1 for r in rows.values())
    assert all(r["mean"] < 3 for r in rows.values())                        # the same noise, the same text, the same sampler: the same picture
    assert 0 < results["cold"]["cpu"] and 0 < results["cold"]["graphs"] < results["cold"]["picture"] and results["cold"]["imports"] > 0
    assert len(results["pair"]["cpu"]) == 4 and all(a > 0 and b > 0 for a, b in results["pair"]["cpu"])
    assert all(name in done.stdout for name in rows) and "× openvino-genai" in done.stdout


def test_a_package_that_is_absent_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(waterfall, "find_spec", lambda name: None)
    here = waterfall.Course(tmp_path, "small", 1, run=lambda call, *args: call(*args))
    results = waterfall.measure_waterfall(here, (PLAIN, GENAI), say=lambda text: None)
    assert "aura-engine[peers]" in results["absent"][GENAI] and [r["name"] for r in results["rows"]] == [PLAIN]
    assert "aura-engine[peers]" in waterfall.waterfall_table(results) and all(b.measured is None for b in waterfall.waterfall_bars(results))


def test_bars_are_read_off_the_rows():
    """Ratios of processor time. A run without a row has no bar for it, and a missed bar is said to be missed."""
    embedded = list(waterfall.TINY)
    seconds = {PLAIN: 50, OPENVINO: 20, GENAI: 19, TINY: 10, embedded[0]: 3, embedded[3]: 1}
    rows = [{"name": k, "cpu": v} for k, v in seconds.items()]
    results = {"rows": rows, "pair": {"ratio": 0.95}, "cold": {"cpu": 7}}
    said = {b.name: (b.measured, b.met) for b in waterfall.waterfall_bars(results) if b.measured is not None}
    assert said == {"OpenVINO bf16, full VAE, × diffusers fp32": (2.5, True), "OpenVINO bf16, tiny VAE, × diffusers fp32": (5.0, True), "OpenVINO bf16, full VAE, × openvino-genai, in turn": (0.95, False),
                    "embedded model, OpenVINO bf16, × diffusers fp32": (3.0, True), "cold start from a saved IR, s": (7, False)}


def test_help_says_what_it_needs(): assert "12 GB of disk" in " ".join(command("--help").stdout.split())
