"""
Real birds: your copy of CUB-200-2011
=====================================

The paper explains bird classifiers. Its photographs are for non-commercial research, and are not part of this
library. This page shows them only if you build it with your copy. Set ``CAPTUM_XNN_BIRDS`` to a folder with

- the unpacked data set, such as ``CUB_200_2011/`` with its ``images.txt``, and
- a Python file in a folder of its own, such as ``network/network.py``.

The Python file defines a function ``load()`` that returns the trained classifier, and ``MEAN`` and ``STD`` of its
images in [0, 1]. If needed, it also defines ``LAYER``, the name of the layer to explain; ``SIZE``, the height and
width of its images in pixels; and ``TARGET``, the class to explain, counted from 0. Then build the pages again.
Running the network takes a few minutes on a laptop.
"""

import importlib.util
import os
from pathlib import Path

folder = Path(os.environ.get("CAPTUM_XNN_BIRDS", "no folder was given"))
lists = sorted(folder.glob("*/images.txt"))
networks = sorted(folder.glob("*/*.py"))
present = bool(lists and networks)
if not present:
    print("Built without birds. Each step below describes its result.")

# %%
# The network
# -----------
# This page runs the file as code: use your own.

if present:
    spec = importlib.util.spec_from_file_location("network", networks[0])
    network = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(network)
    model = network.load()
    layer, size = getattr(network, "LAYER", "relu6"), getattr(network, "SIZE", 227)
    target = getattr(network, "TARGET", 47)
    print(f"{type(model).__name__}, explained at {layer}")
else:
    print("Would load the network.")

# %%
# The images
# ----------
# Read all images of the class and a sample of the others. The fit learns x-features from both. Labels only select the
# images; the fit does not use them.

if present:
    import torch

    from captum_xnn.datasets import CUB200

    birds = CUB200(lists[0].parent, size=(size, size))
    own = (birds.labels == target).nonzero()[:, 0]
    others = (birds.labels != target).nonzero()[:, 0]
    sample = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[:400]]
    mean, std = (torch.tensor(value)[:, None, None] for value in (network.MEAN, network.STD))
    images = torch.stack([(birds[int(i)].image - mean) / std for i in [*own, *sample]])
    species = birds.classes[target].split(".")[-1].replace("_", " ")
    print(f"{len(own)} images of {species}, {len(sample)} others")
else:
    print("Would read the images of one species and 400 others.")

# %%
# Fit and explain
# ---------------

if present:
    from captum_xnn import XNNAttribution

    xnn = XNNAttribution(model, layer, n_features=5).fit(images, target=target)
    print(xnn.score(images, target=target))
    with torch.no_grad():
        outputs = torch.cat([model(some)[:, target] for some in images[: len(own)].split(32)])
    best = outputs.argsort(descending=True)[:5]
    why = xnn.explain(images[best], target=target, one_heatmap=True)
    print(why.sentence(target_name=species))
else:
    print("Would learn up to five x-features, and explain in a sentence why a bird is of its species.")

# %%
# The figure shows the image, the map of the whole output, and the x-features' maps, as in Fig. 1 of the paper:

picture = None
if present:
    picture = why.show(0, target_name=species, mean=network.MEAN, std=network.STD)
else:
    print("Would show one bird with its maps and the sum of the contributions.")
picture

# %%
# Contours keep the colours of the bird:

if present:
    from captum_xnn.plots import contours, own_scale

    picture = why.show(0, target_name=species, mean=network.MEAN, std=network.STD, style=contours, scale=own_scale)
else:
    print("Would show the same bird with contours.")
picture

# %%
# To name the x-features, look at several birds:

if present:
    picture = why.gallery(mean=network.MEAN, std=network.STD)
else:
    print("Would show five birds in rows, with the same x-feature in each column.")
picture
