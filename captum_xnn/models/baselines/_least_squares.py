"""Linear maps from fixed x-features to the output, or back to Z, by weighted least squares.

Conventions:
    M examples, n x-features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from captum_xnn.activations._memmap import Rows, chunks
from captum_xnn.models._base import Autoencoder, TrainingExamples, encode_all

__all__ = ["read_out"]


@torch.no_grad()
def read_out(xnn: Autoencoder, layer: nn.Module, examples: TrainingExamples, wanted: Tensor | Rows) -> None:
    """Set a linear layer to the best map from the x-features to a wanted matrix.

    The best map has the least squared error, with examples weighted as in batches. Of several best maps the layer takes
    the smallest on standardised x-features. A constant x-feature therefore gets no weight.

    Args:
        xnn: The network, with a final encoder.
        layer: A linear layer with n inputs, such as the head.
        examples: Data to learn from.
        wanted: The wanted outputs of the layer, (M, outputs of the layer), in memory or on disk.

    Example:
        >>> from captum_xnn.models._srae import SRAE
        >>> srae, Z = SRAE(6, n_features=2, hidden=()), torch.rand(50, 6)
        >>> y = srae.encode(Z) @ torch.tensor([[2.0], [-1.0]]) + 3
        >>> read_out(srae, srae.head, TrainingExamples(Z, y, torch.ones(50), torch.Generator()), y)
        >>> srae.head.weight.round(decimals=2).tolist(), srae.head.bias.round(decimals=2).tolist()
        ([[2.0, -1.0]], [3.0])
    """
    E = encode_all(xnn, examples.Z)
    # Only tensors of n columns are in double precision. Z keeps its own.
    w = examples.weight.double()
    w = w / w.sum()
    mean = w @ E.double()
    centred = E.double() - mean
    std = (w @ centred**2).sqrt()
    varies = std > 100 * torch.finfo(E.dtype).eps * mean.abs()
    std = torch.where(varies, std, torch.inf)  # leaves out constant x-features
    whole = (centred / std * w[:, None]).T
    cross, of_wanted, first = (
        torch.zeros((), dtype=w.dtype, device="cpu"),
        torch.zeros((), dtype=w.dtype, device="cpu"),
        0,
    )
    for chunk in chunks(wanted):
        rows = slice(first, first + len(chunk))
        cross = cross + (whole[:, rows].to(chunk) @ chunk).double()
        of_wanted = of_wanted + (w[rows].to(chunk) @ chunk).double()
        first += len(chunk)
    coefficients = torch.linalg.pinv(whole @ (centred / std), hermitian=True, rtol=1e-10) @ cross / std[:, None]
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    weight.copy_(coefficients.T)
    bias.copy_(of_wanted - mean @ coefficients)
