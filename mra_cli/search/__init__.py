"""Finds, site by site, the cheapest settings that keep what has to be kept.

In the spirit of AxFormer (Nagarajan et al., arXiv 2010.03688), which approximates where a model's
accuracy does not mind. There candidates are tried greedily, one after the other; here harm is
foretold from each site's error and from how much the model minds it (`mra_cli.forecast`), so a plan
for all sites together follows from a knapsack, and joint runs are for plans that are worth one.
"""

from mra_cli.search.report import SearchReport
from mra_cli.search.run import search
from mra_cli.search.target import FIGURES, Target
from mra_cli.search.workbench import BUDGETS, SearchSetup

__all__ = ["BUDGETS", "FIGURES", "SearchReport", "SearchSetup", "Target", "search"]
