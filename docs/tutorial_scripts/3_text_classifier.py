"""
A text classifier
=================

You have a classifier of texts. This tutorial splits its output into x-features and colours the tokens by them: one
colour for each reason. If your model takes an attention mask, or your batches are dicts, read :doc:`/attention_mask`
first: it replaces "Fit and explain" below.
"""

# %%
# The texts
# ---------
# Use your own texts and tokens here. These are short invented reviews of films. A review is bad for one or two of three
# reasons: the plot, the acting or the music.

import random

import torch
from torch import nn

good = {
    "plot": ["a gripping story", "the plot surprises", "a clever script"],
    "acting": ["the cast shines", "superb acting", "a moving performance"],
    "music": ["a lovely score", "the music soars", "wonderful songs"],
}
bad = {
    "plot": ["a boring story", "the plot drags", "a clumsy script"],
    "acting": ["the cast sleeps", "wooden acting", "a stiff performance"],
    "music": ["a noisy score", "the music grates", "awful songs"],
}


def review(generator, faults):
    parts = [generator.choice((bad if part in faults else good)[part]) for part in good]
    generator.shuffle(parts)
    return f"{parts[0]} and {parts[1]} but {parts[2]}".split()


draw = random.Random(0)
faults = [
    draw.choice([[], [], ["plot"], ["acting"], ["music"], ["plot", "acting"]])
    for _ in range(800)
]
texts = [review(draw, some) for some in faults]
labels = torch.tensor([int(bool(some)) for some in faults])

words = sorted({word for text in texts for word in text})
longest = max(map(len, texts))
ids = torch.tensor(
    [[words.index(w) + 1 for w in text] + [0] * (longest - len(text)) for text in texts]
)
print(" ".join(texts[4]), "->", "bad" if labels[4] else "good")

# %%
# The model
# ---------
# Use your own model here. This one reads three words at a time.


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(len(words) + 1, 32, padding_idx=0)
        self.conv = nn.Conv1d(32, 64, 3, padding=1)
        self.pool = nn.AdaptiveMaxPool1d(1)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)
        )

    def forward(self, ids):
        return self.head(
            self.pool(self.conv(self.embedding(ids).transpose(1, 2)).relu())
        )


torch.manual_seed(0)
model = Reader()
optimiser = torch.optim.Adam(model.parameters(), 3e-3)
for _ in range(6):
    for rows in torch.randperm(600).split(32):
        loss = nn.functional.cross_entropy(model(ids[rows]), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
print(
    f"{(model(ids[600:]).argmax(1) == labels[600:]).float().mean():.1%} of the other reviews are classified correctly"
)

# %%
# Fit and explain
# ---------------
# Explain the output ``bad`` at the pooled layer, which holds one number for each detector of phrases. Token ids are
# integers and have no gradient, so the maps are drawn at the embedding: pass its name to a layer method of Captum. The
# maps have a number for each token and dimension of the embedding; their sum is the token's share.

from captum.attr import LayerIntegratedGradients

from captum_xnn import XNNAttribution
from captum_xnn.heatmaps import FromCaptum

at_words = FromCaptum(LayerIntegratedGradients, layer="embedding")
xnn = XNNAttribution(model, layer="pool", n_features=3, heatmap=at_words).fit(
    ids[:600], target=1
)
print(xnn.score(ids[600:], target=1))

some = [i for i in range(600, 800) if labels[i]][:6]
why = xnn.explain(ids[some], target=1)
print(tuple(why.maps.sum(3).shape), "for", len(some), "reviews, x-features and tokens")

# %%
# Tokens coloured by x-feature
# ----------------------------
# Each word has the colour and the number of the x-feature that it drives most. The colour is as deep as the word's part
# of the contribution. A dashed line below a word says that its part lowers the output.

why.show_tokens([texts[i] for i in some])

# %%
# The sentence
# ------------
# Which words feed an x-feature most, over all bad reviews? They suggest its name.

everything = xnn.explain(ids[600:][labels[600:] == 1], target=1)
shares = everything.maps.sum(3)
names = {}
for k in range(shares.shape[1]):
    total = torch.zeros(len(words) + 1).index_add(
        0, everything.inputs.flatten(), shares[:, k].flatten()
    )
    top = [words[i - 1] for i in total[1:].topk(3).indices + 1]
    names[k] = " / ".join(top)
    print(f"x-feature {k + 1}: {', '.join(top)}")

# %%
for row in range(3):
    print(" ".join(texts[some[row]]))
    print("  ", why.sentence(row, names, target_name="bad"))

# %%
# The sum of one review:

why.show(0, names=names, title=" ".join(texts[some[0]]))

# %%
# Report
# ------
# Write one HTML page for readers who do not program. ``tokens`` gives the words of each text, without padding. With
# ``patches=6`` the page also checks the maps: it takes away one word after the other of six reviews, by putting the mean
# embedding in its place, and compares the loss of each x-feature with its map. Pass ``fill=0`` to put the padding there
# instead.

import tempfile
from pathlib import Path

others = list(range(600, 640))
report = xnn.report(
    ids[others],
    Path(tempfile.mkdtemp()) / "text_classifier.html",
    target=1,
    tokens=[texts[i] for i in others],
    class_names=["good", "bad"],
    names={1: names},
    patches=6,
    title="Why is a review bad?",
)
report

# %%
# An LSTM returns several tensors: :doc:`/choose_layer`.

# %%
# A table for a paper
# -------------------
# Compare x-features with the single map of integrated gradients alone, ``"1-Heatmap"``, and with random groups.
# :doc:`/compare_methods` describes the columns. An interval from two repeats is too wide to say anything; five are the
# most, as each holds out another fifth of the texts.

from captum_xnn import compare

found = compare(
    model,
    "pool",
    ids[:400],
    target=1,
    methods=["groups", "random groups", "1-Heatmap"],
    n_features=3,
    images=4,
    repeats=5,
    heatmap=at_words,
)
narrow = found.select("f_reg", "agreement", "drops_o1", "stability")
print(narrow)
print(narrow.to_latex())

# %%
# On the command line
# -------------------
# Beside ``load()``, let the model's file define ``encode(text)``, which returns the ids of a text, padded to one length,
# and ``tokens(ids)``, which returns its words. Then every command takes a text file with a text on each line:
# ``captum-xnn report --explainer explainers --data reviews.txt --patches``.
