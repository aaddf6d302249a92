"""What a screen reader is told: Chromium's own accessibility tree below an element, through shadow roots, and what axe finds.

`AURA_AXE=1` lets axe look at every width, light and dark, in every state. Without it, each test names what it looks at."""
import os

import pytest

EVERY_WIDTH = (320, 360, 620, 1040, 1600, 1680, 3840)

NAMED = {"button", "textbox", "slider", "radio", "checkbox", "combobox", "listbox", "option", "progressbar", "img",
         "table", "columnheader", "rowheader", "group", "radiogroup", "application", "link", "image"}


def tree(page, selector):
    """The tree below the first element of `selector`, as (role, name), without what is hidden from it."""
    devtools = page.context.new_cdp_session(page)
    found = devtools.send("Runtime.evaluate", {"expression": f"document.querySelector({selector!r})"})
    nodes = devtools.send("Accessibility.queryAXTree", {"objectId": found["result"]["objectId"]})["nodes"]
    devtools.detach()
    said = lambda node, what: node.get(what, {}).get("value", "")
    return [(said(node, "role"), said(node, "name")) for node in nodes if not node["ignored"]]


def check(nodes, *wanted):
    """Everything that can be used or seen has a name, and `wanted` is there."""
    assert not [role for role, name in nodes if role in NAMED and not str(name).strip()], nodes
    assert not [one for one in wanted if one not in nodes], nodes


def violations(page, selector=None):
    """What axe finds, within the elements of `selector`."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed").Axe()
    found = axe.run(page, context=selector and {"include": [[selector]]}).response["violations"]
    return [(v["id"], [n["html"][:120] for n in v["nodes"]]) for v in found]


def wear(page, scheme, host="#studio"):
    """Light or dark, by the system's setting or by Lab's theme. It returns when the Studio looks so."""
    if host == "#studio": page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    else: page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", f"JupyterLab {scheme.title()}")
    page.wait_for_function("([host, dark]) => document.querySelector(host).hasAttribute('data-dark') === dark", arg=[host, scheme == "dark"])
    page.wait_for_timeout(200)                              # Lab has transitions


def no_violations(page, host="#studio", schemes=("light", "dark")):
    """axe finds nothing in the Studio of `host` (on its own page, nowhere), light and dark."""
    before = page.viewport_size
    for width in EVERY_WIDTH if os.environ.get("AURA_AXE") else (before["width"],):
        page.set_viewport_size({**before, "width": width})
        for name in ("light", "dark") if os.environ.get("AURA_AXE") else schemes:
            wear(page, name, host)
            assert violations(page, None if host == "#studio" else host) == [], (width, name)
    page.set_viewport_size(before)
