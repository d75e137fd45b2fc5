"""What a distilled set holds, in numbers and pictures: `focusdd stats`.

Pure maths, a file each: sizes, snr, diversity, duplicates, hessian. Edges: collect (reads a set), reference (COCO),
features (a ViT), curves (results.csv), table and plots (what people look at), command.
"""
