"""report: the `tune` document as one HTML file that can be mailed, printed and read on a phone.

    view.py            the document -> words and numbers of the page; nothing in it may be missing from a template
    template.html.j2   the page;  page.css  its looks;  page.js  the picture and the copy buttons
    whatif.js          the section that computes costs and times for what the reader chooses
    keep.js            where the page is served: hands the reader's choices to the server
    echarts.min.js     Apache ECharts, as released; its licence is echarts.LICENSE

Names, prompts and generated text are hostile until escaped. Three walls: Jinja escapes all that is shown, the data
of the picture is JSON without `<`, `>` and `&`, and the page's content security policy runs no script but the two
whose hashes it names, and loads nothing from anywhere.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lowbit.artifact import write_bytes
from lowbit.report.view import view

__all__ = ["render", "write_report"]

_HERE = Path(__file__).parent


def write_report(document: dict[str, Any], path: Path) -> None:
    """Write the `tune` document as a page that needs no other file and no network."""
    write_bytes(path, render(document)[0].encode("utf-8", errors="replace"))


def render(document: dict[str, Any], *, keeps: bool = False) -> tuple[str, str]:
    """The page and its content security policy. With `keeps` it is served, and what its readers choose is sent to the
    server that it came from."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    scripts = {name: (_HERE / name).read_text(encoding="utf-8") for name in ("echarts.min.js", "page.js")}
    page = view(document)
    for name in ("whatif.js", "keep.js") if keeps else ("whatif.js",):
        if page["whatif"]:
            scripts[name] = (_HERE / name).read_text(encoding="utf-8")
    policy = _policy(scripts.values(), keeps)
    html = environment.get_template("template.html.j2").render(
        page,
        data=_json(page["chart"]),
        whatif_json=_json(page["whatif"]),
        css=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        scripts=[Markup(text) for text in scripts.values()],
        policy=policy,
        keeps=keeps,
    )
    return html, policy


def _json(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _policy(scripts: Any, keeps: bool) -> str:
    """Run these scripts only; load nothing, and ask nobody but the server that the page came from."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    asks = " connect-src 'self';" if keeps else ""
    rest = "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {allowed};{asks} {rest}"
