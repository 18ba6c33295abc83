"""Sphinx: ``pip install '.[docs]' && sphinx-build -W docs build/docs``."""

from importlib import metadata

project, author = "tpt_fast", "the authors of tpt_fast"
copyright = author
release = metadata.version("tpt_fast")
html_title = f"tpt_fast {release}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # pages that are included here link within the repository
html_theme = "furo"
html_static_path = ["pictures"]
exclude_patterns = ["pictures/README.md"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_type_aliases = {"ImageLike": "ImageLike"}
napoleon_use_ivar = True
intersphinx_mapping = {}  # builds offline
