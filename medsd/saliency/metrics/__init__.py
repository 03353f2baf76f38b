"""How good attribution maps are: tensors in, one number an image out, so that intervals can be drawn over images.

- Does the class go with the pixels that a map names? `insertion_deletion`, `masking`; on image times map `confidence`.
- Does the map point at the right place, and outline it? `pointing`.
- Does it account for small changes of the image, and hold still under them? `robustness`.
- Does it depend on what the network has learnt? `randomisation`, compared by `agreement`.
- Do two methods say the same? `agreement`.
- Is it free of the checkerboard of strides, is it smooth? `smoothness`. Is it concentrated? `concentration`.

`perturb` and `scoring` are what these share: changed images, and what a network's answer to them is worth.
"""
