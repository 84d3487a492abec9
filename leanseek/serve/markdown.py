"""A model's Markdown to HTML that is safe to show, whatever the model wrote.

Two nets, one behind the other: the parser passes no HTML through, and of what it makes only the few tags and
attributes listed here survive the cleaner. Nothing that is left can run, or load anything from anywhere: images stay
links, and links lead to the web or to mail.
"""

import nh3
from markdown_it import MarkdownIt

TAGS = {
    *("p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "ul", "ol", "li"),
    *("strong", "em", "s", "code", "pre", "a", "table", "thead", "tbody", "tr", "th", "td"),
}
ATTRIBUTES = {"a": {"href", "title"}, "code": {"class"}, "ol": {"start"}}
SCHEMES = {"http", "https", "mailto"}
LANGUAGE = "language-"


class Renderer:
    """Renders one text after the other."""

    def __init__(self) -> None:
        self._markdown = MarkdownIt("commonmark", {"html": False, "linkify": False, "langPrefix": LANGUAGE})
        self._markdown.enable(["table", "strikethrough"]).disable("image")

    def __call__(self, text: str) -> str:
        return nh3.clean(
            self._markdown.render(text),
            tags=TAGS,
            attributes=ATTRIBUTES,
            attribute_filter=_attribute,
            url_schemes=SCHEMES,
            link_rel="noopener noreferrer nofollow",
            set_tag_attribute_values={"a": {"target": "_blank"}},
        )


def _attribute(tag: str, name: str, value: str) -> str | None:
    """A class says only which language a block of code is in."""
    if name == "class":
        word = value.split(maxsplit=1)[0] if value.split() else ""
        return word if word.startswith(LANGUAGE) and word.replace("-", "").replace("+", "").isalnum() else None
    if name == "href" and not value.lower().startswith(tuple(f"{scheme}:" for scheme in SCHEMES)):
        return None  # relative links would lead into the service itself
    return value
