"""Sphinx: ``python -m sphinx -W --keep-going -b html docs site``. A broken link or anchor is a warning, and fails."""

project = "sdpo-conformance"
author = "the sdpo-conformance authors"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["examples"]
html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_extra_path = ["results/published"]
html_show_copyright = False
html_copy_source = False
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
nitpicky = True
suppress_warnings = ["misc.highlighting_failure"]
