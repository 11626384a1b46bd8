r"""The three terms of the SRAE objective as plain functions of tensors (paper, Eq. 1, 2, 3).

:meth:`captum_xnn.models.Autoencoder.objective` adds them up (Eq. 4 and 5).

Conventions:
    M examples, D dimensions of the explained layer Z, n x-features, C explained outputs.
    Every mean over examples is over the **whole training set** in the arguments. Only the first term is a mean of
    per-example losses. :math:`Q_k` and the inner products of Eq. 3 stand inside a non-linear function. An average over
    mini-batches would be a biased estimate: the pull-away term of independent x-features would be about 1/batch
    instead of 0. :class:`RunningMean` therefore estimates these statistics from mini-batches.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "RunningMean",
    "covariance",
    "faithfulness",
    "log_loss",
    "log_penalty",
    "pull_away",
    "pull_away_and_slope",
    "pull_away_of_moments",
    "reconstruction_error",
    "second_moments",
    "sparse_reconstruction",
    "squared_error",
]


def squared_error(y_bar: Tensor, y_hat: Tensor) -> Tensor:
    """Compute the squared differences, elementwise.

    Args:
        y_bar: Approximation, any shape, in logits.
        y_hat: The model's own output, of the same shape.

    Example:
        >>> squared_error(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0]))
        tensor([0., 4.])
    """
    return (y_bar - y_hat) ** 2


def log_loss(y_bar: Tensor, y_hat: Tensor) -> Tensor:
    """Compute the cross-entropy between the Bernoulli probabilities of two logits, elementwise, in nats.

    It is smallest where both logits agree, but not zero.

    Args:
        y_bar: Approximation, any shape, in logits.
        y_hat: The model's own output, of the same shape.

    Example:
        >>> log_loss(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor([0.6931])
    """
    loss: Tensor = F.binary_cross_entropy_with_logits(y_bar, torch.sigmoid(y_hat), reduction="none")
    return loss


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Compute the mean over the first dimension, weighted if weights (M,) are given."""
    if weight is None:
        return values.mean(0)
    return (weight / weight.sum()) @ values.flatten(1) if values.dim() > 1 else (weight / weight.sum()) @ values


def faithfulness(
    y_bar: Tensor,
    y_hat: Tensor,
    *,
    weight: Tensor | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = squared_error,
) -> Tensor:
    r"""Compute the faithfulness loss, a scalar.

    .. math:: L_{FS} = \frac{1}{M} \sum_{i=1}^{M} L\big(f_v(E_\theta(Z^{(i)})), \hat y^{(i)}\big)

    Args:
        y_bar: Outputs approximated from the x-features, (M,) or (M, C), in logits. Losses are summed over C.
        y_hat: The model's own outputs, of the same shape.
        weight: Non-negative weights (M,) of the examples. They need not sum to 1. The paper weights positives more.
        loss: :func:`squared_error`, :func:`log_loss`, or any elementwise loss.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> faithfulness(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0]))
        tensor(2.)

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, Eq. 1.
    """
    if y_bar.shape != y_hat.shape:
        raise ValueError(
            f"y_bar has shape {tuple(y_bar.shape)} and y_hat {tuple(y_hat.shape)}; reshape one of them, because "
            "broadcasting would compare every example with every other"
        )
    return _mean(loss(y_bar, y_hat).flatten(1).sum(1) if y_bar.dim() > 1 else loss(y_bar, y_hat), weight)


def reconstruction_error(Z_tilde: Tensor, Z: Tensor, *, weight: Tensor | None = None) -> Tensor:
    r"""Compute :math:`Q_k = \frac1M \sum_i (\tilde Z^{(i)}_k - Z^{(i)}_k)^2` for every dimension k, shape (D,).

    Args:
        Z_tilde: Reconstruction, (M, ...), flattened to (M, D).
        Z: Activations of the explained layer, of the same shape.
        weight: Non-negative weights (M,) of the examples.

    Example:
        >>> reconstruction_error(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.zeros(2, 2))
        tensor([5., 0.])

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, Eq. 2, with a squared loss.
    """
    return _mean(squared_error(Z_tilde, Z).flatten(1), weight)


def log_penalty(Q: Tensor, q: float = 1.0) -> Tensor:
    r"""Compute the sparsity of the reconstruction errors, :math:`\frac{1}{S_z} \sum_k \log(1 + q\,Q_k)`.

    The penalty grows ever more slowly with :math:`Q_k`. Irrelevant dimensions can therefore stay unreconstructed.

    Args:
        Q: Mean squared reconstruction errors (..., D), non-negative. The result has the leading dimensions.
        q: Sparsity parameter, positive. A larger one leaves more dimensions unreconstructed.

    Raises:
        ValueError: If q is not positive.

    Example:
        >>> log_penalty(torch.tensor([0.0, torch.e - 1]))
        tensor(0.5000)

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 2.2, Fig. 2(b-c).
    """
    if q <= 0:
        raise ValueError(f"the sparsity parameter q is {q}; pass q > 0, such as 1 or 10 as in the paper's figures")
    return torch.log1p(q * Q).mean(-1)


def sparse_reconstruction(Z_tilde: Tensor, Z: Tensor, *, q: float = 1.0, weight: Tensor | None = None) -> Tensor:
    """Compute the sparse reconstruction loss, a scalar: the log penalty of the errors of all dimensions.

    Args:
        Z_tilde: Reconstruction, (M, ...).
        Z: Activations of the explained layer, of the same shape.
        q: Sparsity parameter, see :func:`log_penalty`.
        weight: Non-negative weights (M,) of the examples.

    Example:
        >>> sparse_reconstruction(torch.zeros(3, 4), torch.zeros(3, 4))
        tensor(0.)

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, Eq. 2.
    """
    return log_penalty(reconstruction_error(Z_tilde, Z, weight=weight), q)


def second_moments(E: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Compute the mean products :math:`E_l^T E_{l'} / M` of the x-features, shape (n, n).

    Args:
        E: x-features (M, n).
        weight: Non-negative weights (M,) of the examples.

    Example:
        >>> second_moments(torch.tensor([[1.0, 2.0], [1.0, 0.0]]))
        tensor([[1., 1.],
                [1., 2.]])
    """
    w = torch.full_like(E[:, 0], 1 / len(E)) if weight is None else weight / weight.sum()
    return E.T @ (w[:, None] * E)


def covariance(E: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Compute the covariances of the x-features, shape (n, n): their second moments about the mean.

    Args:
        E: x-features (M, n).
        weight: Non-negative weights (M,) of the examples.

    Example:
        >>> covariance(torch.tensor([[1.0, 2.0], [1.0, 0.0]]))
        tensor([[0., 0.],
                [0., 1.]])
    """
    return second_moments(E - _mean(E, weight), weight=weight)


def pull_away_of_moments(G: Tensor) -> Tensor:
    r"""Compute the mean squared cosine :math:`G_{ll'}^2 / (G_{ll} G_{l'l'})` over all pairs :math:`l \ne l'`.

    From :func:`second_moments` this is Eq. 3. From :func:`covariance` it is the mean squared correlation.

    Args:
        G: Symmetric positive semi-definite matrices (..., n, n).

    Returns:
        Numbers (...) in [0, 1]. An x-feature that is zero for all examples, or negligible beside the largest, counts as
        orthogonal to all others. A single x-feature has no pairs and gives 0.

    Example:
        >>> pull_away_of_moments(torch.tensor([[1.0, 1.0], [1.0, 2.0]]))
        tensor(0.5000)
    """
    n = G.shape[-1]
    if n < 2:
        return G.sum((-2, -1)) * 0
    inverse = _inverse_norms(G)
    square_cosine = (G * inverse[..., None] * inverse[..., None, :]) ** 2
    own = square_cosine.diagonal(dim1=-2, dim2=-1)
    return (square_cosine.sum((-2, -1)) - own.sum(-1)) / (n * (n - 1))


def pull_away_and_slope(G: Tensor) -> tuple[Tensor, Tensor]:
    r"""Compute :func:`pull_away_of_moments` and its derivative with respect to G, without autograd.

    With cosines :math:`C_{ll'} = G_{ll'} / \sqrt{G_{ll} G_{l'l'}}` and P the mean of their squares over n(n - 1) pairs,

    .. math:: \frac{\partial P}{\partial G_{ll'}} = \frac{2}{n(n-1)} \frac{C_{ll'}}{\sqrt{G_{ll} G_{l'l'}}}, \quad
              \frac{\partial P}{\partial G_{ll}} = -\frac{2}{n(n-1)} \frac{\sum_{l' \ne l} C_{ll'}^2}{G_{ll}}

    Args:
        G: Symmetric positive semi-definite matrices (..., n, n).

    Returns:
        Numbers (...) and derivatives (..., n, n).

    Example:
        >>> value, slope = pull_away_and_slope(torch.tensor([[1.0, 1.0], [1.0, 2.0]]))
        >>> value, slope
        (tensor(0.5000), tensor([[-0.5000,  0.5000],
                [ 0.5000, -0.2500]]))
    """
    pairs = max(1, G.shape[-1] * (G.shape[-1] - 1))
    inverse = _inverse_norms(G)
    scale = inverse[..., None] * inverse[..., None, :]
    slope = G * scale
    own = slope.diagonal(dim1=-2, dim2=-1)
    own.zero_()
    square = slope.square().sum(-1)
    own.sub_(square)
    return square.sum(-1) / pairs, slope.mul_(scale).mul_(2 / pairs)


def _inverse_norms(G: Tensor) -> Tensor:
    """Compute 1 / sqrt of the diagonals, (..., n), and 0 for x-features that are negligible beside the largest."""
    square_norm = G.diagonal(dim1=-2, dim2=-1)
    # Relative to the largest: a dying x-feature leaves small values in a running mean, and they must not overflow.
    alive = square_norm > square_norm.amax(-1, keepdim=True) * torch.finfo(G.dtype).eps ** 2
    return torch.where(alive, square_norm, torch.inf).rsqrt()


def pull_away(E: Tensor, *, weight: Tensor | None = None) -> Tensor:
    r"""Compute the pull-away term, a scalar in [0, 1]: 0 for orthogonal x-features, 1 for parallel ones.

    .. math:: L_{PT} = \frac{1}{n(n-1)} \sum_{l} \sum_{l' \ne l}
              \Big(\frac{E_l^T E_{l'}}{\lVert E_l \rVert \lVert E_{l'} \rVert}\Big)^2

    The cosines are uncentred. Independent non-negative x-features are therefore far from 0 (about 0.56 for uniform
    ones). ``pull_away(E - E.mean(0))`` is the mean squared correlation. The training recipe uses this form.
    Positive or negative factors on x-features, such as the weights v, change nothing.

    Args:
        E: x-features (M, n) over the whole training set.
        weight: Non-negative weights (M,) of the examples.

    Example:
        >>> pull_away(torch.eye(3))
        tensor(0.)

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, Eq. 3.
    """
    return pull_away_of_moments(second_moments(E, weight=weight))


class RunningMean:
    r"""Running estimate of a statistic of the whole training set, with the gradient of the newest mini-batch.

    A call takes the statistic s of a new batch. It returns the running estimate
    :math:`\bar s \leftarrow (1 - \rho)\,\bar s + \rho\, s` with the gradient of the **batch** statistic. A non-linear
    function of the estimate, such as :func:`log_penalty` or :func:`pull_away_of_moments`, is therefore linearised at
    the running estimate. It has the value and the gradient of the full training set, up to the lag and the scatter of
    the estimate. A correction of the weights, as in Adam, makes the first estimate equal the first batch's statistic.

    Args:
        rho: Share of the newest batch, in (0, 1]. 1 gives the plain mini-batch estimate.

    Raises:
        ValueError: If rho is outside (0, 1].

    Example:
        >>> mean = RunningMean(rho=0.5)
        >>> mean(torch.tensor(1.0)), mean(torch.tensor(4.0))
        (tensor(1.), tensor(3.))
    """

    def __init__(self, rho: float = 0.1) -> None:
        if not 0 < rho <= 1:
            raise ValueError(f"rho is {rho}; pass 0 < rho <= 1 (0.1 averages over about the last 10 batches)")
        self.rho = rho
        self._sum: Tensor | None = None
        self._weight = 0.0

    def __call__(self, batch: Tensor) -> Tensor:
        """Add the statistic of a new batch, and return the running estimate (same shape) with the batch's gradient."""
        newest = batch.detach()
        return self.estimate(newest) + (batch - newest)

    def estimate(self, newest: Tensor) -> Tensor:
        """Add the statistic of a new batch, and return the running estimate (same shape) without a gradient."""
        self._sum = self.rho * newest if self._sum is None else self._sum.lerp(newest, self.rho)
        self._weight += self.rho * (1 - self._weight)
        return self._sum / self._weight

    def keep(self, which: Tensor) -> None:
        """Keep the statistics of some of several explainers, and discard the others.

        Args:
            which: Boolean (T,), for a statistic (T, ...).
        """
        if self._sum is not None:
            self._sum = self._sum[which]

    @property
    def state(self) -> tuple[Tensor | None, float]:
        """The estimate before correction, and the weight that corrects it. Assign it to resume from that state."""
        return self._sum, self._weight

    @state.setter
    def state(self, given: tuple[Tensor | None, float]) -> None:
        self._sum, self._weight = given
