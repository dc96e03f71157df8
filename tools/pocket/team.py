"""A team: the same worker in a few processes that average their gradients, or one process on a GPU.

Owns processes, threads and the exchange of gradients. Two processes of one thread waste less than one of two threads:
OpenMP threads spin while they wait for each other.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn


@dataclass(slots=True)
class Seat:
    """One process's place in its team. `board` is a file that all members map into their memory."""

    rank: int
    size: int
    device: torch.device
    board: Path | None = None
    _buffers: Tensor | None = None
    _turn: int = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def average_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Through shared memory: over a socket, 40 MB of gradients would cost a tenth of each step."""
        if self.board is None:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self._buffers is None:
            count = sum(g.numel() for g in gradients)
            flat = torch.from_file(str(self.board), shared=True, size=2 * self.size * count)
            self._buffers = flat.view(2, self.size, count)
        # Two buffers in turn: nobody writes where a slower member may still be reading.
        buffers, self._turn = self._buffers[self._turn], 1 - self._turn
        sizes = [g.numel() for g in gradients]
        torch._foreach_copy_(list(buffers[self.rank].split(sizes)), [g.flatten() for g in gradients])
        dist.barrier()
        mean = buffers.mean(0)
        torch._foreach_copy_(gradients, [m.view_as(g) for m, g in zip(mean.split(sizes), gradients, strict=True)])

    def agree(self, wish: bool) -> bool:
        """True for all as soon as the leader wishes it."""
        if self.size == 1:
            return wish
        vote = torch.tensor(float(wish and self.leads))
        dist.all_reduce(vote)
        return bool(vote > 0)


Worker = Callable[[Seat], None]


def default_size() -> int:
    return 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)


def _sit(rank: int, size: int, rendezvous: str, worker: Worker) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if torch.cuda.is_available():
        worker(Seat(0, 1, torch.device("cuda")))
        return
    torch.set_num_threads(1)
    # Decaying optimizer state turns denormal, and those are slow on a CPU.
    torch.set_flush_denormal(True)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    try:
        board = Path(rendezvous).with_name("board") if size > 1 else None
        worker(Seat(rank, size, torch.device("cpu"), board))
    finally:
        if size > 1:
            dist.destroy_process_group()


def run(worker: Worker, size: int | None = None) -> None:
    """Runs `worker` in every seat; must be picklable. Returns when all are done."""
    members = size or default_size()
    os.environ["OMP_NUM_THREADS"] = "1" if not torch.cuda.is_available() else os.environ.get("OMP_NUM_THREADS", "4")
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        spawn(_sit, args=(members, str(Path(folder) / "rendezvous"), worker), nprocs=members)
