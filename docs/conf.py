"""Sphinx: ``pip install '.[docs]' && sphinx-build -W docs build/docs``."""

from importlib import metadata

project, author = "tpt_fast", "the authors of tpt_fast"
copyright = author
release = metadata.version("tpt_fast")
html_title = f"tpt_fast {release}"

extensions = [
    "myst_nb",  # myst_parser, and notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # pages that are included here link within the repository
nb_execution_mode = "force"  # the notebook is kept without its outputs
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_output_stderr = "remove"
nb_merge_streams = True
html_theme = "furo"
html_static_path = ["pictures"]
exclude_patterns = ["pictures/README.md"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_type_aliases = {"ImageLike": "ImageLike"}
napoleon_use_ivar = True
intersphinx_mapping = {}  # builds offline
