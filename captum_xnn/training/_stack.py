"""Networks that train at the same time: their stacked weights, and the steps of AdamW on these weights.

Networks of one form and size have their weights stacked, (T, out, in). One batched product then serves all of them.

Conventions:
    T networks in the stack, m examples in a batch.

Reference:
    Loshchilov, Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Algorithm 2.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.optim.adamw import adamw

from captum_xnn._distributed import Ranks
from captum_xnn.models._base import Autoencoder, Reconstruction
from captum_xnn.training._recipe import Recipe

__all__ = ["Stack"]


class _Adam(NamedTuple):
    """State of AdamW for one stacked weight."""

    first: Tensor
    """Running mean of the gradients, in the shape of the weight."""
    second: Tensor
    """Running mean of their squares."""
    steps: Tensor
    """Number of steps, a scalar."""

    @classmethod
    def new(cls, weight: Tensor) -> _Adam:
        """Create the state before the first step."""
        return cls(torch.zeros_like(weight), torch.zeros_like(weight), torch.zeros((), device=weight.device))


class Stack:
    """Stack the weights of networks, and train them at the same time.

    Args:
        xnns: Networks of one form and size. Weights that require no gradient stay unchanged.
        recipe: Learning rate, weight decay and precision.

    Example:
        >>> from captum_xnn._distributed import ALONE
        >>> from captum_xnn.models._srae import SRAE
        >>> xnns, Z = [SRAE(4, 2, hidden=()) for _ in range(3)], torch.rand(3, 7, 4)
        >>> stack = Stack(xnns, Recipe())
        >>> before = stack.outputs(Z).y_bar
        >>> stack.step(before.square().sum(), 1.0, ALONE)
        >>> bool(stack.outputs(Z).y_bar.square().sum() < before.square().sum())
        True
        >>> stack.keep(torch.tensor([True, False, True]))
        >>> stack.alive, stack.outputs(Z[:2]).E.shape
        ([0, 2], torch.Size([2, 7, 2]))
    """

    def __init__(self, xnns: Sequence[Autoencoder], recipe: Recipe) -> None:
        self.xnns, self.recipe = xnns, recipe
        state = [dict(xnn.named_parameters()) | dict(xnn.named_buffers()) for xnn in xnns]
        learned = {name for name, p in xnns[0].named_parameters() if p.requires_grad}
        stacked = {name: torch.stack([s[name].detach() for s in state]) for name in state[0]}
        self.weights = {name: t.requires_grad_(name in learned) for name, t in stacked.items()}
        self.rate = recipe.learning_rate or xnns[0].learning_rate
        decay = xnns[0].weight_decay if recipe.weight_decay is None else recipe.weight_decay
        decays = {name: decay if name.endswith("weight") and not name.startswith("head.") else 0.0 for name in learned}
        self.by_decay = {d: [n for n in self.weights if decays.get(n) == d] for d in dict.fromkeys(decays.values())}
        """Names of the weights that learn, by their weight decay."""
        self.adam = {name: _Adam.new(self.weights[name]) for name in self.weights if name in learned}
        self._set_alive(list(range(len(xnns))))

    def _set_alive(self, which: list[int]) -> None:
        """Store the indices of the networks that still learn, as a list and on the device."""
        self.alive = which
        self.alive_index = torch.tensor(which, dtype=torch.long, device=next(iter(self.weights.values())).device)
        self._only = self._alone()

    def _alone(self) -> Autoencoder | None:
        """Copy a single network, on the stacked weights; None for several.

        Calling this copy saves a step the swap of its parameters, which takes as long as small products.
        """
        if len(self.alive) != 1 or self.recipe.mixed_precision:
            return None
        only = copy.deepcopy(self.xnns[self.alive[0]])
        for name, tensor in (*only.named_parameters(), *only.named_buffers()):
            tensor.data = self.weights[name].detach()[0]
        return only

    def outputs(self, Z: Tensor) -> Reconstruction:
        """Run the networks on activations, and return their outputs in the dtype of the activations.

        Args:
            Z: Activations (T, m, ...), a batch for each network that still learns.
        """
        if self._only is not None:
            return Reconstruction(*(part[None] for part in self._only(Z[0])))
        weights, some = self.weights, Z
        if self.recipe.mixed_precision:  # cast by hand, because autocast does not act inside vmap
            weights, some = {k: t.bfloat16() for k, t in weights.items()}, Z.bfloat16()
        return Reconstruction(*(part.to(Z.dtype) for part in self._run(weights, some)))

    def _run(self, weights: dict[str, Tensor], Z: Tensor) -> Reconstruction:
        if len(Z) == 1:  # forms of users need not support vmap
            outputs = functional_call(self.xnns[0], {k: t[0] for k, t in weights.items()}, (Z[0],))
            return Reconstruction(*(part[None] for part in outputs))

        def one(weights: dict[str, Tensor], some: Tensor) -> Any:
            return functional_call(self.xnns[0], weights, (some,))

        return Reconstruction(*vmap(one, randomness="different")(weights, Z))

    def step(self, loss: Tensor, factor: float, ranks: Ranks) -> None:
        """Take one step of AdamW.

        Args:
            loss: Sum of the losses of all networks.
            factor: Factor of the learning rate.
            ranks: Processes that average their gradients.
        """
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = self._gradients()
        for gradient in gradients.values():
            ranks.average(gradient)
        # The function, not the class: for small networks the class takes longer than the arithmetic.
        with torch.no_grad():
            for decay, names in self.by_decay.items():
                some = [name for name in names if name in gradients]
                adamw(
                    [self.weights[name] for name in some],
                    [gradients[name] for name in some],
                    [self.adam[name].first for name in some],
                    [self.adam[name].second for name in some],
                    [],
                    [self.adam[name].steps for name in some],
                    fused=True,
                    amsgrad=False,
                    maximize=False,
                    beta1=0.9,
                    beta2=0.999,
                    eps=1e-8,
                    lr=self.rate * factor,
                    weight_decay=decay,
                )

    def _gradients(self) -> dict[str, Tensor]:
        """Take the gradients of the stacked weights, (T, ...) by name. Weights that the loss does not use have none."""
        owners = self.weights if self._only is None else dict(self._only.named_parameters())
        found = {}
        for name in self.adam:
            gradient, owners[name].grad = owners[name].grad, None
            if gradient is not None:
                found[name] = gradient if self._only is None else gradient[None]
        return found

    @torch.no_grad()
    def write(self, positions: Sequence[int], weights: dict[str, Tensor]) -> None:
        """Write weights into some of the networks that still learn.

        Args:
            positions: Positions in the stack.
            weights: Stacked weights, (T, ...) by name.
        """
        for position in positions:
            xnn = self.xnns[self.alive[position]]
            for name, target in (*xnn.named_parameters(), *xnn.named_buffers()):
                target.copy_(weights[name][position])

    def keep(self, which: Tensor) -> None:
        """Continue with some of the networks.

        Args:
            which: Boolean (T,).
        """
        self.weights = {k: t.detach()[which].clone().requires_grad_(t.requires_grad) for k, t in self.weights.items()}
        self.adam = {name: _Adam(a.first[which], a.second[which], a.steps) for name, a in self.adam.items()}
        self._set_alive([t for t, kept in zip(self.alive, which.tolist(), strict=True) if kept])

    def close(self) -> None:
        """End the training of all networks."""
        self._set_alive([])

    @property
    def state(self) -> dict[str, Any]:
        """Weights and moments. Assign them to resume from there."""
        return {
            "alive": self.alive,
            "done": {str(t): dict(xnn.state_dict()) for t, xnn in enumerate(self.xnns) if t not in self.alive},
            "weights": {k: t.detach() for k, t in self.weights.items()},
            "adam": {name: list(a) for name, a in self.adam.items()},
        }

    @state.setter
    def state(self, saved: dict[str, Any]) -> None:
        for t, done in saved["done"].items():
            self.xnns[int(t)].load_state_dict(done)
        self.weights = {k: t.requires_grad_(self.weights[k].requires_grad) for k, t in saved["weights"].items()}
        self.adam = {name: _Adam(*a) for name, a in saved["adam"].items()}
        self._set_alive(saved["alive"])
