"""Write formulas as MathML, which browsers draw without a script and without fetching one."""

import re

from docutils.utils.math import MathError, latex2mathml
from sphinx.errors import ExtensionError


def _mathml(source, node, as_block):
    # docutils does not know these two; parentheses grow by themselves in MathML.
    source = re.sub(r"\\[Bb]ig(?![a-zA-Z])", "", source.strip()).replace(r"\dots", r"\ldots")
    try:
        return latex2mathml.tex2mathml(source, as_block=as_block)
    except MathError as error:
        raise ExtensionError(f"cannot write {source!r} as MathML: {error}") from error


def _inline(self, node):
    self.body.append(_mathml(node.astext(), node, as_block=False))
    raise _skip()


def _block(self, node):
    self.body.append(f'<div class="math-block">{_mathml(node.astext(), node, as_block=True)}</div>')
    raise _skip()


def _skip():
    from docutils.nodes import SkipNode

    return SkipNode()


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
