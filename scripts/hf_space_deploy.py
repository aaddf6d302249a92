"""python scripts/hf_space_deploy.py --space-id you/aura --origins "http://localhost:5173" (see nbs/15_deploy.ipynb)"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from aura_engine.deploy import main  # noqa: E402

if __name__ == "__main__":
    main()
