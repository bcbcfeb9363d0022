"""Where, when and with what a run was measured."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

import einlinear as el


def provenance(device: str, processes: int) -> dict[str, str]:
    """Device, versions, commit and time, as a `Run` has them."""
    kind = torch.device(device).type
    name = f"{kind} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"
    name = torch.cuda.get_device_name(device) if kind == "cuda" else name
    return {
        "device": name if processes == 1 else f"{processes} x {name}",
        "versions": json.dumps(
            {"einlinear": el.__version__, "torch": torch.__version__, "python": platform.python_version()}
        ),
        "commit": checked_out(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def checked_out() -> str:
    """The commit of this package where it runs from its repository, marked where files differ from it.

    For a copy without the repository it is what the environment's EINLINEAR_COMMIT says.
    """
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return os.environ.get("EINLINEAR_COMMIT", "")
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        return ""
