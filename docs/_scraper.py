"""Take the picture of each code block for the gallery: the figure or the report that its last line gives.

sphinx-gallery's own way asks pyplot for its figures, which does not know those of captum_xnn.
"""

import shutil
from pathlib import Path

from matplotlib import pyplot
from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst

REPORTS = Path(__file__).parent / "_reports"
"""Reports that the pages show; the build copies them into the site."""


def scrape(block, block_vars, gallery_conf):
    """Return reStructuredText with the block's picture or report, if it has one."""
    given = block_vars["example_globals"].pop("___", None)
    # The gallery looks at the last line's value once more; a later block without one must not find this one's.
    block_vars["example_globals"]["___"] = None
    pyplot.close("all")
    if isinstance(given, Path) and given.suffix == ".html":
        return _report(given)
    if not isinstance(given, Figure):
        return ""
    path = next(block_vars["image_path_iterator"])
    given.savefig(path, dpi=110)
    titles = [axes.get_title().replace("\n", " ") for axes in given.axes]
    return figure_rst([path], gallery_conf["src_dir"], ", ".join(title for title in titles if title))


def _report(path):
    REPORTS.mkdir(exist_ok=True)
    shutil.copy(path, REPORTS / path.name)
    place = f"../reports/{path.name}"
    return f"""
.. raw:: html

    <iframe src="{place}" class="report" title="The report" loading="lazy"></iframe>
    <p><a href="{place}">Open the report by itself</a></p>
"""


def copy_reports(app, exception):
    """Copy the reports into the site, at the end of the build."""
    if exception is None and REPORTS.is_dir():
        shutil.copytree(REPORTS, Path(app.outdir, "reports"), dirs_exist_ok=True)
