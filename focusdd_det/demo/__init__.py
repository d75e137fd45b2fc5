"""The embedded default of `make demo`: drawn pictures, a small ViT, a small YOLO teacher.

objects.py      eight drawn objects, and clutter that is none of them
scenes.py       plan a picture from a seed, render it with the boxes of its objects
write.py        class folders of sources; validation pictures with COCO annotations and YOLO labels
train_models.py trains the shipped vit_demo.safetensors and yolo_demo.pt
run.py          the demo itself: the real pipeline on all of this, or on the user's own
"""
