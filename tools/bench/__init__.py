"""Benchmarks: each module here but `report` measures one thing and returns it from `main`."""
