"""
Your ResNet and your folder of images
=====================================

You have a trained ResNet and a folder of images. This tutorial explains one of its classes: a few x-features, where
each is in an image, how much each adds to the output, and one page that you can send to a colleague.

Folders need torchvision. In your clone of the repository, with its environment active (``source
.venv/bin/activate``): ``pip install -c constraints.txt -e '.[report,vision]'``. If ``import torchvision`` says
``operator torchvision::nms does not exist``, torch and torchvision came from two package indexes. Install both from
one: ``pip install --force-reinstall -c constraints.txt torch torchvision``, with ``--index-url`` if you use another index.
"""

# %%
# The folder
# ----------
# Skip this cell if you have images. It writes drawings of three invented birds, one folder for each class, as
# torchvision's ``ImageFolder`` reads them.

import tempfile
from pathlib import Path

from torchvision.transforms.functional import to_pil_image

from captum_xnn.datasets import Figures

folder = Path(tempfile.mkdtemp())
birds = ("ember", "lagoon", "thistle")
looks = (
    {"head": "plain orange", "belly": "striped orange"},
    {"head": "plain blue", "belly": "plain blue"},
    {"head": "striped blue", "wing": "striped blue"},
)
for part, count in (("train", 400), ("test", 120)):
    drawn = Figures.draw(count, seed=len(part), reasons=looks, members=1, near_misses=0)
    for i, (image, label) in enumerate(
        zip(drawn.images, drawn.labels.tolist(), strict=True)
    ):
        path = folder / part / birds[label] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(path)

# %%
# The images are read and normalised as for any torchvision model.

from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
prepared = transforms.Compose(
    [transforms.Resize(48), transforms.ToTensor(), transforms.Normalize(mean, std)]
)
train, test = (ImageFolder(folder / part, prepared) for part in ("train", "test"))

# %%
# The model
# ---------
# Load your own model here. This one is a thin ResNet, so that the page builds in seconds; its layers have the names of
# torchvision's.

from collections import OrderedDict

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock


def block(before, after, stride=1):
    shortcut = nn.Sequential(
        nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
    )
    return BasicBlock(before, after, stride, shortcut)


torch.manual_seed(0)
model = nn.Sequential(
    OrderedDict(
        conv1=nn.Conv2d(3, 24, 3, stride=2, padding=1, bias=False),
        bn1=nn.BatchNorm2d(24),
        relu=nn.ReLU(),
        layer1=block(24, 24),
        layer2=block(24, 48, 2),
        layer3=block(48, 96, 2),
        layer4=block(96, 96),
        avgpool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(96, len(birds)),
    )
)
epochs, batches = 5, DataLoader(train, batch_size=32, shuffle=True)
optimiser = torch.optim.Adam(model.parameters())
schedule = torch.optim.lr_scheduler.OneCycleLR(
    optimiser, 4e-3, total_steps=epochs * len(batches)
)
for _ in range(epochs):
    for images, labels in batches:
        loss = nn.functional.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()

model.eval()

# %%
# Read the test images, and ask the model for the class of each.

images, labels = next(iter(DataLoader(test, batch_size=len(test))))
with torch.no_grad():
    predicted = model(images).argmax(1)
print(
    f"{(predicted == labels).float().mean():.1%} of the test images are classified correctly"
)

# %%
# Choose the layer
# ----------------
# Take the last layer with feature maps. In a ResNet that is ``layer4``: late enough to hold what decides the class,
# and before the pooling that forgets the place. On the command line, ``captum-xnn layers`` lists the layers of your
# model and recommends one; :doc:`/choose_layer` has a table for other architectures.
#
# Fit
# ---
# Fit x-features of one class, here ``ember``, from the training images. The fit uses no labels, so any folder of
# images that the model knows will do. ``n_features`` is the largest number of x-features. ``fit`` takes a data set, a
# ``DataLoader`` of it, or a tensor of inputs.

from captum_xnn import XNNAttribution

xnn = XNNAttribution(model, layer="layer4", n_features=3)
target = train.class_to_idx["ember"]
xnn.fit(train, target=target)

# %%
# Does it add up?
# ---------------
# Measure on images that the fit has not seen. F_reg is the mean difference between the model's output and the sum of
# bias and contributions, in logits. A logit is the model's raw output for a class, before the softmax. F_cls is the
# share of images whose class the sum does not change.

print(xnn.score(test, target=target))

# %%
# Explain
# -------
# Explain test images that the model calls an ember. :meth:`show <captum_xnn.explanation.Explanation.show>` draws one
# of them: the image, the map of the whole output, a map for each x-feature, and the sum. ``mean`` and ``std`` restore
# the colours. Every picture is a matplotlib figure. A notebook displays it; in a script, write it to a file, as in
# ``why.show(0).savefig("ember.png")``.

embers = images[predicted == target][:5]
why = xnn.explain(embers, target=target, one_heatmap=True)
why.show(0, mean=mean, std=std, target_name="an ember")

# %%
# Look down the columns
# ---------------------
# :meth:`gallery <captum_xnn.explanation.Explanation.gallery>` shows the same x-features on several images. Look down a
# column: what do the marked places have in common? That is the meaning of the x-feature.

why.gallery(mean=mean, std=std)

# %%
# Can you trust the maps?
# -----------------------
# Cover one patch of the image after the other. If a map is true, covering a strong place costs the x-feature much.
# ``agreement`` measures this, from -1 to 1, and the controls stand beside it: random groups of the same layer, random
# maps, and the map of the whole output. Trust the maps where ``agreement`` is above ``agreement_random_maps``. Trust
# the groups where ``drops.o1``, the overlap of x-features, is below ``drops_random_groups.o1``.

from captum_xnn.patch_scores import patch_scores

trust = patch_scores(xnn, embers, target=target)
for name in (
    "agreement",
    "agreement_random_groups",
    "agreement_random_maps",
    "agreement_one_heatmap",
):
    print(f"{name:25} {getattr(trust, name):+.2f}")
print(
    f"{'drops.o1':25} {trust.drops.o1:+.2f}, random groups {trust.drops_random_groups.o1:+.2f}"
)

# %%
# Name
# ----
# Give a name to each x-feature that you understand. The names then stand in pictures, sentences and reports. Python
# counts from 0, as everywhere: key 0 is x-feature 1.

names = {0: "head and belly"}
print(why.sentence(names=names, target_name="Ember"))

# %%
# Report
# ------
# Write one HTML page with all of this, for readers who do not program. It opens without a network connection, and its
# readers can name x-features too. Print it, or save it as PDF, from the browser. ``patches=4`` covers patches of four
# images, so that the page says whether its maps can be trusted.
#
# One line writes the page of a whole data set, with the names of classes and files and the colours from ``test``:
# ``xnn.report(test, "why.html", target=target, patches=4)``. A tensor of images knows none of these, so the page below
# gets them as arguments. :doc:`/report` describes the rest.

colours = torch.tensor([mean, std])[:, :, None, None]
report = xnn.report(
    embers,
    folder / "your_resnet.html",
    target=target,
    data=images,
    class_names=birds,
    names={target: names},
    patches=4,
    title="Why an ember?",
    display=lambda image: image * colours[1] + colours[0],
)
report

# %%
# Save
# ----
# Save the explainers, and load them beside the same model.

xnn.save(folder / "explainers")
same = XNNAttribution.load(folder / "explainers", model)
assert torch.equal(same.explain(embers, target=target).contributions, why.contributions)

# %%
# Next: :ref:`the same on the command line <sphx_glr_tutorials_2_command_line.py>`, or :doc:`/choose_k`.
