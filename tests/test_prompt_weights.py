"""Prompt weights are read as the web UI that made them popular reads them; the reference below is its rule, written out."""
import random, re, time

import pytest

from aura_engine.prompt_weights import MOST_WEIGHT, Piece, has_weights, plain_text, weighted

TOKENS = re.compile(r"\\\(|\\\)|\\\[|\\]|\\\\|\\|\(|\[|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|\)|]|[^\\()\[\]:]+|:")


def reference(text):
    """[[text, weight]] with BREAKs as ["BREAK", None]: every closing bracket multiplies what has been read since it opened."""
    found, round_at, square_at = [], [], []

    def multiply(start, factor):
        for piece in found[start:]:
            if piece[1] is not None: piece[1] *= factor

    for m in TOKENS.finditer(text):
        token, weight = m[0], m[1]
        if token.startswith("\\") and len(token) > 1: found.append([token[1:], 1.0])
        elif token == "(": round_at.append(len(found))
        elif token == "[": square_at.append(len(found))
        elif weight is not None and round_at: multiply(round_at.pop(), float(weight))
        elif token == ")" and round_at: multiply(round_at.pop(), 1.1)
        elif token == "]" and square_at: multiply(square_at.pop(), 1 / 1.1)
        else:
            for i, part in enumerate(re.split(r"\s*\bBREAK\b\s*", token)):
                if i: found.append(["BREAK", None])
                found.append([part, 1.0])
    for start in round_at: multiply(start, 1.1)
    for start in square_at: multiply(start, 1 / 1.1)
    return found


def letters(chunks):
    """Each character with its weight, chunks apart: how pieces are joined does not matter."""
    return [[(ch, p.weight) for p in chunk for ch in p.text] for chunk in chunks]


def reference_letters(text):
    chunks = [[]]
    for piece, weight in reference(text):
        if weight is None: chunks.append([])
        else: chunks[-1] += [(ch, min(max(round(weight, 6), -MOST_WEIGHT), MOST_WEIGHT)) for ch in piece]
    return chunks


CASES = ["a fox", "(fox)", "[fox]", "((fox))", "(a (red:1.3) fox)", "a \\(real\\) fox", "a (red:1.3 fox", "fox)", "(fox", "[fox", "([fox)]", "(fox:0)", "(fox:-1.5)",
         "((a:0) b:2)", "a BREAK b", "(a BREAK b:1.2)", "BREAK", "BREAKFAST", "a:b", "(a:b)", "(a:1.2.3)", "(a:.5)", "(a:5.)", "\\", "a\\", "\\\\(a)", "(:1.2)", "(a : 1.2 )", "(🦊:1.2)", ""]


@pytest.mark.parametrize("text", CASES)
def test_weights_are_read_as_the_reference_reads_them(text):
    ours, theirs = letters(weighted(text)), reference_letters(text)
    assert [[ch for ch, _ in c] for c in ours] == [[ch for ch, _ in c] for c in theirs]
    assert all(a[1] == pytest.approx(b[1], abs=2e-6) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))


def test_so_are_random_ones():
    pick = random.Random(5)
    parts = ["(", ")", "[", "]", ":", "1.3", ":1.3)", ":0)", ":-2)", "\\", "\\(", "fox", " ", "BREAK", " BREAK ", "é", "2.", ".5)"]
    for _ in range(2000):
        text = "".join(pick.choices(parts, k=pick.randrange(14)))
        test_weights_are_read_as_the_reference_reads_them(text)


@pytest.mark.parametrize("text", ["(" * 2000, "[" * 2000, "(" * 999 + "x" + ")" * 999, "(x:9)" * 400, "(x:1e9)" * 280, "([" * 1000, ":" * 2000, "\\" * 2000, "BREAK " * 330, "(" * 500 + ":1.1)" * 300, "(x:" + "9" * 1990 + ")"],
                         ids=lambda t: f"{t[:6]}-{len(t)}")
def test_any_prompt_is_read_for_little(text):
    began = time.process_time()
    chunks = weighted(text)
    assert time.process_time() - began < 0.3 and all(abs(p.weight) <= MOST_WEIGHT for c in chunks for p in c) and len(chunks) <= 331


def test_a_prompt_without_weights_is_itself():
    for text in ("a fox, a red barn", "8:30 in the morning", "a fox :)", r"\(o_o\)"):
        assert not has_weights(text) and len(weighted(text)) == 1
    assert weighted("a fox, a red barn") == [[Piece("a fox, a red barn")]] and plain_text("a (red:1.3) fox BREAK on [blue]") == "a red fox on blue"
    assert has_weights("(fox)") and has_weights("a BREAK b")
