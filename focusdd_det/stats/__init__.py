"""What a distilled set holds, in numbers and pictures: `focusdd stats`.

Pure maths, a file each: sizes, snr, diversity, duplicates, hessian. Edges: collect (reads a set), reference (COCO),
features (a ViT), curves (results.csv), curvature (a trained student on the set; _det and _cls say how), summary and
plots (what people look at), command. size_match is `focusdd grids`: the grids whose boxes come nearest to a reference.
"""
