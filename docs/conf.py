"""Sphinx's settings: ``python -m sphinx -W -b html docs build/docs``, with fusedcnn installed."""

import fusedcnn

project = "fusedcnn"
copyright = "the fusedcnn contributors"
release = version = fusedcnn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "pydata_sphinx_theme"
html_title = "fusedcnn"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navbar_center": [], "show_toc_level": 2, "navigation_with_keys": False}
html_sidebars = {"**": ["pages"]}
templates_path = ["_templates"]
html_show_sourcelink = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say it in words
myst_heading_anchors = 3
nitpick_ignore = [("myst", "../examples/serve")]  # a folder: no page, and no file to download
