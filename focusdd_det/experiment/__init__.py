"""Experiments: a grid of builds, trainings and evaluations from one file, ending in one table and a plot.

spec.py (file -> arms), grid.py (arms), settings.py (what an arm's stages are given), stages.py (their keys and places),
runner.py (runs what is not there), child.py (one stage in a process of its own), distill.py (the arm that Ultralytics
trains by itself), results.py (what was measured, a line each), statistics.py, table.py, plot.py; preview.py is the dry
run, command.py the command line.
"""
