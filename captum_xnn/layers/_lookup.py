"""Find a layer in a model, by its dotted name or as a module."""

from __future__ import annotations

import difflib
from typing import cast

import torch
from torch import nn

from captum_xnn.errors import LayerNotFoundError

__all__ = ["find_layer", "hookable", "quantised", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """Take ``torch.compile`` and ``DataParallel`` wrappers off a model, so that its layers can be hooked.

    Args:
        model: The user's model.

    Raises:
        TypeError: If the model is not a module, or is scripted or traced, so that its layers cannot be hooked.

    Example:
        >>> unwrap(nn.DataParallel(nn.Linear(2, 1)))
        Linear(in_features=2, out_features=1, bias=True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the model is a {type(model).__name__}, not a torch.nn.Module whose layers can be hooked; pass the model "
            "itself, or wrap the function in a module that holds the layers"
        )
    while True:
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                f"the model is a {type(model).__name__}, and the layers of scripted and traced modules cannot be read; "
                "pass the module that was scripted"
            )
        if hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def find_layer(model: nn.Module, layer: str | nn.Module) -> tuple[str, nn.Module]:
    """Find a layer of the model; return its dotted name and the module.

    Args:
        model: A plain module.
        layer: A dotted name as in ``model.named_modules()``, or the module itself.

    Raises:
        LayerNotFoundError: If the model has no such layer. The error lists near names.
        TypeError: If layer is neither a name nor a module.

    Example:
        >>> find_layer(nn.Sequential(nn.Linear(2, 1), nn.ReLU()), "1")
        ('1', ReLU())
    """
    if isinstance(layer, str):
        names = []
        for name, module in model.named_modules():
            if name and name == layer:
                return name, module
            names += [name] if name else []
        if not names:
            kind = type(model).__name__
            raise LayerNotFoundError(
                f"{kind} has no layer {layer!r}, as it holds no other module; explain nn.Sequential(model) at layer '0'"
            )
        near = difflib.get_close_matches(layer, names, n=5, cutoff=0.4) or names[:5]
        raise LayerNotFoundError(
            f"{type(model).__name__} has no layer {layer!r}; near names: "
            f"{', '.join(map(repr, near))} (all of them: `dict(model.named_modules())`)"
        )
    if not isinstance(layer, nn.Module):
        raise TypeError(f"{type(layer).__name__} is not a layer; pass a dotted name or a module of the model")
    wanted = unwrap(layer)
    for name, module in model.named_modules():
        if module is wanted:
            return name, module
    raise LayerNotFoundError(
        f"{type(model).__name__} does not hold this {type(layer).__name__}; pass a layer of this very model object, "
        "or its dotted name"
    )


def hookable(*roots: nn.Module) -> list[nn.Module]:
    """List all modules in some modules, each once, without scripted and traced modules: these take no hooks.

    Args:
        roots: Plain modules.

    Example:
        >>> hookable(nn.Sequential(nn.ReLU()))
        [Sequential(
          (0): ReLU()
        ), ReLU()]
    """
    found = dict.fromkeys(module for root in roots for module in root.modules())
    return [module for module in found if not isinstance(module, torch.jit.ScriptModule)]


def quantised(model: nn.Module) -> list[str]:
    """List the names of quantised modules. Their kernels round and have no gradients.

    Dynamically quantised modules round by the extremes of the whole batch.

    Args:
        model: A plain module.

    Example:
        >>> quantised(nn.Sequential(nn.Linear(2, 1)))
        []
    """
    return [
        name
        for name, module in model.named_modules()
        if ".quantized." in f"{type(module).__module__}." and not name.endswith("_packed_params")
    ]
