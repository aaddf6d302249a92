"""python scripts/hf_space_deploy.py --space-id you/aura --origins "http://localhost:5173" (see nbs/15e_deploy.ipynb)"""
import os, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDS = "huggingface_hub>=2.4 httpx>=0.28 pydantic-settings>=2.12 pillow>=12 numpy>=2"          # no torch: the Space does the rest
sys.path.insert(0, str(ROOT))
try: from aura_engine.deploy import main
except ImportError as e:
    ours = ROOT / ".venv/bin/python"
    if Path(sys.prefix).resolve() != ours.parent.parent and ours.exists(): os.execv(ours, [str(ours), *sys.argv])
    wanted = " ".join(f'"{n}"' for n in NEEDS.split())
    sys.exit(f"{e.name} is not installed for {sys.executable} ({sys.version.split()[0]}; 3.11 or newer is needed). Either of these will do:\n"
             f"  make serve            # the whole engine, into .venv, where this script then finds it\n  {sys.executable} -m pip install {wanted}")

if __name__ == "__main__": main()
