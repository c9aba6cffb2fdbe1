"""python -m xlinfer.plan, .compile, ..."""
