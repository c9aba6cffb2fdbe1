"""python -m xlinfer.score: batch jobs."""

import sys
from functools import partial

from xlinfer.score.command import main
from xlinfer.score.engine import build_worker
from xlinfer.score.flags import Tasks, define_task_options
from xlinfer.score.options import TASKS, TaskOptions
from xlinfer.score.scorer import make_scorer

ALL = Tasks(
    table=TASKS,
    define=define_task_options,
    options=TaskOptions,
    make_worker=partial(build_worker, make_scorer),
)

if __name__ == "__main__":
    sys.exit(main(sys.argv, ALL))
