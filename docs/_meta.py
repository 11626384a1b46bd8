"""Give every page a description, and pages of source code links that lead to the documentation.

A description is for search engines and link previews: the page's first paragraph, unless the page states one.
"""

import re
from html import escape

from docutils import nodes

LENGTH = 160


def _describe(app, pagename, templatename, context, doctree):
    tags = context.get("metatags", "")
    if 'name="description"' in tags:
        return
    text = ""
    for paragraph in doctree.findall(nodes.paragraph) if doctree is not None else ():
        text = " ".join(paragraph.astext().split())
        if len(text) > 30:
            break
    text = text or f"{context.get('title') or app.config.project}: documentation of {app.config.project}"
    if len(text) > LENGTH:
        text = text[:LENGTH].rsplit(" ", 1)[0] + " ..."
    context["metatags"] = f'{tags}\n<meta name="description" content="{escape(text, quote=True)}">'


def _lead_back(app, pagename, templatename, context, doctree):
    """Correct the links from source code to names that two pages document: viewcode mixes their pages up."""
    if not pagename.startswith("_modules/"):
        return
    objects = app.env.get_domain("py").objects

    def corrected(match):
        names = (match[3], f"{match[2].removeprefix('generated/')}.{match[3].rpartition('.')[2]}")
        for name in names:
            if name in objects:
                return f'href="{match[1]}{objects[name].docname}.html#{name}"'
        return match[0]

    context["body"] = re.sub(r'href="((?:\.\./)+)(generated/[\w.]+)\.html#([\w.]+)"', corrected, context["body"])


def setup(app):
    app.connect("html-page-context", _describe)
    app.connect("html-page-context", _lead_back)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
