"""A server whose event loop is watched: which callback held it, and for how many seconds of its own processor time.

`python tests/watched.py REPORT`: serves like app.py, and writes one line `seconds name` for each callback of more than 50 ms.
Processor time of the loop's thread is counted, not the clock: a busy machine does not make a good handler a bad one.
"""
import asyncio, sys, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def watch(report):
    run = asyncio.Handle._run

    def measured(self):
        name, before = repr(self._callback)[:200], time.thread_time()
        run(self)
        took = time.thread_time() - before
        if took > 0.05: print(f"{took:.3f} {name}", file=report, flush=True)
    asyncio.Handle._run = measured


if __name__ == "__main__":
    from aura_engine.server import main
    watch(open(sys.argv[1], "w"))
    main([])
