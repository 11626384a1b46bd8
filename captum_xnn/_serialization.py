"""Write and read saved explainers: a JSON file that describes them and a safetensors file with their weights.

The JSON file names the weights file and its checksum. It is written last, and replaces the old JSON file in one step: a
crash while saving leaves the old pair as it was. The files contain no pickles, so loading runs no foreign code.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from captum_xnn.errors import ExplainerFileError

__all__ = ["SCHEMA", "check_fingerprint", "checksum", "differences", "fingerprint", "read", "replace_file", "write"]

SCHEMA = 1
_MANIFEST = "explainer.json"


def fingerprint(model: nn.Module, layer: str) -> dict[str, Any]:
    """Describe the identity of a model and one layer: their classes, and shape, dtype and checksum of every tensor.

    Args:
        model: A plain module.
        layer: Dotted name of the layer.

    Example:
        >>> made = fingerprint(nn.Sequential(nn.Linear(2, 1)), "0")
        >>> made["layer_class"], sorted(made["tensors"])
        ('Linear', ['0.bias', '0.weight'])
    """
    tensors = {
        name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "checksum": checksum(t)}
        for name, t in model.state_dict().items()
        if isinstance(t, Tensor)
    }
    return {
        "model_class": type(model).__name__,
        "layer": layer,
        "layer_class": type(model.get_submodule(layer)).__name__,
        "tensors": tensors,
    }


def check_fingerprint(saved: Any) -> None:
    """Raise where a fingerprint from a file is damaged.

    Args:
        saved: Contents of the file, in the form of :func:`fingerprint` unless damaged.

    Raises:
        ValueError: If an entry is missing or of another type.

    Example:
        >>> check_fingerprint(fingerprint(nn.Sequential(nn.Linear(2, 1)), "0"))
        >>> check_fingerprint({"model_class": "Sequential", "layer": "0", "layer_class": "Linear", "tensors": [1]})
        Traceback (most recent call last):
        ...
        ValueError: tensors of the fingerprint are a list, expected shape, dtype and checksum of each by name
    """
    for key in ("model_class", "layer", "layer_class"):
        if not isinstance(saved, dict) or not isinstance(saved.get(key), str):
            raise ValueError(f"the fingerprint has no {key}")
    tensors = saved.get("tensors")
    if not isinstance(tensors, dict):
        raise ValueError(
            f"tensors of the fingerprint are a {type(tensors).__name__}, expected shape, dtype and checksum of each by "
            "name"
        )
    for name, entry in tensors.items():
        has_all = isinstance(entry, dict) and {"shape", "dtype", "checksum"} <= entry.keys()
        if not has_all or not isinstance(entry["shape"], list) or not isinstance(entry["dtype"], str):
            raise ValueError(f"the fingerprint of tensor {name!r} is {entry!r}, expected shape, dtype and checksum")


def checksum(tensor: Tensor) -> str:
    """Compute the checksum of a tensor's values, 16 hexadecimal digits.

    Args:
        tensor: Any tensor; only its bytes count, not its shape.

    Example:
        >>> checksum(torch.zeros(3)) == checksum(torch.zeros(3)), checksum(torch.zeros(3)) == checksum(torch.ones(3))
        (True, False)
    """
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=8).hexdigest()


def differences(saved: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Describe the differences between two fingerprints in words; the list is empty if they are the same.

    Args:
        saved: Fingerprint of the model to which an explainer was fitted.
        found: Fingerprint of the model with which the explainer is to be used.

    Example:
        >>> a, b = (fingerprint(nn.Sequential(nn.Linear(size, 1)), "0") for size in (2, 3))
        >>> differences(a, b)[0]
        'tensor 0.weight is float32 [1, 3], was float32 [1, 2]'
    """
    said = [
        f"{key.replace('_', ' ')} is {found[key]}, was {saved[key]}"
        for key in ("model_class", "layer", "layer_class")
        if saved[key] != found[key]
    ]
    old, new = saved["tensors"], found["tensors"]
    changed = []
    for name in (n for n in old if n in new and old[n] != new[n]):
        was, now = (f"{t['dtype']} {t['shape']}" for t in (old[name], new[name]))
        if was != now:
            said.append(f"tensor {name} is {now}, was {was}")
        else:
            changed.append(name)
    for what, names in (
        ("has other values", changed),
        ("is missing", [n for n in old if n not in new]),
        ("is new", [n for n in new if n not in old]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            said.append(f"{', '.join(names[:3])}{more} {what}")
    return said


def write(directory: str | os.PathLike[str], manifest: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write explainers into a folder in place of its old ones; return the folder.

    Args:
        directory: The folder, made if it does not exist.
        manifest: Description of the explainers, as JSON can hold it.
        tensors: Weights by name.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
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


def replace_file(path: Path, *data: bytes | memoryview) -> None:
    """Replace a file in one step, so that a crash leaves either the old or the new file, never half of one.

    The new contents are written to a temporary file in the same folder, which is then renamed.

    Args:
        path: The file.
        data: New contents of the file, in pieces.
    """
    # tempfile would make the file readable only for its owner, but these files are to be shared.
    draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with draft.open("xb") as file:
            for some in data:
                file.write(some)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the manifest and the weights of saved explainers.

    Args:
        directory: The folder to which they were saved.

    Raises:
        ExplainerFileError: If a file is missing, cut short, changed, of another version, or of another program.
    """
    path = Path(directory) / _MANIFEST
    hint = "save the explainer anew with XNNAttribution.save, or pass the folder it was saved to"
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ExplainerFileError(f"{str(directory)!r} has no {_MANIFEST}; {hint}") from error
    except OSError as error:
        raise ExplainerFileError(f"{str(path)!r} cannot be read; {hint}") from error
    except ValueError as error:
        raise ExplainerFileError(f"{str(path)!r} is cut short, or is not JSON; {hint}") from error
    if not isinstance(manifest, dict) or not {"schema", "weights", "sha256"} <= set(manifest):
        raise ExplainerFileError(f"{str(path)!r} is JSON, but does not describe explainers; {hint}")
    if manifest["schema"] != SCHEMA:
        raise ExplainerFileError(
            f"{str(path)!r} has schema {manifest['schema']!r} instead of {SCHEMA}, as another version of captum_xnn "
            "wrote it; use that version, or fit and save anew"
        )
    weights = Path(directory) / Path(str(manifest["weights"])).name
    try:
        data = weights.read_bytes()
    except OSError as error:
        raise ExplainerFileError(f"the weights {str(weights)!r} are missing or cannot be read; {hint}") from error
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise ExplainerFileError(f"the weights {str(weights)!r} are cut short or were changed; {hint}")
    try:
        return manifest, load_tensors(data)
    except SafetensorError as error:
        raise ExplainerFileError(f"the weights {str(weights)!r} are not safetensors ({error}); {hint}") from error
