"""Claims of papers put to the test: a declared protocol, its runs as a small table, a verdict, and a page.

    study = Study(name="rates", ..., scales={"small": (Experiment(task="teacher", plan=plan),)}, judge=rate_transfer)
    write_runs(measure(study.experiments("small"), store, machine), folder / "rates-small.csv")
    write_page(study, folder)

`recipes/claims.py` holds the studies of this repository, docs/studies their pages.
"""

from einlinear.lab.studies.evidence import Finding as Finding
from einlinear.lab.studies.evidence import Part as Part
from einlinear.lab.studies.evidence import Table as Table
from einlinear.lab.studies.evidence import verdict as verdict
from einlinear.lab.studies.landscape import rate_transfer as rate_transfer
from einlinear.lab.studies.ordering import ordering as ordering
from einlinear.lab.studies.page import page as page
from einlinear.lab.studies.page import write_page as write_page
from einlinear.lab.studies.pricing import foretold as foretold
from einlinear.lab.studies.pricing import priced as priced
from einlinear.lab.studies.pricing import read_steps as read_steps
from einlinear.lab.studies.pricing import timed as timed
from einlinear.lab.studies.pricing import write_steps as write_steps
from einlinear.lab.studies.protocol import Experiment as Experiment
from einlinear.lab.studies.protocol import Study as Study
from einlinear.lab.studies.protocol import collect as collect
from einlinear.lab.studies.protocol import label as label
from einlinear.lab.studies.protocol import measure as measure
from einlinear.lab.studies.protocol import read_runs as read_runs
from einlinear.lab.studies.protocol import write_runs as write_runs
from einlinear.lab.studies.worth import Question as Question
from einlinear.lab.studies.worth import worth as worth
