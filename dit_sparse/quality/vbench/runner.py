# SPDX-License-Identifier: Apache-2.0
"""Run the official VBench: a script for another interpreter, which has ``vbench`` installed.

``python runner.py JOB.json``. It imports nothing of dit_sparse. Each dimension runs by itself;
what one cannot do is said in the result file, which is written whole or not at all.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import sys
import traceback
from pathlib import Path
from typing import Any

_KEPT: list[Any] = []  # torch forgets operators whose library object is gone


def main(path: str) -> None:
    """Do the job that the file describes."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    result: dict[str, Any] = {"schema_version": 1, "dimensions": {}, "error": None}
    try:
        if job["torchvision_stub"]:
            stub_torchvision()
        result["versions"] = versions()
        for name in job["dimensions"]:
            result["dimensions"][name] = one(job, name)
    except BaseException as error:  # noqa: BLE001  (told to the one who asked, then the end)
        result["error"] = f"{type(error).__name__}: {error}"
        result["traceback"] = traceback.format_exc()[-4000:]
    output = Path(job["output"])
    scratch = output.with_name(output.name + ".new")
    scratch.write_text(json.dumps(plain(result), allow_nan=False, indent=1), encoding="utf-8")
    scratch.replace(output)


def one(job: dict[str, Any], name: str) -> dict[str, Any]:
    """Run one dimension."""
    missing = [file for file in job["needs"].get(name, []) if not Path(file).is_file()]
    if missing and not job["allow_download"]:
        return {"status": "skipped", "reason": f"needs {', '.join(missing)}"}
    try:
        vbench: Any = importlib.import_module("vbench")
        full = str(Path(vbench.__file__).parent / "VBench_full_info.json")
        out = Path(job["scratch"]) / name
        bench = vbench.VBench(job["device"], full, str(out))
        custom = job["mode"] == "custom_input"
        bench.evaluate(
            videos_path=job["videos"],
            name="job",
            prompt_list=job["prompts"] if custom else [],
            dimension_list=[name],
            local=not job["allow_download"],
            read_frame=False,
            mode=job["mode"],
        )
        told = json.loads((out / "job_eval_results.json").read_text(encoding="utf-8"))[name]
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return {
            "status": "error",
            "reason": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc()[-4000:],
        }
    return {"status": "ok", "value": told[0], "videos": told[1]}


def stub_torchvision() -> None:
    """Declare operators that a torchvision without a build for this torch asks for."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)


def versions() -> dict[str, str]:
    """Name what runs."""
    names = ("vbench", "torch", "torchvision", "numpy")
    there = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    found = {name: there.get(name, "not installed") for name in names}
    return {"python": sys.version.split()[0], **found}


def plain(value: Any) -> Any:
    """Make strict JSON: numpy's numbers become Python's, NaN becomes null."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


if __name__ == "__main__":
    main(sys.argv[1])
