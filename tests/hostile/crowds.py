"""Many requests of one client: each is in order, together they are more than a share."""
import json

from .attack import MiB, http, question, row
from .bodies import receipt


def jobs(n, **headers):
    """Long jobs, each of four pictures and as many steps as there are."""
    body = json.dumps({"route": "generate", "request": {"prompt": "an owl", "n": 4, "steps": 50}}).encode()
    return lambda host: [http(host, "/jobs", body, **{k: v(i) for k, v in headers.items()}) for i in range(n)]


# of the embedded model, by its rule for sizes
SHAPES = [(64, 224), (80, 192), (80, 208), (80, 224), (96, 160), (96, 192), (112, 144), (112, 160), (128, 128), (144, 112), (160, 96), (160, 112), (192, 80), (192, 96), (208, 80), (224, 64), (224, 80)]
RATIOS = ["1:3", "2:5", "3:7", "1:2", "4:7", "3:5", "2:3", "3:4", "4:5", "1:1", "5:4", "4:3", "3:2", "5:3", "7:4", "2:1", "3:1"]

CROWDS = (
    row("17 shapes", "shapes that are compiled", lambda host: [question(host, "/replay", receipt=receipt(width=w, height=h)) for w, h in SHAPES], {200, 429}, cpu=60, rss=500 * MiB, answer=MiB),
    row("17 aspect ratios", "shapes that are compiled", lambda host: [question(host, prompt="an owl", steps=1, aspectRatio=r) for r in RATIOS], {200, 429}, cpu=60, rss=500 * MiB, answer=MiB),
    row("200 refused requests", "work of one client", lambda host: [question(host, prompt="", steps=1)] * 200, {422, 429}, cpu=6, at_once=8),
    row("240 cheap questions, 60 at once", "work of one client", lambda host: [http(host, "/metrics", kind="", method="GET"), question(host, prompt=""), http(host, "/openapi.json", kind="", method="GET")] * 80, {200, 422}, cpu=10, at_once=60, answer=MiB),
    row("300 kept jobs of one step", "jobs that are kept", lambda host: [http(host, "/jobs", json.dumps({"route": "generate", "request": {"prompt": "an owl", "n": 4, "steps": 1}}).encode())] * 300, {202, 429}, cpu=60, at_once=4, rss=300 * MiB),
    row("60 jobs of 200 steps", "work that waits", jobs(60), {202, 429}, cpu=60, at_once=4),
    row("60 jobs of 200 steps under forged addresses", "shares of clients", jobs(60, x_forwarded_for=lambda i: f"203.0.113.{i}", forwarded=lambda i: f"for=203.0.113.{i}", x_real_ip=lambda i: f"203.0.113.{i}"), {202, 429}, cpu=60, at_once=4),
)
