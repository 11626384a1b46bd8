"""Sphinx configuration. The build fetches nothing from the network."""

import os
import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for _scraper, _mathml and _meta

# A day before the first progress bar: those of the quickstart would bury warnings. (TQDM_DISABLE yields to arguments.)
os.environ["TQDM_DELAY"] = "86400"

import torch  # may import tqdm, which reads the setting
from _scraper import copy_reports
from sphinx.addnodes import desc_addname, desc_signature

# The quickstart's models are tiny: threads would wait for each other where the machine is busy.
torch.set_num_threads(1)

# The tutorials import torchvision, also where it was built for CUDA and torch was not: two operators must be declared.
if not hasattr(torch.ops.torchvision, "nms"):
    _library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

project = "captum_xnn"
author = "the captum_xnn authors"
copyright = "2026, the captum_xnn authors"
release = version = installed("captum-xnn")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "matplotlib.sphinxext.plot_directive",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "_mathml",
    "_meta",
]
exclude_patterns = ["_build", "_reports", "examples", "tutorial_scripts"]
templates_path = ["_templates"]
html_theme = "pydata_sphinx_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_math_renderer = "mathml"
html_last_updated_fmt = None
# Pages without a section of their own have an empty sidebar; they get its width.
html_sidebars = {name: [] for name in ("index", "quickstart", "search", "genindex", "py-modindex", "_modules/**")}
html_theme_options = {
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "navbar_align": "left",
    "navbar_persistent": ["search-button"],
    "footer_start": ["copyright"],
    "footer_center": ["version"],
    "footer_end": ["sphinx-version"],
}
html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = True

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Differs from the paper", "Conventions", "Metrics", "Reference"]

# The quickstart's code runs at build; an exception in it is a warning, which -W makes an error.
plot_include_source = True
# Shows a figure as notebooks do: plots are collected from pyplot, which has not made the package's figures.
plot_pre_code = "from matplotlib.pyplot import figure as display"
plot_html_show_source_link = False
plot_html_show_formats = False
plot_formats = [("png", 110)]
plot_rcparams = {"figure.max_open_warning": 50}

# The gallery's scripts run at build, too, one after another; an exception in one ends the build.
sphinx_gallery_conf = {
    "examples_dirs": ["tutorial_scripts", "examples"],
    "gallery_dirs": ["tutorials", "gallery"],
    "filename_pattern": "/",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": ("_scraper.scrape",),
    "capture_repr": (),
    "backreferences_dir": None,
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "thumbnail_size": (480, 240),
}


def setup(app):
    """Copy the reports that tutorials wrote, and let autodoc find names that are imported when they are first used."""
    from captum_xnn import cli, study

    for module in (cli, study):
        for name in module.__all__:
            setattr(module, name, getattr(module, name))
    app.connect("autodoc-process-docstring", _keep_colons, priority=400)
    app.connect("doctree-read", _name_as_imported)
    app.connect("build-finished", copy_reports)


def _name_as_imported(app, doctree):
    """Give the types that functions return, which are documented in their own modules, an anchor in the package too.

    viewcode links every name of a source file below the module that documents the first of them. That is the package,
    where functions are imported from. The private module is not shown, as users do not import from it.
    """
    for signature in doctree.findall(desc_signature):
        package, _, module = signature.get("module", "").rpartition(".")
        if module.startswith("_"):
            signature["ids"].append(f"{package}.{signature['fullname']}")
            for shown in list(signature.findall(desc_addname)):
                shown.parent.remove(shown)


def _keep_colons(app, what, name, obj, options, lines):
    """Keep napoleon from taking the words before a colon in an attribute's docstring for its type."""
    if what in ("attribute", "data", "property") and lines:
        lines[:0] = ["..", ""]  # an empty comment, which has no colon
