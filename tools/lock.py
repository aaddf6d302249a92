"""The locks: every package of the image by version and hash, so that the same commit builds the same image next year.

`python tools/lock.py` writes requirements.lock anew from requirements.txt, with uv, for Python 3.11 on Linux. torch and what
only torch needs depend on the hardware. They are in locks/: torch-NAME.lock for each index of torch's wheels, and cuda-NAME.lock
for what that torch needs from the usual index. Where an index cannot be asked, its locks stay as they are, and the Dockerfile
installs wheels without a lock by version. The extras that an image may have (OpenVINO) are there, too, with what they need beside
requirements.lock. Where skopeo or docker is installed, the Dockerfile's base image gets
its digest of today. `python tools/lock.py sbom` writes all packages of the CPU image as CycloneDX JSON into build/sbom.json.
"""
import configparser, datetime, os, re, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"]
OF_TORCH = re.compile(r"(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==")         # they come with torch's own wheels
WHEELS = ("cpu", "cu126", "cu130", "pypi")  # names that TORCH_INDEX_URL may have in the Dockerfile; pypi is pip's usual index


EXTRAS = ("openvino",)                      # words that EXTRA_PACKAGES may have; the extras of these names in settings.ini


def torch_pin(dockerfile):
    """'torch==2.13.0', as the Dockerfile installs it."""
    return re.findall(r"torch==[\d.]+", dockerfile)[0]


def torch_index(dockerfile, name):
    """The address of the index with the wheels called `name`, as the Dockerfile makes it; None for pip's usual one."""
    if name == "pypi": return None
    address, = re.findall(r'index="(http.*?)\$TORCH_INDEX_URL"', dockerfile)
    return address + name


def compiled(requirements, index=None, within=None):
    """uv's answer: a block of lines for each package, its hashes under its name. `index` comes before the usual one.

    `within`: a lock whose versions must do for what it has."""
    beside = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))     # a venv that is not activated
    uv = shutil.which("uv", path=beside) or sys.exit("uv is not installed: pip install uv")
    argv = [uv, "pip", "compile", "-", *PLATFORM, "--generate-hashes", "--no-header", "--no-annotate", "--no-emit-index-url", "--quiet"]
    if index: argv += ["--index", index]
    if within: argv += ["--constraint", str(within)]
    done = subprocess.run(argv, input=f"{requirements}\n", capture_output=True, text=True)
    if done.returncode: raise RuntimeError(done.stderr)
    return re.findall(r"(?m)^\S.*(?:\n[ \t]+.*)*", done.stdout)


def lock_text(blocks, today, what):
    """The file: a dated heading, then the packages."""
    head = f"# Locked on {today} for Python 3.11 on Linux; `python tools/lock.py` does it again. {what}\n"
    return head + "\n".join(blocks) + "\n"


def write_lock(name, blocks, today, what):
    """locks/NAME.lock; a line about it."""
    (ROOT / f"locks/{name}.lock").write_text(lock_text(blocks, today, what))
    print(f"{name}.lock is written")


def torch_blocks(dockerfile, name):
    """What torch's wheels called `name` need, torch by itself: (its block, the others'). RuntimeError when the index does not have it.

    torch's own index may have other files under the names of the others: those are looked up in the usual one."""
    blocks = [b for b in compiled(torch_pin(dockerfile), torch_index(dockerfile, name)) if OF_TORCH.match(b)]
    torch = [block for block in blocks if named(block) == "torch"]
    # uv goes on to the usual index for what the first one lacks; its torch has no "+cu126" in its version.
    if name != "pypi" and f"+{name}" not in torch[0]: raise RuntimeError(f"no torch of {name}")
    pins = [re.split(r"[\s;]", block)[0] for block in blocks if block not in torch]
    return torch, compiled("\n".join(pins)) if pins else []


def write_torch_locks(dockerfile, today):
    """locks/torch-NAME.lock for each index that answers, and locks/cuda-NAME.lock for what its torch needs; a line for each."""
    for name in WHEELS:
        try: torch, others = torch_blocks(dockerfile, name)
        except RuntimeError:
            path = ROOT / f"locks/torch-{name}.lock"
            print(f"{path.name} {'stays as it is' if path.exists() else 'is not there'}: its index does not answer, or lacks {torch_pin(dockerfile)}")
            continue
        if name == "pypi":
            write_lock(f"torch-{name}", sorted(torch + others), today, f"torch's wheels called {name}.")
            continue
        write_lock(f"torch-{name}", torch, today, f"torch's wheel called {name}, from its own index.")
        what = f"What torch's wheel called {name} needs, from pip's usual index."
        if others: write_lock(f"cuda-{name}", others, today, what)


def named(block):
    """The name of a block's package."""
    return block.partition("==")[0]


def extra_blocks(name, lock):
    """The packages that the extra `name` of settings.ini brings beside those of `lock` and torch's."""
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    have = set(re.findall(r"(?m)^([\w.-]+)==", lock.read_text()))
    blocks = compiled(settings["DEFAULT"][f"{name}_requirements"], within=lock)
    return [block for block in blocks if named(block) not in have and not OF_TORCH.match(block)]


def write_extra_locks(lock, today):
    """locks/NAME.lock for each extra that an image may have."""
    for name in EXTRAS:
        write_lock(name, extra_blocks(name, lock), today, f"{name}, and what it needs beside requirements.lock.")


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


def sbom(*locks):
    """Every package of these locks, as CycloneDX JSON."""
    argv = [sys.executable, "-m", "cyclonedx_py", "requirements", "-", "--output-reproducible"]
    done = subprocess.run(argv, input="\n".join(locks), capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr)
    return done.stdout


def main(words):
    dockerfile, lock = ROOT / "Dockerfile", ROOT / "requirements.lock"
    text, today = dockerfile.read_text(), datetime.date.today()
    if words == ["sbom"]:
        (ROOT / "build").mkdir(exist_ok=True)
        (ROOT / "build/sbom.json").write_text(sbom(lock.read_text(), (ROOT / "locks/torch-cpu.lock").read_text()))
        return print("build/sbom.json")
    try: blocks = compiled(f"{(ROOT / 'requirements.txt').read_text()}\n{torch_pin(text)}")
    except RuntimeError as e: sys.exit(str(e))
    lock.write_text(lock_text([b for b in blocks if not OF_TORCH.match(b)], today, "torch is in locks/."))
    write_torch_locks(text, today)
    write_extra_locks(lock, today)
    found = BASE.search(text)
    assert found, f"{dockerfile} names no base image by digest"
    name, old = found.groups()
    new = base_of_today(name)
    if new: dockerfile.write_text(text.replace(old, new))
    print(lock.read_text().count("=="), "packages;", f"{name} is {new}" if new else f"{name} stays {old[:19]}…: neither skopeo nor docker could ask")


if __name__ == "__main__": main(sys.argv[1:])
