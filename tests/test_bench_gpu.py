"""The figures of docs/performance-gpu.md are those that were measured."""

import json

import pytest

from bench import gpu_markdown

RESULTS = gpu_markdown.ROOT / "bench/results/gpu-h200.json"


def test_the_document_shows_what_was_measured():
    text, found = gpu_markdown.DOCUMENT.read_text(), json.loads(RESULTS.read_text())
    said = f"python -m bench.gpu_markdown {RESULTS.relative_to(gpu_markdown.ROOT)}"
    assert gpu_markdown.filled(text, found, gpu_markdown.BLOCKS) == text, said


@pytest.mark.parametrize("name", gpu_markdown.BLOCKS)
def test_each_block_is_shown_once_and_follows_the_results(name):
    assert gpu_markdown.DOCUMENT.read_text().count(f"<!-- bench: {name} -->") == 1
    found = json.loads(RESULTS.read_text())
    before = gpu_markdown.BLOCKS[name](found)
    doubled = json.loads(json.dumps(found), parse_float=lambda digits: 2 * float(digits))
    assert gpu_markdown.BLOCKS[name](doubled) != before


def test_what_a_peer_could_not_do_is_told():
    found = json.loads(RESULTS.read_text())
    for result in found["results"]:
        result["tflops"].pop("cudnn", None)
        result["tflops"].pop("efficient", None)
        result["errors"].pop("efficient", None)
    assert "| - |" in gpu_markdown.prefill(found)
    assert "| - |" in gpu_markdown.float32(found)
