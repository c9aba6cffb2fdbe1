"""One model over several hosts: rank 0 schedules and tells the others each program to run.

Every rank has the same programs and its own part of the weights. Rank 0 sends what a program takes
from the host, fixed bytes under an HMAC, and compares the tokens that each rank sampled. Whatever
goes wrong ends all ranks.
"""
