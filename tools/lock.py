"""requirements.lock: every package of the image by version and hash, so that the same commit builds the same image next year.

`python tools/lock.py` writes it anew from requirements.txt, with uv, for Python 3.11 on Linux. torch and what only torch needs
are left out: the Dockerfile pins torch's version, and which wheels of it are right depends on the hardware. Where skopeo or
docker is installed, the Dockerfile's base image gets its digest of today. `python tools/lock.py sbom` writes all packages as
CycloneDX JSON into build/sbom.json.
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


BASE = re.compile(r"(?m)^ARG BASE_IMAGE=([\w.:/-]+)@(sha256:[0-9a-f]{64})$")
ASKING = {"skopeo": ["inspect", "--format", "{{.Digest}}", "docker://docker.io/library/{}"],
          "docker": ["buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}", "{}"]}


def base_of_today(name):
    """The digest of the base image as its registry has it now; None where nothing here can ask."""
    for tool, words in ASKING.items():
        if not shutil.which(tool): continue
        done = subprocess.run([tool, *(w.replace("{}", name) if w.endswith("{}") else w for w in words)], capture_output=True, text=True)
        if re.fullmatch(r"sha256:[0-9a-f]{64}", done.stdout.strip()): return done.stdout.strip()
    return None


def sbom(lock, pin):
    """Every package of the image, torch included, as CycloneDX JSON."""
    argv = [sys.executable, "-m", "cyclonedx_py", "requirements", "-", "--output-reproducible"]
    done = subprocess.run(argv, input=f"{lock}\n{pin}\n", capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr)
    return done.stdout


def main(words):
    dockerfile, lock = ROOT / "Dockerfile", ROOT / "requirements.lock"
    text = dockerfile.read_text()
    if words == ["sbom"]:
        (ROOT / "build").mkdir(exist_ok=True)
        (ROOT / "build/sbom.json").write_text(sbom(lock.read_text(), torch_pin(text)))
        return print("build/sbom.json")
    lock.write_text(lock_text((ROOT / "requirements.txt").read_text(), torch_pin(text), datetime.date.today()))
    found = BASE.search(text)
    assert found, f"{dockerfile} names no base image by digest"
    name, old = found.groups()
    new = base_of_today(name)
    if new: dockerfile.write_text(text.replace(old, new))
    print(lock.read_text().count("=="), "packages;", f"{name} is {new}" if new else f"{name} stays {old[:19]}…: neither skopeo nor docker could ask")


if __name__ == "__main__": main(sys.argv[1:])
