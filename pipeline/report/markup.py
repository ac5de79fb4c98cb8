"""HTML and SVG that cannot be built unescaped: text is escaped wherever it enters, only `tag` makes markup.

What comes out is well-formed XML too, so that tests can parse a whole page.
"""

from __future__ import annotations

import html
import re
from typing import Any

_WITHOUT_CONTENT = frozenset({"meta", "br", "hr", "line", "circle", "rect", "path", "polyline", "polygon"})
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0010ffff]")
"""Control characters and halves of surrogate pairs, which a model may write and neither HTML nor UTF-8 can hold."""


class Markup(str):
    """Text that is markup already. Made by `tag`, `joined` and `raw`; everything else is escaped."""


Content = str | int | float | None
"""What `tag` takes: None is left out, a str is escaped unless it is Markup."""


def raw(text: str) -> Markup:
    """Markup from a constant of this package, never from data."""
    return Markup(text)


def escaped(text: Content) -> Markup:
    """Text as it stands in markup; characters that no file can hold become U+FFFD."""
    if text is None:
        return Markup("")
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(_FORBIDDEN.sub("\ufffd", str(text)), quote=True))


def joined(*parts: Content, between: str = "") -> Markup:
    """The parts one after the other."""
    return Markup(between.join(escaped(part) for part in parts if part is not None))


def tag(name: str, *content: Content, **attributes: Any) -> Markup:
    """One element.

    Args:
        content: what it holds, escaped.
        attributes: `stroke_width=2` is `stroke-width="2"`, `class_="x"` is `class="x"`; None is left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _WITHOUT_CONTENT and not content:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{joined(*content)}</{name}>")


def _short(value: Any) -> Any:
    """Pixels to a hundredth: more digits only make the file larger."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
