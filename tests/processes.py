"""Two processes that work together, started once for all tests: a function of a test's module runs in both."""

import faulthandler
import multiprocessing
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = 600  # seconds, of a hang alone; on a busy machine the import of torch can take a minute


def _serve(rank, count, store, tasks, results):
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(PATIENCE - 20)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=PATIENCE)
    )
    while (task := tasks.get()) is not None:
        function, args = task
        try:
            results.put((rank, function(*args), None))
        except Exception:
            results.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


class Processes:
    """Calls of them return a list, a result of each rank."""

    def __init__(self, store, count=2):
        context = multiprocessing.get_context("spawn")
        self.results = context.Queue()
        self.tasks = [context.Queue() for _ in range(count)]
        self.started = [
            context.Process(target=_serve, args=(rank, count, store, tasks, self.results), daemon=True)
            for rank, tasks in enumerate(self.tasks)
        ]
        for process in self.started:
            process.start()

    def __call__(self, function, *args):
        for tasks in self.tasks:
            tasks.put((function, args))
        found = {}
        for _ in self.tasks:
            rank, result, error = self.results.get(timeout=PATIENCE)
            if error is not None:
                self.close(kill=True)  # the other waits for this one
                raise AssertionError(f"rank {rank}: {error}")
            found[rank] = result
        return [found[rank] for rank in sorted(found)]

    def close(self, kill=False):
        for process, tasks in zip(self.started, self.tasks, strict=True):
            process.kill() if kill else tasks.put(None)
            process.join(PATIENCE)
