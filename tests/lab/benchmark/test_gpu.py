"""The benchmark of a GPU, on a CPU with tiny shapes: what is right passes, what is wrong does not, nothing stops it."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline.backbone import int8
from pipeline.errors import SettingsError
from pipeline.lab.benchmark import gpu, gpu_steps
from pipeline.lab.benchmark.gpu import SECTIONS, GpuOptions, measure_gpu, run_section, told
from pipeline.lab.benchmark.gpu_checks import (
    attention_checks,
    gate_checks,
    linear_checks,
    product_checks,
    row_checks,
    run_checks,
)

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]
KINDS = {
    "products": lambda: product_checks(CPU, small=True),
    "layers": lambda: linear_checks(CPU, "operators", small=True),
    "rows": lambda: row_checks(CPU, "operators", small=True),
    "gates": lambda: gate_checks(CPU, "operators"),
    "attention": lambda: attention_checks(CPU, "operators", small=True),
}


def ran(checks):
    found = []
    run_checks(found.append, checks)
    return found


def numbers(value):
    """Every float in a structure."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize("kind", KINDS)
def test_pytorchs_operators_are_within_the_bounds_of_float64(kind):
    found = ran(KINDS[kind]())
    assert len(found) > 10 and [entry for entry in found if not entry["passed"]] == []


def test_a_product_that_is_off_by_one_in_one_place_fails_and_one_that_raises_does_not_end_the_checks(monkeypatch):
    usual = int8._multiply

    def off(x, y):
        if len(x) == 17:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED\nmore")
        product = usual(x, y)
        if len(x) == 33:
            product[-1, -1] += 1
        return product

    monkeypatch.setattr(int8, "_multiply", off)
    found = ran(product_checks(CPU, small=True))
    wrong = [entry for entry in found if not entry["passed"]]
    assert {"33 rows" in entry["check"] or "17 rows" in entry["check"] for entry in wrong} == {True}
    assert [entry["max_absolute"] for entry in wrong if "33 rows" in entry["check"]] == [1.0] * 6
    errors = {entry["error"] for entry in wrong if "17 rows" in entry["check"]}
    assert errors == {"RuntimeError: CUDA error: CUBLAS_STATUS_NOT_SUPPORTED"}
    assert "WRONG" in "\n".join(told("kernels", {"status": "failed", "seconds": 1.0, "found": found}))


def test_a_result_that_is_not_finite_fails_and_can_be_written_as_json(monkeypatch):
    monkeypatch.setattr(int8, "_multiply", lambda x, y: torch.full((len(x), y.shape[1]), float("nan")))
    found = ran(product_checks(CPU, small=True))
    assert not any(entry["passed"] for entry in found)
    assert json.loads(json.dumps(found, allow_nan=False))[0]["relative"] is None


@pytest.mark.parametrize("family", gpu_steps.CONFIGS)
def test_a_familys_steps_are_within_the_bounds_of_float64_and_not_with_another_scale(family, monkeypatch):
    monkeypatch.setattr(gpu_steps, "CONFIGS", {family: gpu_steps.CONFIGS[family]})
    found = []
    gpu_steps.check_steps(CPU, found.append)
    assert len(found) == 24 and [entry for entry in found if not entry["passed"]] == []
    usual = gpu_steps._copy_weights

    def scaled(ours, model):
        usual(ours, model)
        next(p for p in model.parameters() if p.shape == (256, 128)).mul_(1.3)

    monkeypatch.setattr(gpu_steps, "_copy_weights", scaled)
    exact = (torch.float32, "exact")
    monkeypatch.setattr(gpu_steps, "_BOUNDS", {exact: gpu_steps._BOUNDS[exact]})
    found.clear()
    gpu_steps.check_steps(CPU, found.append)
    assert len(found) == 4 and not any(entry["passed"] for entry in found)


@pytest.mark.slow
@pytest.mark.parametrize("section", ["trials", "llama-7b", "t5-xxl"])
def test_speed_and_memory_are_measured_on_random_weights_without_a_file(section):
    found = []
    run_section(section, GpuOptions("cpu", small=True), found.append)
    measured = [entry for entry in found if "trials" in entry]
    assert len(measured) == (6 if section == "trials" else 2) and all(entry["passed"] for entry in measured)
    for entry in measured:
        figures = ("tokens_a_second", "step_seconds", "useful_operations_a_second", "peak_mib")
        assert all(math.isfinite(entry[key]) and entry[key] > 0 for key in figures)


def test_a_section_that_does_not_exist_gets_one_sentence(tmp_path):
    with pytest.raises(SettingsError, match="there is no such section; there are machine, kernels"):
        measure_gpu(GpuOptions("cpu", sections=("kernel",)), tmp_path / "gpu.json")


@pytest.mark.slow
@pytest.mark.processes
def test_a_section_that_outlasts_its_time_is_ended_and_the_next_one_runs():
    worker, written, late, after = gpu._Worker(GpuOptions("cpu", small=True)), [], {"found": []}, {"found": []}
    try:
        gpu._run(worker, "kernels", time.monotonic() + 1, late, lambda: None)
        assert late["status"] == "out of time" and worker._process is None
        gpu._run(worker, "launches", time.monotonic() + 250, after, lambda: written.append(len(after["found"])))
        assert after["status"] == "done" and written == list(range(1, len(after["found"]) + 1))
    finally:
        worker.end()


def command(tmp_path, patched, *options):
    """Run the command in a script that changes something first, in the command's own processes too."""
    script, out = tmp_path / "patched.py", tmp_path / "gpu.json"
    words = ["gpu", "--device", "cpu", "--small", "--out", str(out), *options]
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{patched}\nfrom jobs.benchmark import app\n"
        f"if __name__ == '__main__':\n    app({words!r})\n"
    )
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=ROOT, check=False)
    return ran, json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.processes
def test_a_wrong_product_is_reported_and_the_exit_code_is_1(tmp_path):
    patched = (
        "from pipeline.backbone import int8\nusual = int8._multiply\nint8._multiply = lambda x, y: usual(x, y) + 1\n"
    )
    ran, found = command(tmp_path, patched, "--sections", "kernels", "--minutes", "4")
    assert ran.returncode == 1 and "something is WRONG" in ran.stdout and "WRONG int8 product" in ran.stdout, ran.stderr
    assert not found["passed"] and found["sections"]["kernels"]["status"] == "failed"
    wrong = [entry["check"] for entry in found["sections"]["kernels"]["found"] if entry.get("passed") is False]
    assert any(check.startswith("int8 product") for check in wrong)


@pytest.mark.slow
@pytest.mark.processes
def test_a_section_whose_process_dies_is_a_record_and_the_others_go_on(tmp_path):
    patched = (
        "import os\nfrom pipeline.lab.benchmark import gpu_speed\n"
        "def dies(device, report):\n    report({'facts': {'torch': 'some'}})\n    os._exit(3)\n"
        "gpu_speed.measure_machine = dies\n"
    )
    ran, found = command(tmp_path, patched, "--sections", "machine,launches", "--minutes", "8")
    assert ran.returncode == 1, ran.stderr
    machine, launches = found["sections"].values()
    assert machine["status"] == "failed" and "exit code 3" in machine["reason"]
    assert machine["found"] == [{"facts": {"torch": "some"}}] and launches["status"] == "done"


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(1500)
def test_every_section_is_there_right_and_finite(tmp_path):
    ran, found = command(tmp_path, "", "--minutes", "24")
    assert ran.returncode == 0 and found["passed"], ran.stdout + ran.stderr
    assert list(found["sections"]) == list(SECTIONS)
    for name, section in found["sections"].items():
        assert section["status"] == "done" and section["found"], name
        assert all(map(math.isfinite, numbers(section))), name
    shares = [entry for entry in found["sections"]["trials"]["found"] if "trials" in entry]
    assert all(0 < entry[f"share_of_{kind}_peak"] < 1 for entry in shares for kind in ("int8", "bfloat16"))
    sides = {(entry["side"], entry["length"]) for entry in found["sections"]["peers"]["found"]}
    assert len(sides) == 6


@pytest.mark.processes
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_what_to_do():
    ran = subprocess.run(
        [sys.executable, ROOT / "jobs/benchmark.py", "gpu"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert ran.returncode == 2 and "sees no GPU here; --device cpu needs none" in ran.stderr
