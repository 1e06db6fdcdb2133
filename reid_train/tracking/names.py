"""Names that MLflow accepts, tried with MLflow 3.17 on SQLite and through its REST server."""

from __future__ import annotations

import re

from data_shards.errors import ConfigError

LONGEST = 250
"""Characters. SQLite takes longer names, but the other databases of MLflow have columns of 250 to
256, and a run's own name is kept in one of 250."""
_NOT_IN_MODELS = "/:.%\"'?@"
"""MLflow refuses the first six in the name of a model; ? and @ have a meaning in models:/…"""


def require_names(
    *, model: str | None = None, experiment: str | None = None, run: str | None = None
) -> None:
    """Check names before any work starts. A name that is None is not checked.

    Raises:
        ConfigError: MLflow does not accept one of them; the message has a name that it accepts.
    """
    for what, flag, name in (
        ("model", "--tracking.model-name", model),
        ("experiment", "--tracking.experiment", experiment),
        ("run", "--name", run),
    ):
        if name is None:
            continue
        bad = sorted({c for c in name if not c.isprintable()})
        if what == "model":
            bad += sorted(set(name) & set(_NOT_IN_MODELS))
        if bad:
            shown = " ".join(c if c.isprintable() else repr(c) for c in bad)
            raise ConfigError(
                f"{flag} {name!r}: MLflow does not accept {shown} in the name of a {what}; "
                f"{accepted(name)!r} is one that it accepts"
            )
        if not name or name != name.strip() or len(name) > LONGEST:
            raise ConfigError(
                f"{flag} {_short(name)!r} has {len(name)} characters; MLflow needs 1 to {LONGEST}, "
                "without spaces at the ends"
            )


def accepted(name: str) -> str:
    """The most similar name that MLflow accepts for a model."""
    kept = "".join(c if c.isprintable() and c not in _NOT_IN_MODELS else "-" for c in name)
    return re.sub("-+", "-", kept).strip("- ")[:LONGEST] or "model"


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:40]}…"
