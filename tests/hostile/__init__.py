"""The hostile corpus: what a stranger may send, made by small generators, with the budget it attacks and the right answer.

`attack.py` says what a row is and how it is sent. `bodies.py`, `pictures.py`, `wires.py` and `crowds.py` hold the rows:
JSON and forms, picture files, sockets and headers, many requests at once. `beyond.py` holds what was tried after those,
`doors.py` the same at the doors of other APIs, masks, and the readers of jobs. tests/test_hostile.py runs them all.
"""
from .attack import Answer, Attack, Target
from .beyond import BEYOND
from .bodies import BODIES
from .crowds import CROWDS
from .doors import DOORS
from .pictures import PICTURES
from .wires import WIRES

CORPUS = (*BODIES, *PICTURES, *WIRES, *CROWDS, *BEYOND, *DOORS)

__all__ = ["Answer", "Attack", "CORPUS", "Target"]
