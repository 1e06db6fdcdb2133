"""Reading and checking the manifests in cluster/kuberay, for the tests of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from json import loads
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
KUBERNETES = "1.37"
"""The version whose schemas are taken; what the manifests use is as old as Kubernetes 1.25."""

Object = dict[str, Any]
Path_ = tuple[str | int, ...]

_UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def documents(path: Path) -> list[Object]:
    """The YAML documents of a file."""
    return list(yaml.safe_load_all(path.read_text()))


def problems(document: Object) -> list[str]:
    """What an API server would refuse or silently prune, as 'path: message' lines."""
    if document.get("apiVersion") == "ray.io/v1":
        errors = _kuberay(str(document.get("kind"))).iter_errors(document)
        return sorted({line for error in errors for line in _lines(error)})
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return list(_lines(error))
    return []


def pods(document: Object) -> dict[str, Object]:
    """The pod specifications of a Ray kind: 'head', and each worker group's name."""
    spec = cluster_spec(document)
    found = {"head": spec["headGroupSpec"]["template"]["spec"]}
    return found | {g["groupName"]: g["template"]["spec"] for g in spec["workerGroupSpecs"]}


def cluster_spec(document: Object) -> Object:
    """The RayClusterSpec of a RayCluster, RayJob or RayService."""
    spec, inner = document["spec"], {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
    return spec[inner[document["kind"]]] if document["kind"] in inner else spec


def quantity(value: str | int | float) -> float:
    """A Kubernetes quantity such as 500m, 16Gi or 4, as a number."""
    match = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(value))
    assert match, f"not a quantity: {value!r}"
    return float(match[1]) * _UNITS[match[2]]


def leaves(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every scalar of a document with the path to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    else:
        yield path, value


def _kuberay(kind: str) -> Draft202012Validator:
    folder = files(kubernetes_validate) / "kubernetes-json-schema" / f"v{KUBERNETES}.0-local-strict"
    core = Resource.from_contents(loads((folder / "_definitions.json").read_text()))
    own = yaml.safe_load((ROOT / "tests" / "schemas" / "kuberay.yaml").read_text())
    registry = Registry().with_resources(
        [(resource.id() or "", resource) for resource in (core, Resource.from_contents(own))]
    )
    return Draft202012Validator({"$ref": f"{own['$id']}#/$defs/{kind}"}, registry=registry)


def _lines(error: Any) -> Iterator[str]:
    """The innermost messages: `oneOf` of a quantity or a port says nothing by itself."""
    if error.context:
        for inner in error.context:
            yield from _lines(inner)
    else:
        yield f"{'.'.join(str(part) for part in error.absolute_path)}: {error.message}"
