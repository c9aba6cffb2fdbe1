"""Arrays in, arrays out; knows no model. Every op is a folder with the same file names:
`reference.py` is its definition and the CPU path, `cases.py` the shapes that tests and
benchmarks run, `mosaic_gpu.py` and `mosaic_tpu.py` the kernels.
"""
