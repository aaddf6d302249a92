"""Servers side by side: the questions about manners find what they look for, and the tables are read off the figures."""
import json, sys

from aura_engine import peers
from conftest import ROOT

# What is often wrong in such a server: seed 0 is no seed, width and height change places, and work goes on for nobody.
RUDE = """
import random, sys, time, uvicorn
from PIL import Image
from aura_engine.plain_server import plain_app

def draw(p):
    if p.seed: random.seed(p.seed)
    end = time.process_time() + p.steps / 50
    while time.process_time() < end: pass
    return Image.new("RGB", (p.height, p.width), tuple(random.randbytes(3)))

uvicorn.run(plain_app(draw), host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
"""


def test_the_questions_find_bad_manners():
    host, port = peers.free_address()
    url = f"http://{host}:{port}"
    with peers.process_of([sys.executable, "-c", RUDE, port], url + "/health"):
        found = peers.manners_of(peers.Peer(url, "/generate", peers.plain_body), steps=40)
    assert not found.seed_zero and found.size == "160 × 96"
    assert found.worked > 0.7 and found.wasted > found.worked / 3          # it draws for 0.8 s of processor time
    assert found.health > 0 and found.megabytes > 10
    assert peers.seed_said(found) == "another picture each time"


def row(name, clients, rate, **more):
    spread = dict(median=rate, least=rate, most=rate)
    return {"contender": name, "clients": clients, "throughput": spread, "p50": dict(spread, median=100 / rate), "gain": spread, **more}


def test_a_peer_that_is_ahead_is_named_with_both_figures():
    results = {"rows": [row(peers.HF_SERVE, 1, 2.0), row(peers.GENAI_SERVER, 1, 9.0), row(peers.AS_IT_COMES, 1, 8.0)],
               "health": {peers.GENAI_SERVER: 3.0, peers.AS_IT_COMES: 4.0}, "ready": {peers.HF_SERVE: 9.0, peers.AS_IT_COMES: 8.0}}
    said = peers.peers_ahead(results)
    assert peers.GENAI_SERVER in said and "9 pictures/s against 8" in said and peers.HF_SERVE not in said
    lighter = peers.lighter_peers(results)
    assert "3 ms against 4" in lighter and peers.HF_SERVE not in lighter


def test_a_file_from_before_a_column_existed_is_shown_without_it():
    old = json.loads((ROOT / "nbs" / peers.PEER_RESULTS).read_text())
    for r in old["rows"]: r.pop("p95", None)
    for key in ("healthWorst", "manners", "ready"): old.pop(key, None)
    head = peers.peers_table(old).splitlines()[0]
    assert "p50 ms" in head and "× hf-serve" in head and "p95" not in head and "worst" not in head
    assert peers.manners_table(old).count("\n") == 1                       # a head without rows
