r"""Dictionaries: rival x-features that rebuild the layer from a few concepts, and leave a part of the output over.

A dictionary approximates the layer's output by a sum of concepts, :math:`Z \approx u(Z) H + h_0`. The rows of H are the
concepts, (K, D), and u is the code, (M, K). Let G be the mean slopes of the output on the way from a base
:math:`Z_0` to Z, so that :math:`(Z - Z_0) \cdot G = f(Z) - f(Z_0)`. Concept k then contributes

.. math:: E_k = \bigl(u_k(Z) - u_k(Z_0)\bigr) \, h_k \cdot G, \qquad
          f(Z) - f(Z_0) = \sum_k E_k + \text{unexplained}.

The contributions do not sum to the output. The unexplained part is the slope times the part of Z that the concepts fail
to rebuild.

==============  ==========================================================================  ==========================
function        concepts                                                                    code
==============  ==========================================================================  ==========================
craft           non-negative factors of the activations of image crops                      least squares, :math:`\ge 0`
face            non-negative factors that keep the model's predictions                      least squares, :math:`\ge 0`
topk_sae        decoder rows of a sparse autoencoder                                        the k largest latents
==============  ==========================================================================  ==========================

Conventions:
    M examples, D dimensions, K concepts, C outputs. Activations (M, D). Results are in float64.

Reference:
    Fel, Picard, Bethune, Boissin, Vigouroux, Colin, Cadene, Serre, "CRAFT: Concept Recursive Activation FacTorization
    for Explainability", CVPR 2023 (crops, factors, Sobol indices).
    "FACE: Faithful Automatic Concept Extraction", NeurIPS 2025, arXiv 2510.11675 (factors with a divergence).
    Gao et al., "Scaling and Evaluating Sparse Autoencoders", 2024 (TopK).
    Jansen, "Analysis of Variance Designs for Model Output", 1999 (estimator of the total Sobol index).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_xnn.models.baselines._scikit import scikit_learn

__all__ = [
    "Dictionary",
    "craft",
    "dictionary_contributions",
    "face",
    "image_crops",
    "non_negative_codes",
    "sobol_indices",
    "topk_sae",
]

# Relative change of a code at which its descent stops, and the largest number of sweeps.
_SETTLED, _SWEEPS = 1e-10, 2000


class Dictionary(NamedTuple):
    """Concepts, and the code of an activation in them."""

    concepts: Tensor
    """H, (K, D)."""
    offset: Tensor
    """The rebuilt activation without any concept, (D,)."""
    encode: Callable[[Tensor], Tensor]
    """Computes the codes (M, K) of activations (M, D); differentiable."""

    def rebuilt(self, codes: Tensor) -> Tensor:
        """Compute the activations that codes stand for, (M, D).

        Args:
            codes: (M, K).
        """
        return codes @ self.concepts.to(codes) + self.offset.to(codes)


def dictionary_contributions(of: Dictionary, activations: Tensor, base: Tensor, slopes: Tensor) -> Tensor:
    """Compute the contributions of concepts, (M, K), in logits.

    Args:
        of: The dictionary.
        activations: (M, D).
        base: (D,).
        slopes: Mean slopes of the output on the way from the base to the activations, (M, D).

    Raises:
        ValueError: If shapes do not fit, there are no examples, or a number is not finite.

    Example:
        >>> H = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> two = Dictionary(H, torch.zeros(3), partial(non_negative_codes, concepts=H))
        >>> Z, slopes = torch.tensor([[2.0, 3.0, 4.0]]), torch.tensor([[1.0, 10.0, 100.0]])
        >>> dictionary_contributions(two, Z, torch.zeros(3), slopes)  # 400 is unexplained
        tensor([[ 2., 30.]])
    """
    if activations.shape != slopes.shape or base.shape != activations.shape[1:]:
        raise ValueError(
            f"activations have shape {tuple(activations.shape)}, the base {tuple(base.shape)} and slopes "
            f"{tuple(slopes.shape)}; pass (M, D), (D,) and (M, D)"
        )
    _check(slopes, "slopes")
    codes = of.encode(activations) - of.encode(base[None])
    return codes * (slopes @ of.concepts.to(slopes).T).to(codes)


def non_negative_codes(activations: Tensor, concepts: Tensor) -> Tensor:
    r"""Compute the codes :math:`\arg\min_{u \ge 0} \lVert Z - u H \rVert^2`, (M, K), with their derivative.

    Coordinate descent finds which codes are above 0. These are the least-squares solution in their concepts, which is
    linear in Z, so gradients pass, to Z and to H.

    Args:
        activations: Z, (M, D).
        concepts: H, (K, D).

    Raises:
        ValueError: If shapes do not fit, there are no examples or concepts, or a number is not finite.

    Example:
        >>> H = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> non_negative_codes(torch.tensor([[3.0, 1.0], [1.0, -1.0]]), H)
        tensor([[2., 1.],
                [1., 0.]])
    """
    if activations.dim() != 2 or concepts.dim() != 2 or activations.shape[1] != concepts.shape[1]:
        raise ValueError(
            f"activations have shape {tuple(activations.shape)} and concepts {tuple(concepts.shape)}; pass (M, D) and "
            "(K, D) of the same layer"
        )
    _check(activations, "activations")
    _check(concepts, "concepts")
    H = concepts.double()
    gram = H @ H.T
    drive = activations.double() @ H.T
    active = (_descended(drive.detach(), gram.detach()) > 0).double()
    # The rows and columns of codes at 0 become those of the unit matrix.
    system = active[:, :, None] * gram * active[:, None, :] + torch.diag_embed(1 - active)
    system = system + 1e-12 * gram.diagonal().mean() * torch.eye(len(gram), device="cpu").to(gram)
    codes: Tensor = torch.linalg.solve(system, active * drive).to(activations)
    return codes


def _check(values: Tensor, name: str, form: str = "(M, D)") -> None:
    """Raise unless there are numbers of the form, at least one row of them, and all of them finite."""
    shape = tuple(values.shape)
    if values.dim() != form.count(",") + 1 or not values.numel():
        raise ValueError(f"{name} have shape {shape}; pass {form} with at least one row")
    bad = int((~values.isfinite()).reshape(len(values), -1).any(1).sum())
    if bad:
        raise ValueError(f"{name} are NaN or infinite in {bad} of {len(values)} rows; check the values of these rows")


def _descended(drive: Tensor, gram: Tensor) -> Tensor:
    """Minimise over one code after the other, for all examples at once."""
    u = torch.zeros_like(drive)
    size = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny)
    for _ in range(_SWEEPS):
        before = u.clone()
        for k in range(len(gram)):
            u[:, k] = ((drive[:, k] - u @ gram[:, k]) / size[k] + u[:, k]).clamp_min(0)
        if float((u - before).abs().max()) <= _SETTLED * float(u.abs().max()):
            break
    return u


def image_crops(images: Tensor, *, side: int = 3, share: float = 0.5) -> Tensor:
    """Cut overlapping squares out of each image, and enlarge them to its size, (N side^2, C, H, W).

    Args:
        images: (N, C, H, W).
        side: Crops along each side of the image, evenly spread.
        share: Height and width of a crop, as shares of the image's.

    Raises:
        ValueError: If the images have another shape, there are none, or a number is out of range or not finite.

    Example:
        >>> image_crops(torch.arange(16.0).reshape(1, 1, 4, 4), side=2)[:, 0, 0, 0]
        tensor([ 0.,  2.,  8., 10.])
    """
    if images.dim() != 4 or side < 1 or not 0 < share <= 1:
        raise ValueError(
            f"images have shape {tuple(images.shape)}, side is {side} and share {share}; pass (N, C, H, W), at least 1 "
            "crop, and a share in (0, 1]"
        )
    _check(images, "images", "(N, C, H, W)")
    height, width = (max(1, round(share * size)) for size in images.shape[2:])
    tops = torch.linspace(0, images.shape[2] - height, side, device="cpu").round().long().tolist()
    lefts = torch.linspace(0, images.shape[3] - width, side, device="cpu").round().long().tolist()
    crops = [
        F.interpolate(
            images[:, :, top : top + height, left : left + width],
            images.shape[2:],
            mode="bilinear",
            align_corners=False,
        )
        for top in tops
        for left in lefts
    ]
    return torch.stack(crops, 1).flatten(0, 1)


def _factors(activations: Tensor, concepts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Compute non-negative factors: codes (M, K), and concepts (K, D) of norm 1 or 0."""
    if activations.dim() != 2 or concepts < 1:
        raise ValueError(
            f"activations have shape {tuple(activations.shape)}, and {concepts} concepts were asked for; pass (M, D) "
            "and at least 1 concept"
        )
    _check(activations, "activations")
    if bool((activations < 0).any()):
        raise ValueError(
            f"activations go down to {float(activations.min()):.3g}, but non-negative factors need non-negative ones; "
            "choose a layer after a ReLU"
        )
    data = activations.detach().cpu().double().numpy()
    init = "nndsvda" if concepts <= min(data.shape) else "random"
    made = scikit_learn().factorise(concepts, init=init, random_state=seed, max_iter=1000, tol=1e-4)
    codes, H = (torch.from_numpy(x) for x in (made.fit_transform(data), made.components_))
    size = H.norm(dim=1)
    return codes * size, H / torch.where(size > 0, size, 1)[:, None]


def craft(crops: Tensor, concepts: int, *, seed: int = 0) -> Dictionary:
    r"""Factorise the activations of crops of a class's images, as CRAFT does.

    .. math:: \min_{U, H \ge 0} \lVert Z_{crops} - U H \rVert^2

    :func:`image_crops` cuts the crops. :func:`sobol_indices` gives the importance of the concepts.

    Differs from CRAFT:
        There is one level of concepts. CRAFT factorises an earlier layer again to divide a concept.

    Args:
        crops: Activations of the crops, (M, D), not negative.
        concepts: K.
        seed: Seed of the start, where singular vectors cannot give one.

    Raises:
        ValueError: If shapes do not fit, there are no activations, or they are negative or not finite.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> Z = torch.rand(40, 2, generator=g) @ torch.rand(2, 6, generator=g)
        >>> made = craft(Z, 2)
        >>> bool(torch.allclose(made.rebuilt(made.encode(Z)), Z, atol=1e-2))
        True
    """
    H = _factors(crops, concepts, seed)[1]
    return Dictionary(H, torch.zeros(H.shape[1], dtype=H.dtype, device="cpu"), partial(non_negative_codes, concepts=H))


def sobol_indices(score: Callable[[Tensor], Tensor], concepts: int, *, draws: int = 64, seed: int = 0) -> Tensor:
    r"""Estimate the total Sobol index of each concept, (K,): the share of the score's variance that involves it.

    Masks m in :math:`[0, 1]^K` scale the codes. With two sets of masks A and B, and :math:`A^{(k)}` the masks A with
    column k from B, Jansen's estimator is

    .. math:: S_k = \frac{\mathrm E \bigl[(f(A) - f(A^{(k)}))^2\bigr]}{2 \, \mathrm{Var}\, f(A)}.

    Args:
        score: Computes the scores (n,) of masks (n, K), such as the model's logit of ``rebuilt(mask * codes)``.
        concepts: K.
        draws: Masks in each set, drawn from Sobol's quasi-random sequence. ``draws (K + 1)`` scores are computed.
        seed: Seed of the scrambling of the sequence.

    Raises:
        ValueError: If a number is out of range, or scores have another shape or are not finite.

    Example:
        >>> sobol_indices(lambda mask: 3 * mask[:, 0] + mask[:, 1], 2, draws=1024).round(decimals=2)
        tensor([0.9000, 0.1000], dtype=torch.float64)

    Reference:
        Fel et al., 2023, section 3.2; Jansen, 1999.
    """
    if concepts < 1 or draws < 2:
        raise ValueError(f"there are {concepts} concepts and {draws} draws; pass at least 1 concept and 2 draws")
    engine = torch.quasirandom.SobolEngine(2 * concepts, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    drawn = engine.draw(draws, dtype=torch.float64)
    A, B = drawn[:, :concepts], drawn[:, concepts:]

    def scores(masks: Tensor) -> Tensor:
        values = score(masks)
        if values.shape != (draws,):
            raise ValueError(f"scores have shape {tuple(values.shape)}; return one score for each mask, ({draws},)")
        _check(values, "scores", "(n)")
        return values.double()

    own = scores(A)
    variance = own.var(correction=0)
    found = []
    for k in range(concepts):
        mixed = A.clone()
        mixed[:, k] = B[:, k]
        found.append((own - scores(mixed)).square().mean() / 2)
    return torch.stack(found) / torch.where(variance > 0, variance, 1)


def face(
    activations: Tensor,
    rest: Callable[[Tensor], Tensor],
    concepts: int,
    *,
    weight: float = 1.0,
    steps: int = 200,
    rate: float = 1e-2,
    seed: int = 0,
) -> Dictionary:
    r"""Factorise activations so that the rebuilt ones keep the model's predictions, as FACE does.

    .. math:: \min_{H \ge 0} \; \frac{\lVert Z - U H \rVert^2}{\lVert Z \rVert^2}
              + \lambda \, \frac1M \sum_n \mathrm{KL}\bigl(p(Z_n) \,\big\|\, p(u_n H)\bigr),
              \qquad U = \arg\min_{U \ge 0} \lVert Z - U H \rVert^2

    p is the softmax of the model's outputs. Adam starts from the factors without the divergence. After each step
    negative entries become 0.

    Differs from FACE:
        The codes are those of least squares at each step, because new activations get the same codes.

    Args:
        activations: Z, (M, D), not negative.
        rest: The rest of the model, from activations (M, D) to all outputs (M, C).
        concepts: K.
        weight: Lambda.
        steps: Steps of Adam. 0 leaves the factors as they are.
        rate: Its learning rate, as a share of the root mean square of the factors.
        seed: Seed of the start, where singular vectors cannot give one.

    Raises:
        ValueError: If shapes do not fit, there are no activations, they are negative, or they or the model's outputs
            are not finite.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> Z, w = torch.rand(30, 6, generator=g), torch.randn(6, 3, generator=g)
        >>> made = face(Z, lambda Z: Z @ w, 2, steps=20)
        >>> made.concepts.shape, bool((made.concepts >= 0).all())
        (torch.Size([2, 6]), True)
    """
    Z = activations.detach()
    start = _factors(activations, concepts, seed)[1]
    H = nn.Parameter(start.to(Z))
    outputs = rest(Z).detach()
    _check(outputs, "outputs of rest", "(M, C)")
    target = outputs.log_softmax(1)
    descent = torch.optim.Adam([H], lr=rate * float(start.square().mean().sqrt()))
    size = Z.square().sum().clamp_min(torch.finfo(Z.dtype).tiny)
    with torch.enable_grad():
        for _ in range(steps):
            descent.zero_grad(set_to_none=True)
            rebuilt = non_negative_codes(Z, H) @ H
            made = rest(rebuilt).log_softmax(1)
            divergence = F.kl_div(made, target, reduction="batchmean", log_target=True)
            ((Z - rebuilt).square().sum() / size + weight * divergence).backward()  # type: ignore[no-untyped-call]
            descent.step()
            with torch.no_grad():
                H.clamp_(min=0)
    found = H.detach().double()
    _check(found, "concepts", "(K, D)")
    length = found.norm(dim=1, keepdim=True)
    found = found / torch.where(length > 0, length, 1)
    return Dictionary(
        found, torch.zeros(found.shape[1], device="cpu").to(found), partial(non_negative_codes, concepts=found)
    )


def topk_sae(
    activations: Tensor,
    latents: int = 256,
    *,
    active: int = 16,
    steps: int = 1000,
    rate: float = 1e-3,
    batch: int = 256,
    generator: torch.Generator,
) -> Dictionary:
    r"""Train a sparse autoencoder of which only the k largest latents are active.

    .. math:: u = \mathrm{TopK}\bigl(\mathrm{relu}(W (Z - h_0) + b)\bigr), \qquad
              \min \; \mathrm E \lVert Z - u H - h_0 \rVert^2, \qquad \lVert h_j \rVert = 1

    :math:`h_0` starts at the mean of Z, and W at the transpose of H. Activations are scaled as a whole to a mean square
    of 1.

    Args:
        activations: Z, (M, D).
        latents: Number of latents. Choose some of them as x-features.
        active: k, latents that may be above 0 in one example.
        steps: Steps of Adam.
        rate: Its learning rate.
        batch: Examples in a step.
        generator: CPU generator of the start and of the batches.

    Raises:
        ValueError: If activations have another shape, there are none, or a number is out of range or not finite.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> Z = torch.rand(64, 6, generator=g)
        >>> made = topk_sae(Z, 12, active=3, steps=5, generator=g)
        >>> int((made.encode(Z) > 0).sum(1).max())
        3

    Reference:
        Gao et al., 2024, section 2. Their auxiliary loss for dead latents is left out.
    """
    if activations.dim() != 2 or not 1 <= active <= latents:
        raise ValueError(
            f"activations have shape {tuple(activations.shape)}, and {active} of {latents} latents are active; pass "
            "(M, D) and at most as many active latents as there are"
        )
    if steps < 0 or batch < 1:
        raise ValueError(f"steps is {steps} and batch {batch}; pass steps >= 0 and batch >= 1")
    _check(activations, "activations")
    Z = activations.detach()
    mean = Z.mean(0)
    scale = float((Z - mean).square().mean().sqrt().clamp_min(torch.finfo(Z.dtype).tiny))
    H = nn.Parameter(F.normalize(torch.randn(latents, Z.shape[1], generator=generator, device="cpu")).to(Z))
    W = nn.Parameter(H.detach().clone())
    b, offset = nn.Parameter(torch.zeros(latents, device="cpu").to(Z)), nn.Parameter(mean / scale)
    descent = torch.optim.Adam([H, W, b, offset], lr=rate)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(Z), (batch,), generator=generator, device="cpu")
            some = Z[rows] / scale
            descent.zero_grad(set_to_none=True)
            u = _largest(F.relu((some - offset) @ W.T + b), active)
            (some - u @ H - offset).square().sum(1).mean().backward()  # type: ignore[no-untyped-call]
            descent.step()
            with torch.no_grad():
                H.copy_(F.normalize(H))
    weight, bias, middle, concepts = (p.detach().double() for p in (W, b, offset, H))

    def encode(Z: Tensor) -> Tensor:
        _check(Z, "activations")
        u = F.relu((Z.double() / scale - middle) @ weight.T + bias)
        return (_largest(u, active) * scale).to(Z)

    return Dictionary(concepts, middle * scale, encode)


def _largest(u: Tensor, active: int) -> Tensor:
    """Keep the largest latents of each example, and set the others to 0."""
    values, indices = u.topk(active, dim=1)
    return torch.zeros_like(u).scatter(1, indices, values)
