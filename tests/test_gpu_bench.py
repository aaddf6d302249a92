"""The GPU benchmark's command, with tiny models on the CPU: every stage runs, fails alone, is stopped in time, and is kept."""
import json, os, subprocess, sys
from dataclasses import replace

import pytest

import aura_engine.gpu_bench as gpu


def command(*args):
    argv = [sys.executable, "-m", "aura_engine.gpu_bench", *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(argv, capture_output=True, text=True, timeout=900, env=env)


@pytest.mark.timeout(1200)                                        # twenty stages, three minutes on a machine that does nothing else
def test_every_stage_runs_with_tiny_models(tmp_path):
    stages = [n for n in gpu.STAGES if n not in ("compiled_sdxl", "engine_compiled")]
    done = command("--tiny", "--out", tmp_path / "gpu.json", "--budget", 850, "--stages", *stages)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert {n: s["status"] for n, s in results["stages"].items()} == dict.fromkeys(results["stages"], "done"), done.stdout[-3000:]
    assert {r["contender"] for r in gpu.stage_rows(results, "engine", "contender")} == {"engine", "lock + pipeline", "request batching 50 ms"}
    # at one batch size company changes nothing; at another one bf16 rounds otherwise, and the engine as it comes may run in bf16
    most = {"a mixed crowd against each alone": 16, "strangers in the call, the same 8 rows": 0}
    assert all(r["max"] <= most[r["what"]] for s in ("engine", "embedded") for r in gpu.stage_rows(results, s, "max")) or results["machine"].get("gpu")
    assert gpu.stage_rows(results, "compiled", "recompiles") == [{"variant": "graphs", "shapes": 2, "graphs": 2, "recompiles": 0}]
    eight = results["stages"]["quantized"]["rows"]                   # torchao may be absent, and fp8 needs a card: then it says why
    assert all(any(r["variant"].startswith(kind) and ("ms" in r or r.get("why")) for r in eight) for kind in gpu.EIGHT_BITS)
    assert "| engine | 4 steps |" in done.stdout and "torch.compile" in done.stdout


def test_help_names_the_stages(tmp_path):
    said = command("--help")
    assert said.returncode == 0 and "--budget" in said.stdout and all(n in said.stdout for n in gpu.STAGES)


def broken(size, tell):
    tell({"what": "a row before the end"})
    raise RuntimeError("out of luck")


def endless(size, tell):
    tell({"what": "a row before the end"})
    while True: pass


@pytest.mark.parametrize("stage, status", [(broken, "failed"), (endless, "stopped: out of time")])
def test_a_stage_that_fails_or_hangs_keeps_its_rows(monkeypatch, stage, status):
    monkeypatch.setitem(gpu.STAGES, "limits", replace(gpu.STAGES["limits"], run=stage))
    record = gpu.run_stage("limits", gpu.TINY_SIZE, 2, lambda record: None).to_json()
    assert record["status"] == status and record["rows"] == [{"what": "a row before the end"}] and record["seconds"] < 6
    assert ("error" in record) == (stage is broken) and "out of luck" in record.get("error", {"text": "out of luck"})["text"]


def test_a_run_without_time_keeps_what_an_earlier_one_found(tmp_path):
    limits = {"status": "done", "rows": [{"what": "matrix product", "teraflops": 700}], "when": "then"}
    file, old = tmp_path / "gpu.json", {"stages": {"limits": limits}, "machine": {}}
    file.write_text(json.dumps(old))
    results = gpu.run_stages(file, 0, gpu.TINY_SIZE, ["limits", "vae"], say=lambda line: None)
    assert results["stages"]["limits"] == old["stages"]["limits"] and results["stages"]["vae"]["status"].startswith("not run")
    assert gpu.matrix_rate(results) == 700 and "| limits | done |" in gpu.gpu_report(results)
