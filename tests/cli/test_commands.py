# SPDX-License-Identifier: Apache-2.0
"""The command line on real pipelines: what it writes, what it says, how it refuses."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import fields
from importlib import import_module
from importlib.metadata import version

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from typer.testing import CliRunner

import dit_sparse
from dit_sparse.cli import COMMANDS, app, perform, receipt
from dit_sparse.cli.console import UserError
from dit_sparse.cli.folder import plain, staged
from dit_sparse.cli.methods import arguments
from dit_sparse.cli.options import key_values
from dit_sparse.core.video import as_uint8
from dit_sparse.methods import METHODS, method_class
from dit_sparse.strategy import Strategy, shipped_names
from tests import tiny

PROMPT = "a red circle moving right"
SMALL = ["--height", "64", "--width", "64", "--frames", "9", "--steps", "2", "--threads", "1"]
# Sparse enough to change pixels at 192 tokens.
SPARSE = ["--strategy", "radial", "--set", "block_size=16", "--set", "decay_factor=0.2"]
PNG_SIZE = (64, 48)  # width, height of the image model's pictures


def run(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


def generate(model, output, *more):
    return run("generate", model, PROMPT, *SPARSE, "-o", output, *SMALL, *more)


def strict(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image)


def refused(result, *words):
    """One line on stderr, exit code 2, no traceback, nothing on stdout."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    error = [line for line in lines if line.startswith("error: ")]
    assert len(error) == 1
    assert "Traceback" not in result.output
    assert result.stdout == ""
    for word in words:
        assert word in error[0]


@pytest.fixture(scope="module")
def wan(root):
    return root / "samples" / "wan-tiny"


@pytest.fixture(scope="module")
def compared(wan, tmp_path_factory):
    """One run with everything on."""
    folder = tmp_path_factory.mktemp("run") / "new" / "out"
    result = generate(wan, folder, "--compare-dense", "--probe", "8", "--seed", "3")
    assert result.exit_code == 0, result.output
    return result, folder, strict(folder / "result.json")


def test_it_writes_the_clips_the_strip_and_the_numbers(compared):
    _, folder, found = compared
    wanted = {"dense.mp4", "sparse.mp4", "strip.png", "result.json"}
    assert {path.name for path in folder.iterdir()} == wanted == set(found["files"])
    height, width, _ = picture(folder / "strip.png").shape
    assert width > 8 * 64
    assert height > 3 * 64
    assert all((folder / name).stat().st_size > 500 for name in wanted)


def test_its_numbers_are_those_of_the_unmodified_pipeline(compared, wan):
    """The dense arm is the plain model; PSNR and SSIM are of raw frames, not of the mp4."""
    import diffusers

    _, _, found = compared
    pipe = diffusers.DiffusionPipeline.from_pretrained(wan)
    pipe.set_progress_bar_config(disable=True)

    def once():
        sizes = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
        seed = torch.Generator().manual_seed(3)
        made = pipe(PROMPT, **sizes, guidance_scale=4.0, generator=seed, output_type="np")
        return as_uint8(made.frames[0])

    dense = once()
    pipe.enable_sparse_attention("radial", block_size=16, decay_factor=0.2, probe=8)
    sparse = once()
    report = pipe.sparse_attention.report()
    psnrs = [peak_signal_noise_ratio(a, b) for a, b in zip(dense, sparse, strict=True)]
    ssims = [
        structural_similarity(
            a,
            b,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=-1,
            data_range=255,
        )
        for a, b in zip(dense, sparse, strict=True)
    ]
    quality = found["quality"]
    assert quality["psnr"]["value"] == pytest.approx(np.mean(psnrs), abs=1e-9)
    assert quality["psnr"]["worst_frame"] == np.argmin(psnrs)
    assert quality["ssim"]["value"] == pytest.approx(np.mean(ssims), abs=1e-9)
    assert quality["psnr"]["value"] < 60  # there was something to measure
    assert found["density"]["overall"] == pytest.approx(report.density)
    assert found["density"]["overall"] < 1
    assert found["recall"]["mean"] == pytest.approx(report.recall, abs=1e-6)
    assert found["recall"]["worst"] == pytest.approx(report.worst_recall, abs=1e-6)


def test_the_result_says_what_ran(compared):
    _, _, found = compared
    assert found["schema_version"] == 1
    request = found["request"]
    assert (request["prompt"], request["seed"]) == (PROMPT, 3)
    assert request["settings"] == {
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": 2,
        "guidance_scale": 4.0,  # the model folder's, 5.0 is WanPipeline's own
        "negative_prompt": None,
        "fps": 12.0,
    }
    again = Strategy.from_dict(found["strategy"])
    assert again.rules[0].params["decay_factor"] == 0.2
    dense, sparse = found["arms"]["dense"], found["arms"]["sparse"]
    calls = 2 * 2 * 6  # steps, guidance branches, layers
    assert dense["kernels"] == {"model's own": calls}
    assert sparse["kernels"] in ({"native": calls}, {"cpu": calls})
    assert sparse["dense_against_the_strategy"] == {}
    assert sparse["output"] == {"frames": 9, "height": 64, "width": 64}
    assert sparse["sparse_kernel_warmed_up"]
    for arm in (dense, sparse):
        assert 0 < arm["attention_seconds"] < arm["total_seconds"]
    ratio = dense["total_seconds"] / sparse["total_seconds"]
    assert found["speedup"]["total"] == pytest.approx(ratio)
    assert found["repeat"]["identical"]
    environment = found["environment"]
    assert environment["packages"]["torch"] == version("torch")
    assert (environment["device"], environment["dtype"]) == ("cpu", "float32")
    assert environment["torch_threads"] == 1
    for score in found["quality"].values():
        assert score["definition"]


def test_the_receipt_has_both_arms_beside_each_other(compared):
    result, folder, found = compared
    for word in ("dense", "sparse: radial", "density", "recall", "PSNR", "SSIM", "kernels"):
        assert word in result.stdout
    assert f"{found['quality']['psnr']['value']:.2f} dB" in result.stdout
    speedup = found["speedup"]["total"]
    assert f"{speedup:.2f}x" in result.stdout
    assert ("lower than dense" in result.stdout) == (speedup < 0.98)
    assert str(folder) in result.stdout.replace("\n", "")
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80
    assert "sparse run" in result.stderr  # progress is not in the result


def test_without_a_dense_run_there_is_nothing_to_compare(wan, tmp_path):
    result = generate(wan, tmp_path, "--probe", "0")
    assert result.exit_code == 0, result.output
    found = strict(tmp_path / "result.json")
    assert found["arms"]["dense"] is found["quality"] is found["speedup"] is None
    assert found["recall"] is found["repeat"] is None
    wanted = {"sparse.mp4", "strip.png", "result.json"}
    assert {path.name for path in tmp_path.iterdir()} == wanted
    assert "PSNR" not in result.stdout


def test_overwriting_replaces_its_own_files_and_no_others(wan, tmp_path):
    for name in ("dense.mp4", "sparse.mp4", "result.json", "notes.txt"):
        (tmp_path / name).write_text("mine")
    refused(
        generate(wan, tmp_path),
        "already contains dense.mp4, sparse.mp4, result.json",
        "--overwrite",
    )
    assert (tmp_path / "sparse.mp4").read_text() == "mine"
    assert generate(wan, tmp_path, "--overwrite", "--probe", "0").exit_code == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"sparse.mp4", "strip.png", "result.json", "notes.txt"}  # no stale dense.mp4
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_strategy_that_leaves_nothing_out_says_so(wan, tmp_path):
    result = run(
        *("generate", wan, PROMPT, "--strategy", "dense", "-o", tmp_path, *SMALL),
        *("--compare-dense", "--probe", "0"),
    )
    assert result.exit_code == 0, result.output
    found = strict(tmp_path / "result.json")
    assert found["quality"]["psnr"]["value"] == 100
    assert found["quality"]["psnr"]["identical_frames"] == 9
    assert "No sparse calls" in result.stdout


@pytest.fixture(scope="module")
def image_model(wan, tmp_path_factory):
    """A PixArt pipeline with the small model's tokenizer and text encoder."""
    import diffusers
    import transformers

    pipe, _ = tiny.pixart()
    transformer = diffusers.PixArtTransformer2DModel(
        **{**pipe.transformer.config, "caption_channels": 64, "sample_size": 32}
    )
    whole = diffusers.PixArtSigmaPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(wan / "tokenizer"),
        text_encoder=transformers.UMT5EncoderModel.from_pretrained(wan / "text_encoder"),
        vae=pipe.vae,
        transformer=transformer,
        scheduler=pipe.scheduler,
    )
    folder = tmp_path_factory.mktemp("models") / "pixart"
    whole.save_pretrained(folder)
    sizes = {"width": PNG_SIZE[0], "height": PNG_SIZE[1], "num_inference_steps": 2}
    sizes["call"] = {"use_resolution_binning": False, "clean_caption": False}
    (folder / "sample_defaults.json").write_text(json.dumps(sizes))
    return folder


def test_an_image_model_gives_pngs(image_model, tmp_path):
    result = run(
        *("generate", image_model, "red", "--strategy", "radial", "--set", "block_size=16"),
        *("--set", "decay_factor=0.1", "-o", tmp_path, "--compare-dense", "--probe", "4"),
    )
    assert result.exit_code == 0, result.output
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"dense.png", "sparse.png", "strip.png", "result.json"}
    one, other = (picture(tmp_path / f"{arm}.png") for arm in ("dense", "sparse"))
    assert one.shape == (PNG_SIZE[1], PNG_SIZE[0], 3)
    found = strict(tmp_path / "result.json")["quality"]["psnr"]["value"]
    if (one != other).any():  # a PNG is the raw frame
        assert found == pytest.approx(peak_signal_noise_ratio(one, other))
    else:
        assert found == 100
    refused(
        run("generate", image_model, "x", *SPARSE, "-o", tmp_path / "b", "--frames", 9),
        "PixArtSigmaPipeline does not accept --frames",
    )


def test_a_call_takes_the_pipelines_other_arguments(image_model, tmp_path):
    command = ("generate", image_model, "red", *SPARSE, "--probe", "0", "-o", tmp_path / "a")
    assert run(*command, "--call", "max_sequence_length=32").exit_code == 0
    told = strict(tmp_path / "a" / "result.json")["request"]["settings"]
    asked = {"max_sequence_length": 32, "use_resolution_binning": False, "clean_caption": False}
    assert asked.items() <= told.items()
    for pair, words in {
        "sharpness=2": "PixArtSigmaPipeline does not accept --call sharpness",
        "height=64": "--call height: use --height instead",
        "output_type=pil": "--call output_type: set by dit-sparse",
        "sharpness": "must be KEY=VALUE, e.g. true_cfg_scale=4",
    }.items():
        refused(run(*command[:-1], tmp_path / "b", "--call", pair), words)


def _folder(files):
    def make(path):
        path.mkdir(parents=True)
        for name, text in files.items():
            (path / name).write_text(text)
        return path

    return make


MODELS = {
    "missing": ("nowhere", ["folder not found", "owner/name"]),
    "missing path": ("./a/b/c", ["./a/b/c", "folder not found"]),
    "not a pipeline": (_folder({}), ["model_index.json is missing"]),
    "broken index": (_folder({"model_index.json": "{"}), ["cannot be loaded"]),
    "foreign index": (_folder({"model_index.json": '{"a": 1}'}), ["cannot be loaded"]),
    "defaults of a wrong type": (
        _folder({"model_index.json": "{}", "sample_defaults.json": '{"height": "x"}'}),
        ["sample_defaults.json: height", "integer"],
    ),
    "defaults with an unknown key": (
        _folder({"model_index.json": "{}", "sample_defaults.json": '{"hight": 64}'}),
        ["sample_defaults.json: hight", "allowed keys: height, width"],
    ),
    "defaults that are no JSON": (
        _folder({"model_index.json": "{}", "sample_defaults.json": "64"}),
        ["sample_defaults.json"],
    ),
    "offline Hub id": ("nobody/nothing-here", ["nobody/nothing-here: cannot be loaded"]),
    "strange characters": ("[red]\n" + "x" * 5000, ["folder not found"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_bad_model_is_one_line(name, tmp_path):
    model, words = MODELS[name]
    model = model if isinstance(model, str) else model(tmp_path / "model")
    refused(generate(model, tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


REQUESTS = {
    "unknown strategy": (["--strategy", "radiall"], ["'radiall'", "did you mean radial"]),
    "missing file": (["--strategy", "no/where.json"], ["no/where.json: file not found"]),
    "no pair": (["--set", "decay"], ["--set 'decay'", "KEY=VALUE"]),
    "twice": (["--set", "sink=true", "--set", "sink=false"], ["--set sink: given twice"]),
    "unknown key": (["--set", "windw=3"], ["unknown option 'windw'", "decay_factor"]),
    "wrong type": (["--set", "decay_factor=many"], ["decay_factor", "many"]),
    "out of range": (["--set", "block_size=9999"], ["block_size", "[1, 1024]"]),
    "layer out of range": (["--set", "dense_layers=[77]"], ["layer 77 is out of range"]),
    "kernel": (["--kernel", "fast"], ["unknown kernel 'fast'", "cpu"]),
    "size": (["--height", "70"], ["WanPipeline: `height` and `width` have to be divisible by 16"]),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_bad_request_is_one_line(name, wan, tmp_path):
    more, words = REQUESTS[name]
    # Of two --strategy the last counts.
    base = ["generate", wan, PROMPT, "--strategy", "radial", "-o", tmp_path / "out", *SMALL]
    refused(run(*base, *more), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["generate", "bench"])
def test_a_gpu_that_is_not_there(command, wan, tmp_path):
    words = ["--device cuda", "finds no GPU"]
    if command == "generate":
        refused(generate(wan, tmp_path / "out", "--device", "cuda"), *words)
    else:
        refused(run("bench", "--device", "cuda"), *words)


def test_a_folder_that_cannot_be_written(wan, tmp_path):
    (tmp_path / "file").write_text("x")
    refused(generate(wan, tmp_path / "file"), "file: not a folder")
    refused(generate(wan, tmp_path / "file" / "below"), "not a folder")


def test_a_pipeline_without_text_encoder_is_refused(tmp_path):
    pipe, _ = tiny.pixart()
    pipe.save_pretrained(tmp_path / "model")
    base = ["generate", tmp_path / "model", PROMPT, *SPARSE, "-o", tmp_path / "out"]
    refused(run(*base), "PixArtSigmaPipeline was saved without its tokenizer")
    assert not (tmp_path / "out").exists()


def test_missing_options_are_named():
    result = run("generate", "model", "prompt")
    assert result.exit_code == 2
    assert "--strategy" in result.stderr


def test_debug_shows_where_an_error_comes_from(wan, tmp_path):
    result = generate(wan, tmp_path / "out", "--strategy", "radiall", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "StrategyError" in result.stderr


class Interrupt:
    """Raises in the middle of the second generation, as Ctrl-C does."""

    def __init__(self, pipe, error):
        self.pipe, self.error, self.left = pipe, error, 5
        pipe.transformer.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.left -= 1
        if self.left == 0:
            assert self.pipe.sparse_attention is not None
            raise self.error


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (torch.OutOfMemoryError("no room\nat all"), 2)]
)
def test_an_end_in_the_middle_leaves_nothing_behind(wan, tmp_path, monkeypatch, error, code):
    loaded = []

    def load(*arguments):
        pipe = original(*arguments)
        loaded.append(pipe)
        Interrupt(pipe, error)
        return pipe

    original = perform.load
    monkeypatch.setattr(perform, "load", load)
    result = generate(wan, tmp_path / "out", "--compare-dense")
    assert result.exit_code == code
    assert loaded[0].sparse_attention is None
    assert "progress_bar" not in vars(loaded[0])
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in result.output
    if code == 130:
        assert result.stderr.splitlines()[-1].startswith(
            "Interrupted. Sparse attention was removed"
        )
    else:
        assert "out of GPU memory in the" in result.stderr


def test_nan_frames_are_an_error(wan, tmp_path, monkeypatch):
    def load(*arguments):
        pipe = original(*arguments)
        pipe.transformer.proj_out.bias.data.fill_(float("nan"))
        return pipe

    original = perform.load
    monkeypatch.setattr(perform, "load", load)
    refused(generate(wan, tmp_path / "out"), "values are NaN or infinite")


def test_a_mistake_of_ours_is_not_dressed_up(wan, tmp_path, monkeypatch):
    monkeypatch.setattr(perform, "load", lambda *_: 1 / 0)
    result = generate(wan, tmp_path / "out")
    assert isinstance(result.exception, ZeroDivisionError)
    assert not (tmp_path / "out").exists()


def environment(root):
    return {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "90"}


@pytest.mark.parametrize(("steps", "said"), [("4", 0), ("1", 1)])
def test_only_the_run_itself_says_that_a_strategy_had_no_effect(tmp_path, steps, said):
    """A warm-up of one step, which AdaSpa spends on its search, says nothing."""
    size = ["--height", "64", "--width", "64", "--frames", "9", "--steps", steps]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = run(
            *("generate", "samples/wan-tiny", PROMPT, "--strategy", "wan-tiny.adaspa"),
            *("-o", tmp_path / "out", *size, "--probe", "0"),
        )
    assert result.exit_code == 0, result.output
    assert sum("had no effect" in str(each.message) for each in seen) == said


def test_a_real_process_generates(root, tmp_path):
    command = [sys.executable, "-m", "dit_sparse", "generate", "samples/wan-tiny", PROMPT]
    command += [*SPARSE, "-o", str(tmp_path / "out"), *SMALL, "--probe", "0"]
    done = subprocess.run(
        command, cwd=root, env=environment(root), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "density" in done.stdout
    assert not re.search("Warning|Traceback", done.stderr), done.stderr
    assert strict(tmp_path / "out" / "result.json")["density"]["overall"] < 1


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is POSIX's")
def test_ctrl_c_ends_a_real_process_with_130(root, tmp_path):
    # A shell's background job starts with SIGINT ignored, and hands that on to its children.
    listening = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('dit_sparse', run_name='__main__')"
    )
    command = [sys.executable, "-c", listening, "generate", "samples/wan-tiny", PROMPT]
    command += [*SPARSE, "-o", str(tmp_path / "out"), *SMALL, "--steps", "5000"]
    with subprocess.Popen(
        command, cwd=root, env=environment(root), stderr=subprocess.PIPE, text=True
    ) as process:
        too_long = threading.Timer(240, process.kill)
        too_long.start()
        said = ""
        for line in process.stderr:
            said += line
            if line.startswith("sparse run"):
                time.sleep(0.3)
                process.send_signal(signal.SIGINT)
                break
        said += process.stderr.read()
        too_long.cancel()
    assert process.returncode == 130, said
    assert said.rstrip().splitlines()[-1].startswith("Interrupted")
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_methods_lists_every_method_param_and_strategy():
    result = run("methods")
    assert result.exit_code == 0
    for name in METHODS:
        cls = method_class(name)
        assert name in result.stdout
        documented = arguments(cls.__doc__)
        for field in fields(cls):
            assert field.name in result.stdout
            assert documented.get(field.name), f"{name}.{field.name} has no line in Args"
    for name in (*shipped_names(), "dense_warmup_steps", "dense_last_steps", "dense_layers"):
        assert name in result.stdout


def test_methods_of_one_name_and_of_none():
    result = run("methods", "radial")
    assert "decay_factor" in result.stdout
    assert "recall_threshold" not in result.stdout
    refused(run("methods", "nothing"), "unknown method 'nothing'", "radial")


def test_doctor_says_what_would_run():
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for word in (
        dit_sparse.__version__,
        "default kernel native",
        "reference",
        "WanTransformer3DModel",
    ):
        assert word in result.stdout
    found = json.loads(run("doctor", "--json").stdout)
    assert found["devices"][0]["chosen"] == "native"


def test_doctor_s_exit_code_is_1_where_something_is_wrong(monkeypatch):
    from dit_sparse.forecast import doctor

    monkeypatch.setattr(doctor, "_ffmpeg", lambda: "no ffmpeg [at all]")
    result = run("doctor")
    assert result.exit_code == 1
    assert "problem: no ffmpeg [at all]" in result.stdout


def test_bench_runs_small_and_writes_its_numbers(tmp_path):
    few = ["--block-size", "128", "--density", "0.125", "--threads", "1", "--repeats", "1"]
    refused(run("bench", "--kernel", "fast"), "unknown kernel 'fast'")
    refused(run("bench", "-o", tmp_path), "must be a file name")
    refused(run("bench", "-o", tmp_path / "no" / "x.json"), "must be a file name")
    refused(run("bench", "--shape", "8x8"), "shape '8x8' matches 0", "8x32x32x2x64")
    refused(run("bench", "--shape", "k"), "matches 5")
    refused(run("bench", "--method", "best"), "unknown method 'best'")
    cpu = ["bench", "--device", "cpu", "--no-memory", "-o", tmp_path / "b.json"]
    result = run(*cpu, *few, "--shape", "2x16x16x1x32")
    assert result.exit_code == 0, result.output
    assert "efficiency" in result.stdout
    assert strict(tmp_path / "b.json")["measurements"][0]["shape"]["grid"]["frames"] == 2
    few = ["--threads", "1", "--repeats", "1", "--steps", "4"]
    result = run(*cpu, *few, "--shape", "2x16x16x1x32", "--method", "radial", "--method", "svg2")
    assert result.exit_code == 0, result.output
    assert "planning" in result.stdout
    assert [(row["method"], row["params"]) for row in strict(tmp_path / "b.json")["methods"]] == [
        ("radial", {}),
        ("svg2", {}),
        ("svg2", {"refresh": 4, "first_iterations": 10}),  # on a CPU, where planning is dear
    ]


def test_help():
    assert "Usage" in run("--help").stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"dit-sparse {command}" in result.stdout
    if not hasattr(import_module(f"dit_sparse.cli.{command}"), "app"):
        assert "Examples" in result.stdout


def test_version():
    assert run("--version").stdout == f"dit-sparse {dit_sparse.__version__}\n"


def test_values_of_set_are_json_or_text():
    found = key_values(
        "--set", ["a=1", "b=0.5", "c=[1, 2]", "d=released", "e=true", "f=x=y", "g="]
    )
    wanted = {"a": 1, "b": 0.5, "c": [1, 2], "d": "released", "e": True, "f": "x=y", "g": ""}
    assert found == wanted
    with pytest.raises(UserError, match="must be KEY=VALUE"):
        key_values("--set", ["=1"])
    with pytest.raises(UserError, match="--call a: given twice"):
        key_values("--call", ["a=1", "a=2"])


def test_numbers_that_json_has_no_word_for_become_null():
    found = plain({"a": float("nan"), "b": [float("inf"), 1.5], 3: (True, None, "x")})
    assert found == {"a": None, "b": [None, 1.5], "3": [True, None, "x"]}


def test_a_failure_while_writing_keeps_the_old_result(tmp_path):
    (tmp_path / "result.json").write_text("old")
    (tmp_path / "dense.mp4").write_text("old")

    def fail():
        with staged(tmp_path, overwrite=True) as scratch:
            (scratch / "sparse.mp4").write_text("new")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        fail()
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "dense.mp4"}
    assert (tmp_path / "result.json").read_text() == "old"


@pytest.mark.parametrize(
    ("total", "words"),
    [(1.5, "1.50x as fast as dense"), (0.6, "Slower than dense"), (1.01, "Same speed as dense")],
)
def test_the_speed_up_is_said_plainly(total, words):
    result = {
        "speedup": {"total": total, "attention": 2.0, "processor": 0.5},
        "environment": {"device": "cpu"},
        "density": {"sparse_call_count": 4},
        "quality": None,
        "arms": {"sparse": {"dense_against_the_strategy": {"a [mask]": 3}, "guarantee": None}},
        "repeat": {"identical": False, "largest_difference": 2},
    }
    said = "\n".join(line.plain for line in receipt._verdict(result))
    assert words in said
    assert "self-attention only: 2.00x" in said
    assert "x 3: a [mask]" in said
    assert "up to 2 of 255 levels" in said
    assert ("By CPU time it is 0.50x" in said) == (abs(0.5 / total - 1) > 0.05)


@pytest.mark.parametrize("name", [None, "out/report.json"])
def test_a_full_disk_is_one_line_wherever_it_is_met(capsys, name):
    from dit_sparse.cli.console import guarded

    def command():
        raise OSError(errno.ENOSPC, "No space left on device", name)

    with pytest.raises(typer.Exit) as stopped:
        guarded(command)()
    assert stopped.value.exit_code == 2
    said = capsys.readouterr().err
    where = "" if name is None else f"{name}: "
    assert said.startswith(f"error: {where}No space left on device; free space")
    assert said.count("\n") == 1


def test_other_faults_of_ours_keep_their_traceback():
    from dit_sparse.cli.console import guarded

    def command():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "ours")

    with pytest.raises(FileNotFoundError):
        guarded(command)()
