# SPDX-License-Identifier: Apache-2.0
"""What tests of a family's sample pipeline share; a module names its family in ``FAMILY``."""

import sys

import pytest
from diffusers import DiffusionPipeline

from tests.samples.built import SAMPLES


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path():
    path = str(SAMPLES / "train")
    sys.path.insert(0, path)
    yield
    sys.path.remove(path)


@pytest.fixture(scope="module")
def folder(request):
    return SAMPLES / f"{request.module.FAMILY}-tiny"


@pytest.fixture(scope="module")
def pipeline(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def family(request, scripts_on_path):
    from families import make_family

    return make_family(request.module.FAMILY)
