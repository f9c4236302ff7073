"""The trials of all replicas of a server: a deployment of Ray Serve with one process, and how replicas ask it."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from rzen.serving.canary import CanaryConfig, Counts, Ruling, TrialCoordinator, Verdict
from rzen.serving.place import TaggedPlace

_TIMEOUT_S = 10.0


class TrialDeployment(TrialCoordinator):
    """The coordinator as a deployment. `config` is the JSON of a `CanaryConfig`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(CanaryConfig.model_validate(config))


class RemoteTrials:
    """`Trials` of another process. Raises `OSError` while Ray Serve replaces that process."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def start(self, found: TaggedPlace) -> TaggedPlace:
        """Return the pair that a replica should start with."""
        pair: TaggedPlace = await self._ask("start", found)
        return pair

    async def see(self, found: TaggedPlace, used: TaggedPlace, known: Verdict) -> Verdict:
        """Return the verdict on what a replica found at the place."""
        verdict: Verdict = await self._ask("see", found, used, known)
        return verdict

    async def report(self, found: TaggedPlace, replica: str, counts: Counts) -> Ruling:
        """Return the verdict after a replica's answers."""
        ruling: Ruling = await self._ask("report", found, replica, counts)
        return ruling

    async def give_up(self, found: TaggedPlace) -> None:
        """Give a pair up, whatever was counted."""
        await self._ask("give_up", found)

    async def _ask(self, method: str, *arguments: Any) -> Any:
        try:  # without a process, Ray Serve waits for one
            return await asyncio.wait_for(getattr(self._handle, method).remote(*arguments), _TIMEOUT_S)
        except (RayError, RayServeException) as error:
            raise ConnectionError(str(error)) from error
