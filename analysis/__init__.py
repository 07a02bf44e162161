"""What finished models show: margins, boundary speeds, costs of a step, and the figures of them.

For analyze.py and bench.py.
"""
