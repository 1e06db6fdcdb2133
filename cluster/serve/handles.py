"""Calls of other deployments: again if a replica died, and their errors as they were raised."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from ray.exceptions import RayActorError

logger = logging.getLogger(__name__)

RETRY_SECONDS = 120.0  # for a new replica to start and load the gallery
PAUSE, PAUSE_MOST = 0.1, 2.0


async def call(method: Any, *arguments: Any, **options: Any) -> Any:
    """Call a deployment's method; call it again if its replica dies before it answers.

    All methods may be called again: a second enrolment of the same image changes nothing.
    """
    deadline, pause = time.monotonic() + RETRY_SECONDS, PAUSE
    while True:
        try:
            return await method.remote(*arguments, **options)
        except RayActorError:
            if time.monotonic() > deadline:
                raise
            logger.warning("a replica ended before it answered: calling another")
            await asyncio.sleep(pause)
            pause = min(PAUSE_MOST, 2 * pause)


def cause(error: BaseException) -> BaseException:
    """The error that a deployment raised: Ray's has the traceback of the replica in its text."""
    return getattr(error, "cause", None) or error
