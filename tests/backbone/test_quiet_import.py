"""Only one warning of bitsandbytes is kept from the terminal: that it has no product of 4 bits."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes


def test_the_warning_of_a_missing_product_of_4_bits_is_silent_and_no_other():
    code = """
import logging
logging.basicConfig()
import pipeline.backbone.int8
log = logging.getLogger("bitsandbytes.backends.cpu.ops")
log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "x")
log.warning("something else: %s", "y")
import bitsandbytes
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stderr
    assert "gemm_4bit_forward" not in told and "something else: y" in told
