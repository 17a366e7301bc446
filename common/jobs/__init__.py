"""Many runs of one comparison: read from a YAML file (`plan`), known by what they read (`state`), run side by side
(`pool`)."""

from common.jobs.plan import Run, plan
from common.jobs.pool import Ended, run_all
from common.jobs.state import State, refuse_others, state_of, table

__all__ = ["Ended", "Run", "State", "plan", "refuse_others", "run_all", "state_of", "table"]
