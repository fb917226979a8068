"""Processes that run a test's functions together, as the ranks of one job, and are kept between tests."""

import importlib
import os
import pickle
import queue
import tempfile
import traceback

import torch

SECONDS = 120  # of one call, on a machine that is busy with other tests
NCCL = os.environ.get("LIGER_TEST_NCCL", "0")  # 0: where there are GPUs enough; 1: always; shared: all on one GPU


class Ranks:
    """`size` processes joined by gloo, or by NCCL where each can have a GPU of its own or shall share one."""

    def __init__(self, size: int = 2):
        self.size = size
        self.workers: list = []

    def __call__(self, function, **arguments) -> list:
        """What function(**arguments), of a module that can be imported, returns on each rank.

        A rank that raises fails the call with its traceback, and so does one that does not come back.
        """
        if not self.workers:
            self._start()
        call = pickle.dumps((function.__module__, function.__name__, arguments))
        for inbox in self.inboxes:
            inbox.put(call)
        found: dict = {}
        while len(found) < self.size:
            try:
                rank, failed, value = self.outbox.get(timeout=SECONDS if len(found) == 0 else 20)
            except queue.Empty:
                self.stop()
                raise TimeoutError(f"only ranks {sorted(found)} came back") from None
            if failed:
                self.stop()
                raise AssertionError(f"rank {rank}:\n{value}")
            found[rank] = pickle.loads(value)
        return [found[rank] for rank in range(self.size)]

    def _start(self) -> None:
        if NCCL != "0" and not _on_gpus(self.size):
            raise RuntimeError(f"LIGER_TEST_NCCL is set, and there are not {self.size} GPUs")
        context = torch.multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.inboxes = [context.Queue() for _ in range(self.size)]
        self.outbox = context.Queue()
        for rank in range(self.size):
            store = os.path.join(self.folder.name, "store")
            given = (rank, self.size, _on_gpus(self.size), store, self.inboxes[rank], self.outbox)
            self.workers.append(context.Process(target=_work, args=given, daemon=True))
            self.workers[-1].start()

    def stop(self) -> None:
        """End the processes; the next call starts new ones."""
        for worker in self.workers:
            worker.kill()
            worker.join()
        self.workers = []


def rank_device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if _on_gpus(_size()) else torch.device("cpu")


def _size() -> int:
    return torch.distributed.get_world_size()


def _on_gpus(size: int) -> bool:
    return torch.cuda.device_count() >= (1 if NCCL == "shared" else size)


def _work(rank: int, size: int, on_gpu: bool, store: str, inbox, outbox) -> None:
    backend = "nccl" if on_gpu else "gloo"
    place, here = rank, size
    if on_gpu and NCCL == "shared":  # NCCL refuses two ranks on a GPU of one host: each is a host of its own
        place, here = 0, 1
        os.environ.update(NCCL_HOSTID=f"rank{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    if on_gpu:
        torch.cuda.set_device(place)
    else:  # one GPU for several ranks is none: engines would take it for theirs
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(place), WORLD_SIZE=str(size), LOCAL_SIZE=str(here))
    os.environ.update(LOCAL_WORLD_SIZE=str(here), MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy").SMALL = 0  # tiny heads take the engine too
    torch.distributed.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        module, name, arguments = pickle.loads(inbox.get())
        try:
            torch.manual_seed(0)
            value = getattr(importlib.import_module(module), name)(**arguments)
            outbox.put((rank, False, pickle.dumps(value)))
        except Exception:
            outbox.put((rank, True, traceback.format_exc()))
