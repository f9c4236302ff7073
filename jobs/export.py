"""Job of kind `export`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from jobs.models import checkpoint_folder, local_folder, publish_folder
from jobs.progress import say
from jobs.spec import ExportSpec
from pipelines.storage import open_store
from pipelines.store import disk_errors


def run(spec: ExportSpec) -> dict[str, Any]:
    """Writes the checkpoint directory."""
    from rzen.checkpoints import read_identity
    from rzen.export import export_model

    base = checkpoint_folder(spec.model.base, spec.endpoint)
    adapter = local_folder(spec.model.adapter, spec.endpoint) if spec.model.adapter else None
    with disk_errors(tempfile.gettempdir()), tempfile.TemporaryDirectory(prefix="rzen-export-") as folder:
        local = Path(folder, "model")
        identity = read_identity(Path(adapter or base), spec.identity)
        export_model(base, Path(adapter) if adapter else None, local, identity, spec.dtype)
        publish_folder(local, open_store(spec.out, spec.endpoint))
    say(f"  {spec.out}: a checkpoint for AutoModel ({spec.dtype}), prompt {identity.prompt.template}")
    return {"outputs": [spec.out]}
