# SPDX-License-Identifier: Apache-2.0
"""The scripts in samples/several_gpus, and ``evaluate``: two processes share one's work."""

import json
import re
import subprocess
import sys

import pytest

from dit_sparse.strategy import Strategy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="processes are forked"),
]
SMALL = ["--steps", "2", "--size", "64", "64", "9", "--cpu"]
RADIAL = ["--strategy", "wan-tiny.radial"]


@pytest.fixture(scope="module")
def told(tmp_path_factory, root):
    """Run them all; give what the processes of each printed, and the folder of their files."""
    folder = tmp_path_factory.mktemp("several")
    samples = root / "samples"
    model, prompts = str(samples / "wan-tiny"), ["--prompts", str(samples / "prompts.txt")]
    jobs = {}
    for n in (1, 2):
        jobs |= {
            f"generate{n}": ("generate", n, [*prompts, *RADIAL, "-o", f"clips{n}"]),
            f"profile{n}": (
                "profile_model", n,
                [*prompts, "--candidates", "radial,pooled", "-o", f"found{n}.json"],
            ),
        }  # fmt: skip
    jobs["evaluate2"] = ("evaluate", 2, [*prompts, *RADIAL])
    # The seed of the first prompt is 0 in both scripts.
    prompt = (samples / "prompts.txt").read_text(encoding="utf-8").splitlines()[1]
    jobs["one_video2"] = ("one_video", 2, [prompt, *RADIAL, "-o", "one.mp4"])
    plain = [
        {
            "script": str(samples / "several_gpus" / f"{script}.py"),
            "arguments": [model, *arguments, *SMALL],
            "processes": processes,
            "told": name,
        }
        for name, (script, processes, arguments) in jobs.items()
    ]
    coarse = Strategy.coerce("radial", block_size=16, decay_factor=0.2)
    coarse.model_copy(update={"name": "coarse"}).save(folder / "coarse.json")
    evaluate = [
        *("evaluate", model, "--strategy", "coarse.json", "--prompt", "a cat", "--seeds", "0,1"),
        *("--height", "64", "--width", "64", "--frames", "9", "--steps", "2", "--threads", "1"),
        *("--metrics", "psnr", "--floor", "off", "--device", "cpu", "-o", "evaluated"),
    ]
    jobs["command2"] = ("command", 2, evaluate)
    script = str(root / "tests" / "parallel" / "command.py")
    plain.append({"script": script, "arguments": evaluate, "processes": 2, "told": "command2"})
    (folder / "jobs.json").write_text(json.dumps(plain), encoding="utf-8")
    command = [sys.executable, "-c", LAUNCH.format(root=str(root)), "jobs.json"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=500)
    return folder, {
        name: [
            (folder / f"{name}.{rank}").read_text(encoding="utf-8") for rank in range(processes)
        ]
        for name, (_, processes, _) in jobs.items()
    }


LAUNCH = "import sys; sys.path.insert(0, {root!r}); from tests.parallel.launch import main; main()"


def test_generate_shares_the_prompts(told):
    folder, said = told
    one, two = (sorted((folder / f"clips{n}").iterdir()) for n in (1, 2))
    assert [path.name for path in one] == [path.name for path in two] == ["0000.mp4", "0001.mp4"]
    for mine, other in zip(one, two, strict=True):
        assert mine.read_bytes() == other.read_bytes()
    assert re.findall(r"process (\d)", said["generate1"][0]) == ["0", "0"]
    assert re.findall(r"process (\d)", said["generate2"][0]) == ["0", "1"]
    assert "process" not in said["generate2"][1]


def test_evaluate_puts_the_figures_together(told):
    _, said = told
    lines = [line for line in said["evaluate2"][0].splitlines() if "PSNR" in line]
    assert len(lines) == 3
    densities = [float(found) for found in re.findall(r"density ([\d.]+)", "".join(lines))]
    noise = [float(found) for found in re.findall(r"PSNR +([\d.]+) dB", "".join(lines[:2]))]
    assert len(densities) == len(noise) == 2
    assert max(densities) < 1
    assert 15 < min(noise) <= max(noise) < 90
    middle = float(re.findall(r"of 2 pairs: ([\d.]+) dB", lines[2])[0])
    assert middle == pytest.approx(sum(noise) / 2, abs=0.011)
    assert "PSNR" not in said["evaluate2"][1]


def test_profile_finds_what_one_process_finds(told):
    folder, said = told
    found = [json.loads((folder / f"found{n}.json").read_text(encoding="utf-8")) for n in (1, 2)]
    assert found[0]["rules"]
    assert found[0]["rules"] == found[1]["rules"]
    assert "rules" in said["profile2"][0]
    assert "rules" not in said["profile2"][1]


def test_one_video_comes_from_both(told):
    folder, said = told
    assert (folder / "one.mp4").stat().st_size > 1000
    assert "sparse attention 'wan-tiny.radial'" in said["one_video2"][0]
    assert "stayed dense" not in said["one_video2"][0]
    assert "wan-tiny.radial" not in said["one_video2"][1]


def test_the_command_shares_the_pairs(told):
    folder, said = told
    assert (folder / "evaluated" / "report.json").is_file(), "".join(said["command2"])[-3000:]
    found = json.loads((folder / "evaluated" / "report.json").read_text(encoding="utf-8"))
    assert found["about"]["processes"] == 2
    assert len(found["results"]["coarse"]["pairs"]) == 2
    assert [each.count("pairs only") for each in said["command2"]] == [1, 0]  # one reports
