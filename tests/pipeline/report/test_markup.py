"""Nothing gets into a page unescaped."""

from __future__ import annotations

from xml.etree import ElementTree

from hedgehog.pipeline.report.markup import escaped, joined, raw, tag


def test_text_and_attributes_are_escaped_and_markup_is_not_escaped_twice():
    inner = tag("b", "<script>alert('x')</script> & more", title='"quoted" <i>')
    assert "<script>" not in inner
    element = ElementTree.fromstring(tag("p", inner, " & ", raw("<i>fine</i>")))
    (bold, italic) = element
    assert (bold.text, bold.attrib) == ("<script>alert('x')</script> & more", {"title": '"quoted" <i>'})
    assert (bold.tail, italic.text) == (" & ", "fine")


def test_names_of_attributes_and_what_is_none():
    assert (
        tag("line", x1=1, stroke_width=2.5, class_="grid", y2=None) == '<line x1="1" stroke-width="2.5" class="grid"/>'
    )
    assert tag("td", None) == "<td></td>" and tag("td", 0) == "<td>0</td>"
    assert joined("a<", None, tag("b"), between=" ") == "a&lt; <b></b>"


def test_pixels_have_two_digits():
    assert tag("line", x1=1 / 3, y1=200.0, y2=-0.001) == '<line x1="0.33" y1="200" y2="-0"/>'


def test_what_no_file_can_hold_is_replaced():
    """A model may write any of them: NUL, an escape character, half of a surrogate pair."""
    text = escaped("a\x00b\x1bc\ud800d\ufffee\tf\ng é 🦔")
    assert text == "a\ufffdb\ufffdc\ufffdd\ufffde\tf\ng é 🦔"
    text.encode()
    ElementTree.fromstring(tag("p", text))
