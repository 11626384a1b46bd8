"""Base classes of the learned forms of explanation network.

Every learned form has an encoder to x-features, a linear head and a decoder. The base class can also rewrite their
weights to other units. A form (:class:`~captum_xnn.models.SRAE`, :class:`~captum_xnn.models.ConvSRAE`, the
:mod:`~captum_xnn.models.baselines`) defines its layers and how they learn. Training, explaining and saving use only the
interface defined here.

Conventions:
    M examples, D dimensions of Z, n x-features, C explained outputs (1 unless several are explained jointly).

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 2.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from captum_xnn._distributed import Ranks
from captum_xnn.activations._memmap import Rows
from captum_xnn.models._losses import faithfulness, pull_away_of_moments, second_moments, sparse_reconstruction

__all__ = [
    "Autoencoder",
    "Dense",
    "Loss",
    "Objective",
    "Reconstruction",
    "Scaling",
    "TrainingExamples",
    "Weights",
    "check_sizes",
    "dense",
    "encode_all",
]


class Reconstruction(NamedTuple):
    """Outputs of an autoencoder for activations Z."""

    E: Tensor
    """x-features, (M, n)."""
    y_bar: Tensor
    """Approximation of the model's outputs, (M, C), in logits."""
    Z_tilde: Tensor
    """Reconstruction, in the shape of Z."""


class Objective(NamedTuple):
    """Eq. 5 and its three terms before weighting, each a scalar."""

    total: Tensor
    faithfulness: Tensor
    sparse_reconstruction: Tensor
    pull_away: Tensor


class Scaling(NamedTuple):
    """Means and standard deviations with which training standardises its data."""

    Z_mean: Tensor
    """(D,), or (channels,) in the convolutional form."""
    Z_std: Tensor
    y_mean: Tensor
    """(C,), in logits."""
    y_std: Tensor


class Weights(NamedTuple):
    """Weights and settings of the terms in Eq. 5."""

    beta: float = 1.0
    """Weight of the sparse reconstruction."""
    eta: float = 1.0
    """Weight of the pull-away term."""
    q: float = 1.0
    """Sparsity parameter of the log penalty."""
    rho: float = 0.1
    """Share of the newest batch in running statistics."""


class Loss(Protocol):
    """A loss for gradient descent: computes terms on a batch; descent minimises their total."""

    def __call__(
        self, reconstruction: Reconstruction, Z: Tensor, y_hat: Tensor, *, weight: Tensor | None = None
    ) -> Objective:
        """Compute the terms on a batch.

        All arguments and terms may have a leading dimension (T, ...) for T explainers.

        Args:
            reconstruction: Outputs of the network for the batch.
            Z: Activations (m, ...) of the batch.
            y_hat: Outputs (m, C).
            weight: Weights (m,) of the rows in the pull-away term. They make the batch represent the training set.
        """
        ...


@dataclass(frozen=True)
class TrainingExamples:
    """Data for a form in closed form, in the model's own units."""

    Z: Tensor | Rows
    """Activations (M, D) or (M, channels, H, W), in memory or on disk."""
    y: Tensor
    """Outputs (M, C) to approximate, in logits."""
    weight: Tensor
    """Weights of the examples, (M,), 1 on average: how often batches contain each example."""
    generator: torch.Generator
    """Source of random numbers."""

    def loaded(self) -> Tensor:
        """Load all activations into memory, for forms that need them at once."""
        return self.Z[:]


class Autoencoder(nn.Module, ABC):
    """Base of all learned forms. Forms differ in their layers, in how they compute x-features and in how they learn.

    To add your own form, derive a final class from this one or from :class:`Dense`. Keep the arguments of its
    constructor in ``config``, with the ``shape`` of Z among them. Return a loss from :meth:`minimised` to learn by
    gradient descent, or set the weights in :meth:`solve`. ``XNNAttribution(autoencoder=MyForm)`` then fits the form,
    and ``XNNAttribution.load(forms=[MyForm])`` loads it.
    """

    encoder: nn.Sequential
    decoder: nn.Sequential
    head: nn.Linear
    learning_rate: ClassVar[float] = 3e-3
    """Learning rate of Adam, unless the recipe sets another."""
    weight_decay: ClassVar[float] = 0.5
    """Weight decay, unless the recipe sets another."""
    signed: ClassVar[bool] = True
    """Whether x-features have both signs. If so, a fit shifts, scales and flips them to mean 0, standard deviation 1
    and positive weights v. Otherwise they stay as learned."""
    anchored: ClassVar[bool] = False
    """Whether descent first pulls the x-features to their anchors, for a share ``recipe.pretraining`` of the steps."""
    standardised: ClassVar[bool] = True
    """Whether descent standardises Z and the outputs. The fitted network has the model's own units in either case."""
    config: dict[str, Any]
    """Arguments that construct an untrained copy, as values that JSON can hold."""

    @abstractmethod
    def shaped(self, Z: Tensor) -> Tensor:
        """Reshape Z to the dimensions that the first layer takes. That layer mixes dimension 1."""

    @abstractmethod
    def encode(self, Z: Tensor) -> Tensor:
        """Compute the x-features E, shape (M, n)."""

    @abstractmethod
    def forward(self, Z: Tensor) -> Reconstruction:
        """Compute x-features, approximated outputs and the reconstruction of Z."""

    @classmethod
    def minimised(cls, weights: Weights, ranks: Ranks) -> Loss | None:
        """Create the loss that gradient descent minimises; None, the default, for a form in closed form.

        Args:
            weights: Settings of the terms.
            ranks: Processes that learn together.
        """
        del weights, ranks
        return None

    def solve(self, examples: TrainingExamples) -> None:
        """Set weights in closed form: all of them, or some after descent. Does nothing by default.

        A fit draws new weights and minimises the loss of :meth:`minimised`, if there is one. It then calls this method,
        and standardises and sorts the x-features.

        Args:
            examples: Data to learn from, with Z in the shape that :meth:`shaped` returns.
        """

    @abstractmethod
    def _writers(self) -> tuple[nn.Module, ...]:
        """Return the layers with one output per x-feature. The last one outputs the x-features themselves."""

    @abstractmethod
    def _readers(self) -> tuple[nn.Module, ...]:
        """Return the layers that take the x-features as input."""

    @property
    def n_features(self) -> int:
        """Number of x-features n."""
        return self.head.in_features

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.head.weight.dtype

    def reset(self, generator: torch.Generator) -> None:
        r"""Draw new weights, uniform in :math:`\pm 1/\sqrt{fan}` as torch does, but from the given generator.

        The head starts with equal weights, so that no x-feature has a lead.

        Args:
            generator: A CPU generator; the same seed gives the same weights on every device.
        """
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    bound = 1 / math.sqrt(module.weight[0].numel())
                    for p in module.parameters(recurse=False):
                        p.copy_(
                            torch.empty(p.shape, dtype=torch.float32, device="cpu").uniform_(
                                -bound, bound, generator=generator
                            )
                        )
            self.head.weight.fill_(1 / math.sqrt(self.n_features))
            self.head.bias.zero_()

    def contributions(self, E: Tensor, output: int = 0) -> Tensor:
        """Compute the contributions :math:`v_i E_i` to one output, (M, n), in logits.

        They sum with the head's bias to the approximated output.

        Args:
            E: x-features (M, n).
            output: Index of the output, from 0 to C - 1.
        """
        return E * self.head.weight[output]

    def objective(
        self,
        Z: Tensor,
        y_hat: Tensor,
        *,
        beta: float = 1.0,
        eta: float = 1.0,
        q: float = 1.0,
        weight: Tensor | None = None,
        moments: Callable[[Tensor], Tensor] = second_moments,
    ) -> Objective:
        r"""Compute Eq. 5 over the whole training set; with the default weights of 1 it is Eq. 4.

        .. math:: L_{SRAE} = L_{FS} + \beta L_{SR} + \eta L_{PT}

        Args:
            Z: Activations of the explained layer, (M, ...), of the whole training set.
            y_hat: The model's outputs, (M, C), in logits.
            beta: Weight of the sparse reconstruction.
            eta: Weight of the pull-away term.
            q: Sparsity parameter of the log penalty.
            weight: Non-negative weights (M,) of the examples in the first two terms.
            moments: ``second_moments`` for Eq. 3 as printed, or ``covariance`` for the centred form that training uses.

        Reference:
            "Embedding Deep Networks into Visual Explanations", 2021, Eq. 4 and 5.
        """
        reconstruction = self(Z)
        terms = (
            faithfulness(reconstruction.y_bar, y_hat, weight=weight),
            sparse_reconstruction(reconstruction.Z_tilde, Z, q=q, weight=weight),
            pull_away_of_moments(moments(reconstruction.E)),
        )
        return Objective(terms[0] + beta * terms[1] + eta * terms[2], *terms)

    @torch.no_grad()
    def fold(self, scaling: Scaling) -> None:
        """Rewrite the weights, so that a network trained on standardised Z and y works in the model's own units.

        Args:
            scaling: Means and standard deviations that standardised the data.
        """
        _scale_inputs(self.encoder[0], scaling.Z_mean, scaling.Z_std)
        _scale_outputs(self.decoder[-1], scaling.Z_mean, scaling.Z_std)
        _scale_outputs(self.head, scaling.y_mean, scaling.y_std)

    @torch.no_grad()
    def standardise_features(self, mean: Tensor, std: Tensor) -> None:
        """Rewrite the weights to shift and scale the x-features. Nothing else changes.

        Args:
            mean: Current means (n,) of the x-features. They become 0.
            std: Current standard deviations (n,), not 0. They become 1. A negative value also flips the x-feature.
        """
        _scale_outputs(self._writers()[-1], -mean / std, 1 / std)
        for reader in self._readers():
            _scale_inputs(reader, -mean / std, 1 / std)

    @torch.no_grad()
    def reorder_features(self, order: Tensor) -> None:
        """Rewrite the weights, so that x-feature ``order[i]`` becomes x-feature i. Nothing else changes.

        Args:
            order: A permutation (n,).
        """
        for writer in self._writers():
            for p in writer.parameters():
                p.copy_(p[order].clone())
        for reader in {*self._readers(), *self._readers_of_maps()}:
            weight = reader.get_parameter("weight")
            weight.copy_(weight[:, order].clone())

    def _readers_of_maps(self) -> tuple[nn.Module, ...]:
        """Return the layers that take the x-features' maps before pooling."""
        return ()


def _scale_inputs(layer: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Rewrite a layer, so that ``layer(x)`` equals the former ``layer((x - mean) / std)``."""
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    flat = weight.flatten(1)
    bias.sub_(flat @ (mean / std))
    weight.div_(std.reshape(1, -1, *[1] * (weight.dim() - 2)))


def _scale_outputs(layer: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Rewrite a layer, so that ``layer(x)`` equals the former ``layer(x) * std + mean``."""
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    weight.mul_(std.reshape(-1, *[1] * (weight.dim() - 1)))
    bias.mul_(std).add_(mean)


def dense(sizes: Sequence[int]) -> nn.Sequential:
    """Build linear layers of the given sizes with ReLU between them.

    Args:
        sizes: Inputs of the first layer, then outputs of each layer.

    Example:
        >>> dense((4, 3, 2))
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): ReLU()
          (2): Linear(in_features=3, out_features=2, bias=True)
        )
    """
    layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def check_sizes(**sizes: int) -> None:
    """Raise ValueError where a size is below 1.

    Args:
        sizes: Sizes by name.

    Example:
        >>> check_sizes(n_features=5)
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; pass at least 1")


class Dense(Autoencoder, ABC):
    r"""Base of the forms that take Z as one vector per example, with linear layers and ReLU between them.

    .. math:: E = E_\theta(Z), \quad \bar y = v^T E + b, \quad \tilde Z = E^{-1}_{\tilde\theta}(E)

    Args:
        shape: Dimensions D of Z, or the shape (...) of one example, to be flattened.
        n_features: x-features n.
        hidden: Sizes of the encoder's hidden layers. Empty makes the encoder linear.
        n_outputs: Explained outputs C.

    Raises:
        ValueError: If a size is below 1.
    """

    has_linear_decoder: ClassVar[bool] = False
    """Whether the decoder is one linear layer. Otherwise it has the encoder's hidden layers in reverse."""

    def __init__(
        self,
        shape: int | Sequence[int],
        n_features: int = 5,
        *,
        hidden: Sequence[int] = (800, 100),
        n_outputs: int = 1,
    ) -> None:
        super().__init__()
        D = shape if isinstance(shape, int) else math.prod(shape)
        check_sizes(shape=D, n_features=n_features, n_outputs=n_outputs)
        self.config = {"shape": D, "n_features": n_features, "hidden": list(hidden), "n_outputs": n_outputs}
        self.encoder = dense((D, *hidden, n_features))
        self.decoder = dense((n_features, *(() if self.has_linear_decoder else hidden[::-1]), D))
        self.head = nn.Linear(n_features, n_outputs)

    def shaped(self, Z: Tensor) -> Tensor:
        """Flatten activations Z, shape (M, ...), to (M, D)."""
        return Z if Z.dim() == 2 else Z.flatten(1)

    def encode(self, Z: Tensor) -> Tensor:
        """Compute the x-features E, shape (M, n), of activations Z, shape (M, ...)."""
        return self.encoder(self.shaped(Z))  # type: ignore[no-any-return]

    def forward(self, Z: Tensor) -> Reconstruction:
        """Compute x-features, approximated outputs and the reconstruction of activations Z, shape (M, ...)."""
        E = self.encode(Z)
        return Reconstruction(E, self.head(E), self.decoder(E).reshape(Z.shape))

    def _writers(self) -> tuple[nn.Module, ...]:
        return (self.encoder[-1],)

    def _readers(self) -> tuple[nn.Module, ...]:
        return self.head, self.decoder[0]


@torch.no_grad()
def encode_all(xnn: Autoencoder, Z: Tensor | Rows, *, batch_size: int = 1024) -> Tensor:
    """Encode activations (M, ...) batch by batch to x-features (M, n).

    Args:
        xnn: The network.
        Z: Activations, in memory or on disk.
        batch_size: Rows in a batch.
    """
    # One tensor allocated in advance: small ones between large parts would fragment the memory of the parts.
    E, first = xnn.head.weight.new_empty(len(Z), xnn.n_features), 0
    for part in Z.split(batch_size):
        E[first : first + len(part)] = xnn.encode(part)
        first += len(part)
    return E
