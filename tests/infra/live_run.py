"""A small run of Ray Train and Ray Data that sets the gauges of training and goes on until it is interrupted.

python tests/infra/live_run.py FOLDER    on the Ray that RAY_ADDRESS names; results go to FOLDER
"""

import sys
import time
from threading import Thread

import ray
import ray.data
import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.metrics import Counter, Gauge
from ray.util.placement_group import placement_group

from rzen.training.telemetry import HELD_OUT, HELD_OUT_METRIC, METRICS, REJECTED, RUN_METRICS


def worker() -> None:
    """Sets every gauge and counts as jobs/training/worker.py does."""
    gauges = {
        name: Gauge(f"rzen_{name}", metric.description, ("run", "source", "task")) for name, metric in METRICS.items()
    }
    run_gauges = {name: Gauge(f"rzen_{name}", metric.description, ("run",)) for name, metric in RUN_METRICS.items()}
    held_out = Gauge(f"rzen_{HELD_OUT}", HELD_OUT_METRIC.description, ("run", "source"))
    rejected = Counter(f"rzen_{REJECTED}", "samples that were replaced", ("run", "source", "reason"))
    for step, _ in enumerate(ray.train.get_dataset_shard("train").iter_batches(batch_size=1)):
        labels = {"run": "live", "source": "images", "task": "text_image"}
        for name, gauge in gauges.items():
            gauge.set(1.5 if name == "loss" else step / 7, labels)
        held_out.set(0.25, {"run": "live", "source": "images"})
        run_gauges["progress"].set(step / 100_000, {"run": "live"})
        run_gauges["checkpoint_time_s"].set(time.time(), {"run": "live"})
        rejected.inc(1, {"run": "live", "source": "images", "reason": "corrupt_image"})
        time.sleep(0.2)


def driver() -> None:
    """Sets the gauge of jobs/training/launch.py as often as that does."""
    runs = Gauge("rzen_runs", "Training runs of this job that are in a state", ("state",))
    while True:
        runs.set(1, {"state": "running"})
        time.sleep(0.3)


def slow(batch: dict[str, object]) -> dict[str, object]:
    """What a feed does."""
    time.sleep(0.1)
    return batch


def main(folder: str) -> None:
    """Runs until SIGINT."""
    ray.init(log_to_driver=False)
    Thread(target=driver, daemon=True).start()
    placement_group([{"CPU": 100}])  # demand that nobody meets
    waiting = ray.remote(num_cpus=100)(slow).remote({})
    data = ray.data.range(100_000, override_num_blocks=5000).map_batches(slow, num_cpus=0.5)
    DataParallelTrainer(
        worker,
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="live", storage_path=folder),
        datasets={"train": data},
    ).fit()
    del waiting


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except KeyboardInterrupt:
        ray.shutdown()
