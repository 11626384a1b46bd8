"""Takes the picture of each code block for the gallery: the figure that its last line gives, as a notebook shows it.

sphinx-gallery's own way asks pyplot for its figures, which does not know those of captum_xnn.
"""

from matplotlib import pyplot
from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst


def scrape(block, block_vars, gallery_conf):
    """Returns reStructuredText with the block's picture, if it has one."""
    given = block_vars["example_globals"].pop("___", None)
    # The gallery looks at the last line's value once more; a later block without one must not find this one's.
    block_vars["example_globals"]["___"] = None
    pyplot.close("all")
    if not isinstance(given, Figure):
        return ""
    path = next(block_vars["image_path_iterator"])
    given.savefig(path, dpi=110)
    titles = [axes.get_title().replace("\n", " ") for axes in given.axes]
    return figure_rst([path], gallery_conf["src_dir"], ", ".join(title for title in titles if title))
