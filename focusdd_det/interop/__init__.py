"""A finished set for other people's programs: COCO JSON, other benchmarks' folders, one tar, a card with results.

finished.py   a set that is read with every byte checked
folders.py    a folder that appears whole or not at all
coco.py       detection set -> COCO JSON;  layouts.py: classification set -> DD-Ranking, RethinkDC
tar.py        the headers of a plain tar;  pack.py: set or store <-> one tar
annotations.py  YOLO labels -> COCO JSON, so that a data set without one can be measured
card.py       the set's card with measured numbers;  commands.py: the command line of all these
"""
