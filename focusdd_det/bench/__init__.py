"""`focusdd bench`, tools/bench.py: what the machine's floor is and what we take, side by side in one run."""
