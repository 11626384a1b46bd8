"""Give every page a description for search engines and link previews: its first paragraph, unless it states one."""

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


def setup(app):
    app.connect("html-page-context", _describe)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
