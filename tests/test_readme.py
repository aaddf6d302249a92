"""What the README says can be pasted: its Python blocks run, one after the other, in one fresh interpreter."""
import re, subprocess, sys

from conftest import ROOT, clean_env


def python_blocks(text): return re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)


def test_every_python_block_runs_as_pasted(tmp_path):
    blocks = python_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert blocks, "README.md shows no Python"
    script = tmp_path / "pasted.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    env = clean_env(PYTHONPATH=ROOT, HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(tmp_path.glob("*.png")), "the README's picture was not written"
