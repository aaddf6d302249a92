"""Clients who ask for pictures again and again while something happens, and what they were answered."""
import socket, threading, time
from collections import Counter

import httpx


def under_load(url, clients, body, during, lead=2):
    """Ask `clients` at a time for pictures while `during()` runs, `lead` seconds before it and until it is over -> how often each kind of answer came."""
    answers, over = Counter(), threading.Event()
    def one(seed):
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as web:
            while not over.is_set():
                try: kind = kind_of(web.post("/generate", json=body | {"seed": seed}))
                except httpx.HTTPError as error: kind = type(error).__name__
                answers[kind] += 1
                if not kind.startswith("200"): time.sleep(.2)
    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(clients)]
    for thread in threads: thread.start()
    time.sleep(lead)
    try: during()
    finally:
        over.set()
        for thread in threads: thread.join(120)
    return dict(answers)


def kind_of(answer):
    """A picture, a refusal that says when to come back, or what else it is."""
    media = answer.headers.get("content-type", "")
    if answer.status_code == 200 and media == "application/json": return "200"
    ours = media == "application/problem+json" and answer.json()["type"].startswith("urn:aura:")
    return f"{answer.status_code}" + (" with Retry-After" if ours and "retry-after" in answer.headers else f" {media}")


def listens(port):
    with socket.socket() as s: return s.connect_ex(("127.0.0.1", port)) == 0


def until(so, seconds=180):
    end = time.monotonic() + seconds
    while not so():
        if time.monotonic() > end: raise TimeoutError
        time.sleep(.3)
