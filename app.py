"""What a Space runs: `python app.py`."""
from aura_engine.server import main

if __name__ == "__main__":
    main()
