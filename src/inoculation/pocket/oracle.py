"""The pocket world's exact judge."""

from inoculation.judge.exact import ExactJudge
from inoculation.pocket.world import all_templates

ORACLE = ExactJudge(all_templates())
shows = ORACLE.shows
place = ORACLE.place
