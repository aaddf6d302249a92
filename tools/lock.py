"""requirements.lock: every package of the image by version and hash, so that the same commit builds the same image next year.

`python tools/lock.py` writes it anew from requirements.txt, with uv, for Python 3.11 on Linux. torch and what only torch needs
are left out: the Dockerfile pins torch's version, and which wheels of it are right depends on the hardware.
"""
import datetime, re, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"]
LEFT_OUT = re.compile(r"(torch|triton|setuptools|nvidia-[\w-]+|cuda-[\w-]+)==")         # they come with torch's own wheels


def torch_pin(dockerfile):
    """'torch==2.13.0', as the Dockerfile installs it."""
    return re.findall(r"torch==[\d.]+", dockerfile)[0]


def compiled(requirements, pin):
    """uv's answer: a block of lines for each package, its hashes under its name."""
    uv = shutil.which("uv") or sys.exit("uv is not installed: pip install uv")
    argv = [uv, "pip", "compile", "-", *PLATFORM, "--generate-hashes", "--no-header", "--no-annotate", "--no-emit-index-url", "--quiet"]
    done = subprocess.run(argv, input=f"{requirements}\n{pin}\n", capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr)
    return re.findall(r"(?m)^\S.*(?:\n[ \t]+.*)*", done.stdout)


def lock_text(requirements, pin, today):
    """The file: a dated heading, then the packages."""
    head = f"# Locked on {today} for Python 3.11 on Linux; `python tools/lock.py` does it again. Without torch: see the Dockerfile.\n"
    return head + "\n".join(block for block in compiled(requirements, pin) if not LEFT_OUT.match(block)) + "\n"


if __name__ == "__main__":
    text = lock_text((ROOT / "requirements.txt").read_text(), torch_pin((ROOT / "Dockerfile").read_text()), datetime.date.today())
    (ROOT / "requirements.lock").write_text(text)
    print(text.count("=="), "packages")
