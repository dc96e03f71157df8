"""What a job needs on the device before its images start: its adapters, its ControlNets and IP-Adapters."""

from serving.engine.job import Job, Sample
from serving.engine.tiers.adapters import Adapters, explain_load
from serving.engine.tiers.networks import Networks, explain_network
from serving.errors import Refused


class Bringer:
    """Takes all of what an image needs or nothing, so that two never hold half of it and wait for each other."""

    def __init__(self, adapters: Adapters, networks: Networks) -> None:
        self._adapters = adapters
        self._networks = networks

    def check(self, job: Job) -> None:
        """Raises Refused for a job that needs more than the device may ever hold."""
        most, needed = self._networks.slots.count, len(set(job.networks))
        if needed > most:
            raise Refused(f"A request may use up to {most} ControlNets and IP-Adapters here, not {needed}.")

    def want(self, job: Job) -> None:
        """Begins to load what is not there; asked again, what was evicted meanwhile."""
        self._adapters.want(job.keys, job.loads)
        self._networks.want(job.networks, job.network_loads)

    def failed(self, job: Job) -> Exception | None:
        """The error of an adapter or a network of the job that could not be loaded."""
        for ref, load in job.loads.items():
            if load.done() and (error := load.exception()) is not None:
                return explain_load(ref, error)
        for network, loaded in job.network_loads.items():
            if loaded.done() and (error := loaded.exception()) is not None:
                return explain_network(network, error)
        return None

    def take(self, sample: Sample) -> bool:
        """Pins what a sample needs on the device; False if it has to wait for a load, or for room."""
        job = sample.job
        self.want(job)
        if not sample.ready or self.failed(job) is not None:
            return False
        slots = self._adapters.acquire(job.keys, job.loads)
        if slots is None:
            return False
        if not self._networks.acquire(job.networks, job.network_loads):
            self._adapters.release(job.keys)
            return False
        sample.slots = slots
        if all(other.slots is not None for other in job.samples):
            self.settle(job)
        return True

    def settle(self, job: Job) -> None:
        """The job's loads are not needed any more."""
        self._adapters.settle(job.loads)
        self._networks.settle(job.network_loads)

    def release(self, job: Job) -> None:
        """Undoes one `take` of a sample of the job."""
        self._adapters.release(job.keys)
        self._networks.release(job.networks)
