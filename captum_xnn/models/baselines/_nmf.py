"""Non-negative matrix factorisation: Z as a sum of parts, without subtraction.

Conventions:
    M examples, D dimensions of Z, n x-features, C explained outputs. Z is flattened to (M, D).

Reference:
    Lee, Seung, "Learning the parts of objects by non-negative matrix factorization", Nature, 1999.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from captum_xnn.models._base import Dense, TrainingExamples
from captum_xnn.models.baselines._least_squares import read_out
from captum_xnn.models.baselines._scikit import scikit_learn

__all__ = ["NMF"]


class NMF(Dense):
    r"""Coefficients of non-negative parts whose sum is Z, with a head by least squares.

    .. math:: \min_{W, H \ge 0} \lVert Z - W H \rVert^2, \quad
              W(Z) = \arg\min_{W \ge 0} \lVert Z - W H \rVert^2

    scikit-learn computes the n parts H, (n, D). Projected gradient descent from 0 computes the coefficients W of new
    activations. Its step :math:`1 / \sum_j (H H^T)_{kj}` for part k always descends. Unrolled, the descent is an
    ordinary network of linear layers and ReLU, so every heatmap backend runs through it. The x-features are W,
    standardised. The form uses only the share of positives from the recipe.

    Args:
        shape: Dimensions D of Z, or the shape (...) of one example.
        n_features: x-features n.
        n_outputs: Explained outputs C.
        iterations: Steps of the descent, one layer of the encoder each. Similar parts need more steps.

    Raises:
        ValueError: On fitting, if Z has negative values.

    Example:
        >>> from captum_xnn.training._fitting import fit
        >>> g = torch.Generator().manual_seed(0)
        >>> W, H = torch.rand(200, 2, generator=g), torch.rand(2, 9, generator=g)
        >>> made = NMF(9, n_features=2)
        >>> _ = fit(made, W @ H, W[:, :1])
        >>> float((made(W @ H).Z_tilde - W @ H).abs().max().detach()) < 1e-2
        True

    Reference:
        Not in the paper. Lee, Seung, "Learning the parts of objects by non-negative matrix factorization", 1999. Fel
        et al., "CRAFT: Concept Recursive Activation FacTorization", 2023, for parts as concepts of one class.
    """

    has_linear_decoder = True

    def __init__(
        self, shape: int | Sequence[int], n_features: int = 5, *, n_outputs: int = 1, iterations: int = 100
    ) -> None:
        super().__init__(shape, n_features, hidden=(2 * n_features,) * iterations, n_outputs=n_outputs)
        self.config = {k: v for k, v in self.config.items() if k != "hidden"} | {"iterations": iterations}

    def solve(self, examples: TrainingExamples) -> None:
        """Factorise the activations by scikit-learn.

        Args:
            examples: Data to learn from.
        """
        Z = examples.loaded()
        if bool((Z < 0).any()):
            raise ValueError(
                f"activations go down to {float(Z.min()):.3g}, but NMF needs non-negative ones; explain a layer after "
                "a ReLU, or choose another form"
            )
        parts = _parts(Z, examples, self.n_features).to(Z)
        _unroll(self.encoder, parts)
        with torch.no_grad():
            self.decoder[-1].get_parameter("weight").copy_(parts.T)
            self.decoder[-1].get_parameter("bias").zero_()
        read_out(self, self.head, examples, examples.y)


def _parts(Z: Tensor, examples: TrainingExamples, n: int) -> Tensor:
    """Compute the parts H, (n, D). Each has norm 1, or is 0."""
    # Rows and their coefficients scale with the root of the weight. This weights the squared error and keeps the parts.
    data = (examples.weight.sqrt()[:, None] * Z).detach().cpu().double().numpy()
    seed = int(torch.randint(2**31, (), generator=examples.generator, device="cpu"))
    init = "nndsvda" if n <= min(data.shape) else "random"
    made = scikit_learn().factorise(n, init=init, random_state=seed, max_iter=2000).fit(data)
    return nn.functional.normalize(torch.from_numpy(made.components_))


@torch.no_grad()
def _unroll(encoder: nn.Sequential, parts: Tensor) -> None:
    r"""Write the descent into the layers.

    The state is (W, d) with the drive :math:`d_k = r_k H_k Z`, where :math:`r_k = 1 / \sum_j G_{kj}` and
    :math:`G = H H^T`. Each step is :math:`W \leftarrow \mathrm{relu}(W (I - G \, \mathrm{diag}(r)) + d)`.
    """
    n = len(parts)
    G, one = parts @ parts.T, torch.eye(n, device="cpu").to(parts)
    rate = torch.where(G.sum(1) > 0, 1 / G.sum(1), 0)
    first, *steps, last = [layer for layer in encoder if isinstance(layer, nn.Linear)]
    for layer in (first, *steps, last):
        layer.weight.zero_()
        layer.bias.zero_()
    first.weight.copy_((rate[:, None] * parts).repeat(2, 1))
    for layer in steps:
        layer.weight.copy_(torch.cat([torch.cat([one - rate[:, None] * G, one], 1), torch.cat([0 * one, one], 1)]))
    last.weight[:, :n] = one
