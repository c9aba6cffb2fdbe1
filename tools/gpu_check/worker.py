"""`python -m tools.gpu_check.worker PART JOB`: one part for some ops, JOB being JSON."""

import importlib
import json
import sys
import time
from collections.abc import Sequence

from tools.gpu_check.job import Job


def main(argv: Sequence[str]) -> None:
    part, text = argv
    fields = json.loads(text)
    deadline = time.monotonic() + fields.pop("seconds")
    job = Job(part=part, deadline=deadline, **fields | {"ops": tuple(fields["ops"])})
    importlib.import_module(f"tools.gpu_check.{part}").main(job)


if __name__ == "__main__":
    main(sys.argv[1:])
