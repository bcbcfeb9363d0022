"""Searches for structures that spend compute or time better than dense.

plan = default_search(task)
searched = search(plan, task, store)
"""

from einlinear.lab.search.explain import explain as explain
from einlinear.lab.search.explain import told as told
from einlinear.lab.search.plan import SearchPlan as SearchPlan
from einlinear.lab.search.plan import default_search as default_search
from einlinear.lab.search.searching import Explored as Explored
from einlinear.lab.search.searching import Searched as Searched
from einlinear.lab.search.searching import explore as explore
from einlinear.lab.search.searching import recalled as recalled
from einlinear.lab.search.searching import search as search
