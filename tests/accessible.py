"""What a screen reader is told: Chromium's own accessibility tree below an element, through shadow roots."""

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
