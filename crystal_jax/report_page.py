"""The report's HTML: one page that carries its style and its pictures with it.

Invariant: no address outside the page and no script; every text that comes from a run is escaped.
"""

import base64
import html
from collections.abc import Iterable, Sequence
from string import Template

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; --ink: #22272e; --grey: #57606a; --line: #d8dee4; --pale: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1040px; padding: 36px 28px 64px; color: var(--ink); background: #fff;
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 30px; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 40px 0 10px; }
.sub { color: var(--grey); margin: 4px 0 22px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); gap: 12px; }
.card { background: var(--pale); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.card b { display: block; font-size: 23px; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card span, figcaption, .note { color: var(--grey); font-size: 13px; }
.text { border-left: 4px solid #2f7cc4; } .code { border-left: 4px solid #ec7a1c; }
.bar { height: 6px; border-radius: 3px; background: var(--line); margin: 18px 0 0; overflow: hidden; }
.bar div { height: 100%; background: #1a7f5a; }
figure { margin: 16px 0 26px; } img { width: 100%; display: block; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--grey); font-weight: 600; border-bottom: 2px solid var(--line); padding: 5px 10px; }
td { border-bottom: 1px solid var(--line); padding: 5px 10px; }
.n { text-align: right; }
.scroll { max-height: 440px; overflow-y: auto; margin-bottom: 26px; }
@media print { .scroll { max-height: none; } }
</style>
</head>
<body>
$body
</body>
</html>
""")


def page(title: str, parts: Iterable[str]) -> str:
    return PAGE.substitute(title=html.escape(title), body="\n".join(parts))


def header(title: str, subtitle: str, done: float) -> str:
    """The name, a line about the run, and a bar for the share that is done."""
    return (f"<h1>{html.escape(title)}</h1>\n<p class='sub'>{html.escape(subtitle)}</p>\n"
            f"<div class='bar' style='margin:0 0 18px'><div style='width:{done:.2%}'></div></div>")


def cards(items: Iterable[tuple[str, str, str, str]]) -> str:
    """(what, value, a word about it, class) each: `class` is a domain or nothing."""
    return "<div class='cards'>" + "\n".join(
        f"<div class='card {kind}'><span>{html.escape(what)}</span><b>{html.escape(value)}</b>"
        f"<span>{html.escape(about)}</span></div>" for what, value, about, kind in items) + "</div>"


def section(title: str, *parts: str) -> str:
    return "\n".join([f"<h2>{html.escape(title)}</h2>", *parts])


def picture(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    text = html.escape(caption)
    return f"<figure><img alt='{text}' src='data:image/png;base64,{data}'><figcaption>{text}</figcaption></figure>"


def note(text: str) -> str:
    return f"<p class='note'>{html.escape(text)}</p>"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts; a column whose name starts with "#" holds numbers and is set to the right."""
    classes = [" class='n'" if column.startswith("#") else "" for column in columns]

    def line(tag: str, cells: Iterable[str]) -> str:
        pairs = zip(cells, classes, strict=True)
        return "<tr>" + "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for cell, kind in pairs) + "</tr>"

    head = line("th", [column.lstrip("#") for column in columns])
    body = "\n".join(line("td", row) for row in rows)
    return f"<div class='scroll'><table><thead>{head}</thead>\n<tbody>{body}</tbody></table></div>"
