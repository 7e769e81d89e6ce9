"""How Sphinx builds these pages: `./scripts/docs`, warnings are errors."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE)]

from commands import reference  # noqa: E402

from roundwise.version import __version__  # noqa: E402

project = "roundwise"
author = "The roundwise authors"
version = release = __version__
extensions = ["myst_parser"]
# Tables and `(`name`)=` targets as GitHub shows them, too.
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"roundwise {__version__}"
html_copy_source = False
exclude_patterns = ["_build"]
nitpicky = True

# The command reference is what --help knows at the time of building: it cannot be out of date.
(HERE / "reference.md").write_text(reference(), encoding="utf-8")
