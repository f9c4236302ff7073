"""Specs of tiny jobs for tests that run them, as YAML."""

from typing import Any

import yaml

BACKBONE = {"hidden": 16, "layers": 1, "heads": 2, "vision_width": 16, "vision_depth": 1, "vocabulary": 300}


def stage(root: str, **changes: Any) -> str:
    """A training run on `{root}/data`, with an adapter on a tiny backbone of one layer."""
    fields: dict[str, Any] = {
        "kind": "train",
        "name": "stage",
        "run": {"root": f"{root}/runs"},
        "data": {"root": f"{root}/data"},
        "feed": {"samples_per_task": 16, "cpus_per_task": 0.5},
        "model": {
            "backbone": BACKBONE,
            "lora": {"rank": 2},
            "prompt": {"max_visual_tokens": 4},
            "dtype": "float32",
            "gradient_checkpointing": False,
        },
        "objective": {"false_negatives": None},
        "global_batch": 4,
        "cluster": {"cpus_per_worker": 0.5},
    }
    return yaml.safe_dump(fields | changes)


def evaluate(data: str) -> str:
    """Text to image on the training split of `data`; the models are those of the job that names this spec."""
    fields = {
        "kind": "evaluate",
        "models": {"not_ours": {"base": "nowhere"}},
        "data": {"root": data},
        "tasks": ["text_image"],
        "dtype": "float32",
        "out": "nowhere.json",
    }
    return yaml.safe_dump(fields)
