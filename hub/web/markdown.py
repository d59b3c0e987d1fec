"""Cards as HTML: no raw HTML, an allow-list of elements, pictures only from the repo itself."""

import posixpath
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from hub.adapters.items import PreviewItem

# Comments, and the element that Hugging Face puts its gallery for: our pages show theirs anyway.
_NOT_SHOWN = re.compile(r"<!--.*?-->|<Gallery\s*/?>", re.DOTALL)


def _as_text(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    """HTML in a card is shown as it was typed; comments are for the author and are not shown."""
    text = escape(_NOT_SHOWN.sub("", tokens[index].content).strip("\n"))
    return f"<p>{text}</p>\n" if tokens[index].type == "html_block" and text else text


# HTML is recognised so that comments can be dropped; what it is rendered by only escapes it.
_markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])
_markdown.add_render_rule("html_block", _as_text)
_markdown.add_render_rule("html_inline", _as_text)
_TAGS = {"a", "blockquote", "br", "code", "del", "em", "hr", "img", "pre", "s", "strong"}
_TAGS |= {"h1", "h2", "h3", "h4", "h5", "h6", "li", "ol", "p", "ul"}
_TAGS |= {"table", "tbody", "td", "th", "thead", "tr"}
_ATTRIBUTES = {
    "a": {"href", "title"},
    "img": {"src", "alt", "title", "width", "height", "loading"},
    "ol": {"start"},
}


def card_html(body: str, repo_url: str, previews: Mapping[str, PreviewItem]) -> Markup:
    """`previews` are the pictures that may be shown, by path."""
    tokens = _markdown.parse(body)
    for token in tokens:
        for child in token.children or ():
            if child.type == "image":
                _picture(child, previews)
            elif child.type == "link_open":
                child.attrSet("href", _target(str(child.attrGet("href") or ""), repo_url))
    html = _markdown.renderer.render(tokens, _markdown.options, {})
    clean = nh3.clean(
        html,
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
    )
    return Markup(clean)


def _picture(token: Token, previews: Mapping[str, PreviewItem]) -> None:
    """A picture of the repo becomes its thumbnail; any other one becomes its description."""
    path = _path(str(token.attrGet("src") or ""))
    if path is not None and path in previews:
        preview = previews[path]
        token.attrSet("src", preview.thumb(640))
        token.attrSet("loading", "lazy")
        return
    token.type = "text"
    token.tag = ""
    token.content = f"[picture: {token.content}]" if token.content else "[picture]"


def _target(href: str, repo_url: str) -> str:
    path = _path(href)
    return href if path is None else f"{repo_url}/blob/main/{quote(path)}"


def _path(href: str) -> str | None:
    """The path inside the repo that a relative reference means, or None for all others."""
    parts = urlsplit(href)
    if parts.scheme or parts.netloc or not parts.path or parts.path.startswith("/"):
        return None
    path = posixpath.normpath(unquote(parts.path))
    return None if path.startswith("..") else path
