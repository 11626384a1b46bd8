r"""The Sparse Reconstruction Autoencoder, which embeds a layer's activations Z into n x-features.

The encoder gives the x-features :math:`E = E_\theta(Z)`, the head approximates the model's output by
:math:`\bar y = v^T E + b`, the decoder reconstructs those dimensions of Z that the x-features account for.

Conventions:
    M examples, D dimensions of Z, n x-features, C explained outputs (1 unless several are explained jointly).

Differs from the paper:
    The x-layer is linear, its x-features have mean 0 and standard deviation 1 over the training data, and the head has
    a bias. A contribution :math:`v_i E_i` is thus what an example has more, or less, than the average training example.
    See the page "How the training recipe was found".

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 2.2.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from captum_xnn.losses import faithfulness, pull_away_of_moments, second_moments, sparse_reconstruction

__all__ = ["SRAE", "Autoencoder", "ConvSRAE", "Objective", "Reconstruction", "Scaling"]


class Reconstruction(NamedTuple):
    """What an autoencoder makes of Z."""

    E: Tensor
    """x-features, (M, n)."""
    y_bar: Tensor
    """Approximation of the model's outputs, (M, C), in logits."""
    Z_tilde: Tensor
    """Reconstruction, in the shape of Z."""


class Objective(NamedTuple):
    """The value of Eq. 5 and of its three terms, each a scalar, before weighting."""

    total: Tensor
    faithfulness: Tensor
    sparse_reconstruction: Tensor
    pull_away: Tensor


class Scaling(NamedTuple):
    """Means and standard deviations by which training standardised its data."""

    Z_mean: Tensor
    """(D,), or (channels,) in the convolutional form."""
    Z_std: Tensor
    y_mean: Tensor
    """(C,), in logits."""
    y_std: Tensor


class Autoencoder(nn.Module, ABC):
    """Base of the dense and the convolutional form, which differ in their layers and in how x-features are read."""

    encoder: nn.Sequential
    decoder: nn.Sequential
    head: nn.Linear
    learning_rate: ClassVar[float] = 1e-3
    """What Adam starts from, unless the recipe says otherwise."""
    config: dict[str, Any]
    """Arguments that make an untrained copy, as JSON can hold them."""

    @abstractmethod
    def shaped(self, Z: Tensor) -> Tensor:
        """Returns Z with as many dimensions as the first layer takes; dimension 1 is what it mixes."""

    @abstractmethod
    def encode(self, Z: Tensor) -> Tensor:
        """Returns the x-features E, shape (M, n)."""

    @abstractmethod
    def forward(self, Z: Tensor) -> Reconstruction:
        """Returns x-features, approximated outputs and reconstruction of Z."""

    @abstractmethod
    def _writers(self) -> tuple[nn.Module, ...]:
        """Returns the layers with one output per x-feature; the last of them gives the x-features themselves."""

    @abstractmethod
    def _readers(self) -> tuple[nn.Module, ...]:
        """Returns the layers that read the x-features themselves."""

    @property
    def n_features(self) -> int:
        """Number of x-features n."""
        return self.head.in_features

    def reset(self, generator: torch.Generator) -> None:
        r"""Draws all weights anew, uniform in :math:`\\pm 1/\\sqrt{fan}` as torch does, but from the given generator.

        The head starts with equal weights, so that no x-feature is ahead of the others.

        Args:
            generator: A CPU generator; the same seed gives the same weights on every device.
        """
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    bound = 1 / math.sqrt(module.weight[0].numel())
                    for p in module.parameters(recurse=False):
                        p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))
            self.head.weight.fill_(1 / math.sqrt(self.n_features))
            self.head.bias.zero_()

    def contributions(self, E: Tensor, output: int = 0) -> Tensor:
        """Returns the contributions :math:`v_i E_i` to one output, (M, n), in logits.

        With the head's bias they sum to the approximated output.

        Args:
            E: x-features (M, n).
            output: Which of the C explained outputs.
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
        r"""Returns Eq. 5 over the examples given, which are to be the whole training set.

        .. math:: L_{SRAE} = L_{FS} + \beta L_{SR} + \eta L_{PT}

        Args:
            Z: Activations of the explained layer, (M, ...).
            y_hat: The model's outputs, (M, C), in logits.
            beta: Weight of the sparse reconstruction.
            eta: Weight of the pull-away term.
            q: Sparsity parameter of the log penalty.
            weight: Non-negative weights (M,) of the examples in the first two terms.
            moments: ``second_moments`` for Eq. 3 as printed; ``covariance`` for the centred form that training uses.

        Reference:
            "Embedding Deep Networks into Visual Explanations", 2021, Eq. 4 and 5.
        """
        made = self(Z)
        terms = (
            faithfulness(made.y_bar, y_hat, weight=weight),
            sparse_reconstruction(made.Z_tilde, Z, q=q, weight=weight),
            pull_away_of_moments(moments(made.E)),
        )
        return Objective(terms[0] + beta * terms[1] + eta * terms[2], *terms)

    @torch.no_grad()
    def fold(self, scaling: Scaling) -> None:
        """Rewrites the weights so that a network trained on standardised Z and y works in the model's own units.

        Args:
            scaling: What training subtracted and divided by.
        """
        _scale_inputs(self.encoder[0], scaling.Z_mean, scaling.Z_std)
        _scale_outputs(self.decoder[-1], scaling.Z_mean, scaling.Z_std)
        _scale_outputs(self.head, scaling.y_mean, scaling.y_std)

    @torch.no_grad()
    def standardise_features(self, mean: Tensor, std: Tensor) -> None:
        """Rewrites the weights so that x-features are shifted and scaled, and nothing else changes.

        Args:
            mean: Means (n,) of the x-features as they are, which become 0.
            std: Standard deviations (n,), not 0, which become 1; a negative one also flips the x-feature.
        """
        _scale_outputs(self._writers()[-1], -mean / std, 1 / std)
        for reader in self._readers():
            _scale_inputs(reader, -mean / std, 1 / std)

    @torch.no_grad()
    def reorder_features(self, order: Tensor) -> None:
        """Rewrites the weights so that x-feature ``order[i]`` becomes x-feature i, and nothing else changes.

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
        """Returns the layers that read x-features before pooling."""
        return ()


def _scale_inputs(layer: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Makes ``layer(x)`` what ``layer((x - mean) / std)`` was."""
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    flat = weight.flatten(1)
    bias.sub_(flat @ (mean / std))
    weight.div_(std.reshape(1, -1, *[1] * (weight.dim() - 2)))


def _scale_outputs(layer: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Makes ``layer(x)`` what ``layer(x) * std + mean`` was."""
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    weight.mul_(std.reshape(-1, *[1] * (weight.dim() - 1)))
    bias.mul_(std).add_(mean)


def _dense(sizes: Sequence[int]) -> nn.Sequential:
    layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def _pointwise(sizes: Sequence[int]) -> nn.Sequential:
    layers = [m for i, o in pairwise(sizes) for m in (nn.Conv2d(i, o, 1), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"expected {name} of at least 1, got {size}; pass a positive number")


class SRAE(Autoencoder):
    r"""A Sparse Reconstruction Autoencoder on a layer that gives one vector per example.

    .. math:: E = E_\theta(Z), \quad \bar y = v^T E + b, \quad \tilde Z = E^{-1}_{\tilde\theta}(E)

    Encoder D-800-100-n and decoder n-100-800-D with ReLU between their layers. Activations with more than two
    dimensions are flattened to (M, D).

    Args:
        shape: Dimensions D of Z, or the shape (...) of one example, which is flattened.
        n_features: x-features n. The paper uses 5 for one class and 7 for four.
        hidden: Sizes of the encoder's hidden layers; the decoder mirrors them. May be empty: linear maps.
        n_outputs: Explained outputs C.

    Raises:
        ValueError: If a size is below 1.

    Example:
        >>> srae = SRAE(2048, n_features=5)
        >>> made = srae(torch.rand(3, 2048))
        >>> made.E.shape, made.y_bar.shape, made.Z_tilde.shape
        (torch.Size([3, 5]), torch.Size([3, 1]), torch.Size([3, 2048]))

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 2.2, Fig. 2(a); sizes from section 4.2.
    """

    def __init__(
        self, shape: int | Sequence[int], n_features: int = 5, *, hidden: Sequence[int] = (800, 100), n_outputs: int = 1
    ) -> None:
        super().__init__()
        in_features = shape if isinstance(shape, int) else math.prod(shape)
        _check_sizes(shape=in_features, n_features=n_features, n_outputs=n_outputs)
        self.config = {"shape": in_features, "n_features": n_features, "hidden": list(hidden), "n_outputs": n_outputs}
        sizes = (in_features, *hidden, n_features)
        self.encoder = _dense(sizes)
        self.decoder = _dense(sizes[::-1])
        self.head = nn.Linear(n_features, n_outputs)

    def shaped(self, Z: Tensor) -> Tensor:
        """Returns activations Z, shape (M, ...), as (M, D)."""
        return Z if Z.dim() == 2 else Z.flatten(1)

    def encode(self, Z: Tensor) -> Tensor:
        """Returns the x-features E, shape (M, n), of activations Z, shape (M, ...)."""
        return self.encoder(self.shaped(Z))  # type: ignore[no-any-return]

    def forward(self, Z: Tensor) -> Reconstruction:
        """Returns x-features, approximated outputs and reconstruction of activations Z, shape (M, ...)."""
        E = self.encode(Z)
        return Reconstruction(E, self.head(E), self.decoder(E).reshape(Z.shape))

    def _writers(self) -> tuple[nn.Module, ...]:
        return (self.encoder[-1],)

    def _readers(self) -> tuple[nn.Module, ...]:
        return self.head, self.decoder[0]


class ConvSRAE(Autoencoder):
    r"""A Sparse Reconstruction Autoencoder of 1x1 convolutions, on a layer that gives feature maps.

    The encoder turns Z, (M, channels, H, W), into n maps; the decoder reconstructs Z from these. Each map is max-pooled
    and weighted by one learned plane of its own, which gives the x-feature: :math:`E_i = \sum_p u_{ip}\,
    \mathrm{pool}(\mathrm{map}_i)_p + c_i`. Max-pooling, planes and head together are the paper's max-pooling layer and
    fully connected layer, written so that every x-feature stays one number with one contribution.

    Args:
        shape: (channels, H, W) of Z.
        n_features: x-features n.
        hidden: Channels of the encoder's hidden layers, none for the paper's MNIST network, mirrored in the decoder.
        n_outputs: Explained outputs C.
        pool: Size of the max-pooling window, in cells of Z; at most H and W. A window of H x W makes every x-feature
            blind to places.

    Raises:
        ValueError: If a size is below 1, or the window is larger than the maps.

    Example:
        >>> srae = ConvSRAE((16, 7, 7), n_features=5)
        >>> srae(torch.rand(3, 16, 7, 7)).E.shape, srae.maps(torch.rand(3, 16, 7, 7)).shape
        (torch.Size([3, 5]), torch.Size([3, 5, 7, 7]))

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 4.4.
    """

    learning_rate = 1e-2

    def __init__(
        self,
        shape: Sequence[int],
        n_features: int = 5,
        *,
        hidden: Sequence[int] = (),
        n_outputs: int = 1,
        pool: int = 2,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        _check_sizes(
            channels=channels, height=height, width=width, n_features=n_features, n_outputs=n_outputs, pool=pool
        )
        if pool > min(height, width):
            raise ValueError(
                f"expected a pooling window of at most {min(height, width)}, got {pool}; pass pool=1 or more"
            )
        self.config = {
            "shape": list(shape),
            "n_features": n_features,
            "hidden": list(hidden),
            "n_outputs": n_outputs,
            "pool": pool,
        }
        sizes = (channels, *hidden, n_features)
        self.encoder = _pointwise(sizes)
        self.decoder = _pointwise(sizes[::-1])
        self.pool = nn.MaxPool2d(pool)
        self.planes = nn.Conv2d(n_features, n_features, (height // pool, width // pool), groups=n_features)
        self.head = nn.Linear(n_features, n_outputs)

    def maps(self, Z: Tensor) -> Tensor:
        """Returns the x-features' maps before pooling, shape (M, n, H, W), of Z, shape (M, channels, H, W)."""
        return self.encoder(Z)  # type: ignore[no-any-return]

    def shaped(self, Z: Tensor) -> Tensor:
        """Returns feature maps Z, shape (M, channels, H, W), as they are."""
        return Z

    def encode(self, Z: Tensor) -> Tensor:
        """Returns the x-features E, shape (M, n), of feature maps Z, shape (M, channels, H, W)."""
        return self._read(self.maps(Z))

    def _read(self, maps: Tensor) -> Tensor:
        return self.planes(self.pool(maps)).flatten(1)  # type: ignore[no-any-return]

    def forward(self, Z: Tensor) -> Reconstruction:
        """Returns x-features, approximated outputs and reconstruction of feature maps Z, (M, channels, H, W)."""
        maps = self.maps(Z)
        E = self._read(maps)
        return Reconstruction(E, self.head(E), self.decoder(maps))

    def _writers(self) -> tuple[nn.Module, ...]:
        return self.encoder[-1], self.planes

    def _readers(self) -> tuple[nn.Module, ...]:
        return (self.head,)

    def _readers_of_maps(self) -> tuple[nn.Module, ...]:
        return (self.decoder[0],)
