"""Reports as pages: one file each, nothing loaded from elsewhere, no scripts.

What can be switched is a radio button or a `details` element, so keyboards reach it and printers
show it; colours follow the reader's light or dark theme.
"""

from mra_cli.pages.analysis import analyze_page
from mra_cli.pages.searched import search_page

__all__ = ["analyze_page", "search_page"]
