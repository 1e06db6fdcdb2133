"""Register, promote and list trained models in MLflow's registry.

The tags of a version hold its metrics and the dataset that they were measured on: `mAP` is always
the test's, `validation/mAP` that of a validation split if it chose the checkpoint, as the tag
`selected_on` says. The alias `champion` marks the model to use. It moves only to a version with a
higher mAP on the split that chose it, and only if both were measured on the same images.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_shards.errors import ObjectMissing, StorageError
from reid_train.tracking.server import accepted, connect, explain, unless_there
from reid_train.tracking.uris import redact, registry_uri

logger = logging.getLogger(__name__)

CHAMPION = "champion"
MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter for an alias


@dataclass(frozen=True)
class Registered:
    """A version that was just registered, whether it is now the champion, and why."""

    name: str
    version: int
    champion: bool
    reason: str

    @property
    def uri(self) -> str:
        """For `load`, and for `mlflow.pyfunc.load_model`."""
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True)
class ModelVersion:
    """A registered version. A field is None if the version has no such tag."""

    name: str
    version: int
    aliases: tuple[str, ...]
    mean_average_precision: float | None
    rank1: float | None
    dataset: str | None  # its name
    manifest_digest: str | None
    evaluation_digest: str | None
    created: datetime
    run: str | None  # its name
    run_id: str | None

    def row(self) -> tuple[str, ...]:
        """Name, version, aliases, mAP, rank-1, dataset, day of creation, run, as text."""

        def percent(value: float | None) -> str:
            return "–" if value is None else f"{100 * value:.1f}"

        return (
            self.name,
            str(self.version),
            ", ".join(self.aliases),
            percent(self.mean_average_precision),
            percent(self.rank1),
            self.dataset or (self.manifest_digest or "–")[:12],
            f"{self.created:%Y-%m-%d}",
            self.run or (self.run_id or "–")[:12],
        )


def register(
    folder: str | Path,
    name: str,
    metrics: Mapping[str, float],
    *,
    manifest_digest: str,
    evaluation_digest: str,
    run_id: str,
    dataset: str = "",
    run: str = "",
    tracking_uri: str | None = None,
    validation: Mapping[str, float] | None = None,
    validation_digest: str | None = None,
) -> Registered:
    """Register a model as a new version, and make it the champion if it is better.

    Args:
        folder: a folder with `model.safetensors` and `config.json`, such as a checkpoint.
        name: name of the registered model; it is created if there is none.
        metrics: fractions by name, on test; `mAP` decides, `rank-1` is shown.
        manifest_digest: digest of the dataset that it was trained on.
        evaluation_digest: digest of the query and gallery that the metrics were measured on.
        run_id: the MLflow run that trained it.
        dataset, run: names of the dataset and of the run, to show.
        tracking_uri: the MLflow to use; None takes MLFLOW_TRACKING_URI, or ./mlflow.db.
        validation: fractions by name on the validation split, if it chose the model; then they
            decide.
        validation_digest: digest of the validation split.

    Raises:
        DataError: the folder does not hold a model.
    """
    from reid_train.registry.packaging import log_model

    uri = registry_uri(tracking_uri)
    tags = _metric_tags(metrics, validation)
    tags |= {"manifest_digest": manifest_digest, "evaluation_digest": evaluation_digest}
    tags |= {key: name for key, name in (("dataset", dataset), ("run", run)) if name}
    if validation_digest is not None:
        tags["validation_digest"] = validation_digest
    tags["selected_on"] = "test" if validation_digest is None else "validation"
    with mlflow_errors(f"registering {name}", uri):
        client = connect(uri)
        model = log_model(client, Path(folder), name, run_id, tags)
        if not all_pages(client.search_registered_models, f"name = '{name}'"):
            with unless_there():  # another training ended at the same time
                client.create_registered_model(name)
        made = client.create_model_version(
            name, model.artifact_location, run_id, tags, model_id=model.model_id
        )
        champion, reason = _promote(client, name, made.version, tags)
    registered = Registered(name, int(made.version), champion, reason)
    logger.info("%s: %s", registered.uri, reason)
    return registered


def _metric_tags(
    metrics: Mapping[str, float], validation: Mapping[str, float] | None
) -> dict[str, str]:
    """The figures that a version is compared by, as tags."""
    groups = {"": metrics, "validation/": validation or {}}
    return {
        prefix + name: str(group[name])
        for prefix, group in groups.items()
        for name in ("mAP", "rank-1")
        if name in group
    }


def default_name(
    dataset: str,
    evaluation_digest: str,
    tracking_uri: str | None = None,
    *,
    validation_digest: str | None = None,
) -> str:
    """Name a dataset's models `reid-<dataset>`, so that all with one name can be compared.

    If models of that name were measured on other images, the name ends in a digest.
    """
    name = accepted(f"reid-{dataset}")
    uri = registry_uri(tracking_uri)
    with mlflow_errors(f"looking up {name}", uri):
        versions = all_pages(connect(uri).search_model_versions, f"name = '{name}'")
    measured = [_measured_on(version.tags) for version in versions]
    if not measured or (evaluation_digest, validation_digest) in measured:
        return name
    own = f"{name}-{(validation_digest or evaluation_digest)[:8]}"
    logger.warning(
        "the models called %s were measured on other query and gallery images, and cannot be "
        "compared with this one: it is called %s (--tracking.model-name gives it another name)",
        *(name, own),
    )
    return own


def registered_version(
    name: str,
    run_id: str,
    metrics: Mapping[str, float],
    tracking_uri: str,
    *,
    validation: Mapping[str, float] | None = None,
) -> Registered | None:
    """Return the version that an MLflow run has registered with these metrics, if there is one.

    It becomes the champion if it should be and is not: MLflow may have refused to move the alias.
    """
    wanted = _metric_tags(metrics, validation)
    with mlflow_errors(f"looking for versions of {name}", tracking_uri):
        client = connect(tracking_uri)
        for version in all_pages(client.search_model_versions, f"name = '{name}'"):
            if version.run_id == run_id and wanted.items() <= version.tags.items():
                reason = "registered before"
                champion = CHAMPION in client.get_model_version(name, version.version).aliases
                if not champion:
                    champion, why = _promote(client, name, version.version, version.tags)
                    reason = f"{reason}, {why}"
                return Registered(name, int(version.version), champion, reason)
    return None


def _promote(client: Any, name: str, version: str, tags: Mapping[str, str]) -> tuple[bool, str]:
    """Move the champion's alias to a version if it is better; return whether, and why."""
    best = client.get_registered_model(name).aliases.get(CHAMPION)
    best_tags = client.get_model_version(name, best).tags if best else None
    champion, reason = should_promote(tags, best_tags)
    if champion:
        client.set_registered_model_alias(name, CHAMPION, version)
    return champion, reason


def _measured_on(tags: Mapping[str, str]) -> tuple[str | None, str | None]:
    """The digests of the test and the validation images; versions compare if both are the same."""
    return tags.get("evaluation_digest"), tags.get("validation_digest")


def should_promote(
    candidate: Mapping[str, str], champion: Mapping[str, str] | None
) -> tuple[bool, str]:
    """Decide from their tags whether a version replaces the champion, and say why in words."""
    name = "validation/mAP" if "validation_digest" in candidate else "mAP"
    score = _number(candidate.get(name))
    if score is None:
        return False, f"not promoted: its {name} was not measured"
    if champion is None:
        return True, f"promoted: the first champion, {name} {score:.4f}"
    if _measured_on(candidate) != _measured_on(champion):
        return False, (
            "not promoted: the champion was measured on another query and gallery; evaluate both "
            "on the same ones, and move the alias by hand if this one is better"
        )
    best = _number(champion.get(name))
    if best is not None and score <= best:
        return False, f"not promoted: {name} {score:.4f} is not above the champion's {best:.4f}"
    return True, f"promoted: {name} {score:.4f}, the champion had {best or math.nan:.4f}"


def list_models(tracking_uri: str | None = None) -> list[ModelVersion]:
    """List all versions of all registered models, by name, then newest first."""
    uri = registry_uri(tracking_uri)
    found = []
    with mlflow_errors("listing models", uri):
        client = connect(uri)
        for model in all_pages(client.search_registered_models):
            # A search returns versions without their aliases, but the model has them.
            for item in all_pages(client.search_model_versions, f"name = '{model.name}'"):
                aliases = (a for a, v in model.aliases.items() if int(v) == int(item.version))
                found.append(
                    ModelVersion(
                        name=item.name,
                        version=int(item.version),
                        aliases=tuple(sorted(aliases)),
                        mean_average_precision=_number(item.tags.get("mAP")),
                        rank1=_number(item.tags.get("rank-1")),
                        dataset=item.tags.get("dataset"),
                        manifest_digest=item.tags.get("manifest_digest"),
                        evaluation_digest=item.tags.get("evaluation_digest"),
                        created=datetime.fromtimestamp(item.creation_timestamp / 1000, UTC),
                        run=item.tags.get("run"),
                        run_id=item.run_id,
                    )
                )
    return sorted(found, key=lambda item: (item.name, -item.version))


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return None if math.isnan(value) else value


def all_pages(search: Callable[..., Any], query: str | None = None) -> list[Any]:
    """All pages of a search."""
    page = search(filter_string=query)
    found = list(page)
    while page.token:
        page = search(filter_string=query, page_token=page.token)
        found += page
    return found


@contextmanager
def mlflow_errors(what: str, uri: str) -> Iterator[None]:
    """Turn what MLflow and its artifact stores raise into a StorageError."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, Boto3Error, BotoCoreError, ClientError, OSError) as error:
        missing = getattr(error, "error_code", "") in MISSING
        kind = ObjectMissing if missing else StorageError
        raise kind(f"{what}: MLflow at {redact(uri)}: {explain(error, uri)}") from error
