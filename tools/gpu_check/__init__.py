"""Checks and measures every kernel and the engine on the accelerator at hand, from the source tree.

`__main__` runs the parts, each op in a process of its own (worker.py), and gathers what they
report; the parts are modules: ceilings, correctness, timing, torch_timing, engine, artifact,
tuning.
"""
