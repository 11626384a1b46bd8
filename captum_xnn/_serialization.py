"""Save explainers to a folder, and load them: a JSON file that describes them, a safetensors file with their weights.

The JSON file names the weights file and its checksum. It is written last, and replaces the old JSON file in one step: a
crash while saving leaves the old pair as it was. The files contain no pickles, so loading runs no foreign code.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from captum_xnn._files import Format, made_folder, replace_file
from captum_xnn.errors import ExplainerFileError, ModelMismatchError
from captum_xnn.explainer import Explainer
from captum_xnn.layers._fingerprint import check_fingerprint, differences, fingerprint, new_squashing
from captum_xnn.layers._stacklevel import levels_up
from captum_xnn.layers._targets import Target
from captum_xnn.models._contribution_groups import ContributionGroups
from captum_xnn.models._form import Form
from captum_xnn.models._srae import SRAE, ConvSRAE, PaperSRAE
from captum_xnn.models.baselines import CAE, DRSA, NMF, NN, SAE, Lasso, RandomDecoder, RandomEncoder, SingleDimensions
from captum_xnn.training._history import Record
from captum_xnn.training._recipe import Recipe

__all__ = ["SCHEMA", "TRANSFORMS", "SavedExplainers", "is_saved", "read"]

SCHEMA = 1
TRANSFORMS = ("output_transform", "prediction_transform")
"""Functions of an explanation that cannot be saved. A manifest names the ones that were used."""

_MANIFEST = "explainer.json"
_REMEDY = "save the explainer anew with XNNAttribution.save, or pass the folder it was saved to"
_FORMAT = Format("explainers", {}, ("schema", SCHEMA), ("weights", "sha256"), ExplainerFileError, _REMEDY)

_FORMS: tuple[type[Form], ...] = (
    ContributionGroups,
    SRAE,
    ConvSRAE,
    PaperSRAE,
    NN,
    SAE,
    CAE,
    Lasso,
    SingleDimensions,
    RandomEncoder,
    RandomDecoder,
    NMF,
    DRSA,
)


class SavedExplainers(NamedTuple):
    """The explainers of one layer, as a folder holds them."""

    layer: str
    """Dotted name of the layer."""
    n_features: int
    seed: int
    recipe: Recipe
    transforms: list[str]
    """Names of the functions that the explainers were fitted with, some of :data:`TRANSFORMS`."""
    fingerprint: dict[str, Any]
    """Identity of the model and the layer (:func:`captum_xnn.layers._fingerprint.fingerprint`)."""
    explainers: list[Explainer]

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the explainers into a folder in place of its old ones; return the folder.

        Args:
            path: The folder, made if it does not exist.
        """
        manifest = {
            **self._asdict(),
            "recipe": asdict(self.recipe),
            "explainers": [_described(explainer) for explainer in self.explainers],
        }
        tensors = {f"{i}.{key}": t for i, e in enumerate(self.explainers) for key, t in e.form.state_dict().items()}
        return _write(path, manifest, tensors)

    @classmethod
    def read(cls, path: str | os.PathLike[str], forms: Sequence[type[Form]] = ()) -> SavedExplainers:
        """Read the explainers in a folder.

        Args:
            path: The folder.
            forms: A user's own classes of explanation networks, in addition to those of this package.

        Raises:
            ExplainerFileError: If files are missing, damaged, or foreign, or if the class of a network is unknown.
        """
        manifest, tensors = read(path)
        try:
            return cls._of(manifest, tensors, forms)
        except ExplainerFileError:
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ExplainerFileError(
                f"the explainer in {str(path)!r} has entries missing or damaged ({error}); save it anew with "
                "XNNAttribution.save"
            ) from error

    @classmethod
    def _of(cls, manifest: dict[str, Any], tensors: dict[str, Tensor], forms: Sequence[type[Form]]) -> SavedExplainers:
        """Parse a manifest. A damaged one raises errors of several kinds."""
        name, transforms, n_features = manifest["layer"], manifest["transforms"], manifest["n_features"]
        if not isinstance(name, str) or type(n_features) is not int or n_features < 1:
            raise ValueError(f"layer is {name!r} and n_features is {n_features!r}")
        if not isinstance(transforms, list) or any(k not in TRANSFORMS for k in transforms):
            raise ValueError(f"transforms are {transforms!r}, and only {' and '.join(TRANSFORMS)} exist")
        check_fingerprint(manifest["fingerprint"])
        explainers = []
        # torch draws weights at construction, and these are replaced.
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            for i, entry in enumerate(manifest["explainers"]):
                own = {key.removeprefix(f"{i}."): t for key, t in tensors.items() if key.startswith(f"{i}.")}
                explainers.append(_restored(entry, own, name, forms))
        return cls(
            layer=name,
            n_features=n_features,
            seed=int(manifest["seed"]),
            recipe=Recipe(**manifest["recipe"]),
            transforms=transforms,
            fingerprint=manifest["fingerprint"],
            explainers=explainers,
        )

    def check(self, model: nn.Module, settings: Mapping[str, Any], *, strict: bool) -> None:
        """Raise where the explainers cannot be used with a model, or with a user's settings.

        Args:
            model: A plain module.
            settings: The user's settings by name.
            strict: Whether a model of other weights or classes raises an error. Otherwise it is a warning.

        Raises:
            ModelMismatchError: If the model lacks the layer, or differs.
            TypeError: If a function is missing that the explainers were fitted with.
        """
        if self.layer not in dict(model.named_modules()):
            raise ModelMismatchError(
                f"the {type(model).__name__} has no layer {self.layer!r}; pass the model that the explainers were "
                f"fitted to, a {self.fingerprint['model_class']}"
            )
        without = [k for k in self.transforms if settings.get(k) is None]
        if without:
            raise TypeError(
                f"these explainers were fitted with {' and '.join(f'{k}=' for k in without)}, and functions cannot be "
                "saved; pass the same function again to load"
            )
        different = differences(self.fingerprint, fingerprint(model, self.layer))
        if not different:
            return
        squashed = new_squashing(self.fingerprint, fingerprint(model, self.layer))
        fix = (
            "load its weights first, or fit anew"
            if squashed is None
            else f"pass the model without its {squashed}, or fit anew; contributions to a probability mix all classes"
        )
        message = f"the model differs: {'; '.join(different)}. The explainers were fitted to another one: {fix}"
        if strict:
            raise ModelMismatchError(message + "; strict=False loads all the same")
        warnings.warn(message, stacklevel=levels_up())


def _write(directory: str | os.PathLike[str], manifest: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write explainers into a folder in place of its old ones; return the folder.

    Args:
        directory: The folder, made if it does not exist.
        manifest: Description of the explainers, as JSON can hold it.
        tensors: Weights by name.
    """
    folder = made_folder(directory)
    data = save_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    weights = f"weights-{digest[:12]}.safetensors"
    replace_file(folder / weights, data)
    described = {"schema": SCHEMA, "weights": weights, "sha256": digest, **manifest}
    replace_file(folder / _MANIFEST, json.dumps(described, indent=1).encode())
    for old in folder.glob("weights-*.safetensors"):
        if old.name != weights:
            old.unlink(missing_ok=True)
    return folder


def is_saved(directory: str | os.PathLike[str]) -> bool:
    """Whether a folder holds explainers, whole or damaged.

    Args:
        directory: The folder.
    """
    return (Path(directory) / _MANIFEST).is_file()


def read(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the manifest and the weights of saved explainers.

    Args:
        directory: The folder to which they were saved.

    Raises:
        ExplainerFileError: If a file is missing, cut short, changed, of another version, or of another program.
    """
    manifest = _FORMAT.read(Path(directory) / _MANIFEST)
    weights = Path(directory) / Path(str(manifest["weights"])).name
    try:
        data = weights.read_bytes()
    except OSError as error:
        raise ExplainerFileError(f"the weights {str(weights)!r} are missing or cannot be read; {_REMEDY}") from error
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise ExplainerFileError(f"the weights {str(weights)!r} are cut short or were changed; {_REMEDY}")
    try:
        return manifest, load_tensors(data)
    except SafetensorError as error:
        raise ExplainerFileError(f"the weights {str(weights)!r} are not safetensors ({error}); {_REMEDY}") from error


def _described(explainer: Explainer) -> dict[str, Any]:
    """Return everything of an explainer except the weights, in types that JSON can hold."""
    return {
        "targets": explainer.targets,
        "class": _name(type(explainer.form)),
        "config": explainer.form.config,
        "dtype": str(explainer.form.dtype).removeprefix("torch."),
        "f_reg": explainer.f_reg,
        "examples": explainer.examples,
        "positives": explainer.positives,
        "floor": explainer.floor,
        "history": explainer.history,
        "requested": explainer.requested,
    }


def _restored(entry: dict[str, Any], weights: dict[str, Tensor], layer: str, forms: Sequence[type[Form]]) -> Explainer:
    """Rebuild an explainer from its description and the network's tensors by name."""
    with torch.device("cpu"):  # the weights are there, whatever torch's default device is
        form = _form(entry["class"], forms)(**entry["config"]).to(getattr(torch, entry["dtype"]))
    form.load_state_dict(weights)
    return Explainer(
        layer=layer,
        targets=_targets(entry["targets"]),
        form=form.requires_grad_(False),
        f_reg=entry["f_reg"],
        examples=entry["examples"],
        positives=entry["positives"],
        floor=entry["floor"],
        history=tuple(Record(*record) for record in entry["history"]),
        requested=entry["requested"],
    )


def _targets(saved: Any) -> tuple[Target, ...]:
    """Restore targets from a file, in which tuples are lists."""
    made = tuple(tuple(t) if isinstance(t, list) else t for t in saved)
    for target in made:
        numbers = target if isinstance(target, tuple) else () if target is None else (target,)
        if not all(type(t) is int for t in numbers):
            raise ValueError(f"a target is {target!r}, and not None, an int or a list of ints")
    return made


def _name(form: type[Form]) -> str:
    """Return the name of a form's class in files; classes from outside this package include their module."""
    return form.__name__ if form in _FORMS else f"{form.__module__}.{form.__qualname__}"


def _form(name: str, forms: Sequence[type[Form]]) -> type[Form]:
    """Find the class that a file names.

    A class in ``forms`` matches by its bare name, so its module may have moved. No module is imported, because a file
    must not run code.
    """
    for form in _FORMS:
        if form.__name__ == name:
            return form
    for form in forms:
        if form.__name__ == name.rpartition(".")[2]:
            return form
    raise ExplainerFileError(
        f"the explainer's class {name!r} is not known; pass the class to load, as "
        f"XNNAttribution.load(path, model, forms=[{name.rpartition('.')[2]}])"
    )
