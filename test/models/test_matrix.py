"""What docs/models.md says of every type of transformers holds, for a sample of types in every run and for all in full.

The sample has every form of norm, MLP, rotation, experts and head. It is run with older versions of transformers too.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers  # noqa: E402

from liger_kernel.transformers import apply_liger_kernel  # noqa: E402
from models import inputs, matrix, tiny  # noqa: E402

from support import release_ropes  # noqa: E402

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/models.md").read_text()
VERSIONS = {name: Path(os.environ.get(f"LIGER_TEST_TRANSFORMERS_{name}", ROOT / f".deps/transformers-{dots}"))
            for name, dots in (("457", "4.57"), ("500", "5.0"))}  # fmt: skip
_SAMPLE = """
    bart beam bert cohere deepseek_v2 deepseek_v3 ernie4_5 falcon_mamba gemma2 gemma3 gemma3n_text gemma4_text glm4
    gpt2 gptj gpt_oss granitemoehybrid internvl llama llama4_text llava mamba2 mixtral mllama modernbert-decoder
    nemotron olmo phi3 qwen2_5_vl qwen2_vl qwen3_moe qwen3_next qwen3_vl recurrent_gemma whisper xlstm zamba2
"""
SAMPLE = _SAMPLE.split()
# Not bit-identical in bf16: voxtral_realtime's first norm keeps the strides of a transposed input and ours does not, so
# torch's next matmul rounds otherwise; Inkling fails in bf16.
NO_BITS = {"inkling2", "inkling2_loop", "inkling2_loop_text", "inkling2_text", "voxtral_realtime"}
# Cohere's layer norms are a tie of two roundings in one element of a thousand; which, the CPU decides.
RARE_TIES = {"cohere", "cohere2_vision"}


@pytest.fixture(autouse=True)
def no_rope_left():
    yield
    release_ropes()


def rows() -> dict[str, list[str]]:
    """The cells of the page's table by type."""
    table = PAGE[PAGE.index("## By type") : PAGE.index("## Left alone")]
    found = (line[2:-2].split(" | ") for line in table.splitlines() if re.match(r"\| (?!type )[a-z]", line))
    return {cells[0]: [cell.strip() for cell in cells] for cells in found}


ROWS = rows()


def known_types():
    return {*tiny.causal_types(), *tiny.multimodal_types()}


def bits_hold(entry):
    """Whether the bf16 logits are those of the unpatched model, as far as we promise."""
    allowed = ("same", "100% same", "99% same") if entry.model_type in RARE_TIES else ("same",)
    return entry.bits in allowed or entry.model_type in NO_BITS


def check(model_type):
    entry = matrix.measure(model_type)
    assert not entry.error
    assert entry.equal, f"loss differs by {entry.loss:.1e}, gradients by {entry.gradient:.1e}"
    assert bits_hold(entry), entry.bits
    promised = [int(cell.partition("/")[0] or 0) for cell in ROWS[model_type][1:5]]
    found = [done for done, _ in (entry.norms, entry.mlps, entry.ropes, entry.experts)]
    assert all(f >= p for f, p in zip(found, promised, strict=True)), f"patched {found}, the page says {promised}"
    assert entry.head.startswith("left") == (ROWS[model_type][5] == "left")


@pytest.mark.parametrize("model_type", [t for t in SAMPLE if t in known_types()])
def test_a_type_of_the_sample_is_patched_as_the_page_says_and_trains_the_same(model_type):
    check(model_type)


NO_GATE = {"llama4"}  # whose experts compute it inside their forward
# Types whose multimodal class is another than the causal one that the page shows.
OF_TWO_CLASSES = ["dots3_note", "llama4", "mllama", "qwen3_5", "qwen3_5_moe"]


@pytest.mark.parametrize("model_type", [t for t in OF_TWO_CLASSES if t in tiny.multimodal_types()])
def test_the_multimodal_class_of_a_type_that_has_two_is_patched_in_full_and_trains_the_same(model_type):
    entry = matrix.measure(model_type, multimodal=True)
    assert not entry.error and entry.head.startswith("fused_linear_cross_entropy")
    experts = (0, 0) if model_type in NO_GATE else entry.experts
    for done, there in (entry.norms, entry.mlps, entry.ropes, experts):
        assert done == there, entry.left
    assert entry.equal and entry.bits == "same"


WITH_PICTURES = """
    cohere2_vision gemma3 gemma4 glm4v glm4v_moe internvl llama4 llava mistral3 mllama muse_glimmer paligemma qwen2_5_vl
    qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe smolvlm
"""
# The others take frames as images, or write time stamps between them.
WITH_VIDEOS = "gemma4 muse_glimmer qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe"


SEEING = [(t, False) for t in WITH_PICTURES.split()] + [(t, True) for t in WITH_VIDEOS.split()]


@pytest.mark.parametrize("model_type, video", SEEING, ids=[f"{t}-{'video' if v else 'image'}" for t, v in SEEING])
def test_a_model_that_sees_trains_the_same_through_its_vision_tower(model_type, video):
    model = tiny.tiny(model_type, multimodal=True)
    with torch.no_grad():
        for p in filter(lambda p: not p.any(), model.parameters()):
            p.normal_(0, 0.02)  # Gemma 3's projection is 0 at first, and so were the tower's gradients
    given = inputs.pictures(model, video)
    wanted = matrix.run(model, given)
    assert any("vis" in name and g.any() for name, g in wanted[1].items())
    report = apply_liger_kernel(model)
    assert any("vis" in r.module for r in report.patched)
    assert {r.kind for r in report.left} == ({"experts"} if model_type in NO_GATE else set())
    loss, gradient = matrix.difference(matrix.run(model, given), wanted)
    assert loss <= matrix.LOSS and gradient <= matrix.GRADIENT


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(ROWS.keys() - set(SAMPLE)))
def test_every_type_is_patched_as_the_page_says_and_trains_the_same(model_type):
    if model_type not in known_types():
        pytest.skip("not in this version of transformers")
    check(model_type)


def test_every_type_is_on_the_page():
    if f"of transformers {transformers.__version__} " not in PAGE:
        pytest.skip("the page is of another version of transformers")
    assert ROWS.keys() | tiny.NOT_RUN.keys() == known_types() and not ROWS.keys() & tiny.NOT_RUN.keys()


def test_the_page_shows_the_coverage_we_promise():
    causal, multimodal = re.findall(r"^\*\*(\d+) of .*?\*\*: (\d+) of \d+ norms; (.*)$", PAGE, re.MULTILINE)
    assert int(causal[0]) >= 193 and int(causal[1]) >= 1550
    mlps, ropes, _, head, equal, _ = map(int, re.findall(r" in (\d+)", " " + causal[2]))
    assert mlps >= 106 and ropes >= 133 and head >= 190 and equal >= 193
    *_, head, equal, _ = map(int, re.findall(r" in (\d+)", " " + multimodal[2]))
    assert min(int(multimodal[0]), equal) >= 107 and head >= 103


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", [t for t in SAMPLE if t in known_types()])
def test_a_type_of_the_sample_trains_the_same_on_an_accelerator(model_type, device):
    entry = matrix.measure(model_type, device.type)
    assert not entry.error
    # Ten times what a CPU is held to: the unpatched model adds up its embedding's gradients in no fixed order there.
    assert entry.loss <= 10 * matrix.LOSS and entry.gradient <= 10 * matrix.GRADIENT


@pytest.mark.parametrize("version", VERSIONS)
def test_the_sample_holds_with_an_older_transformers(version):
    if not VERSIONS[version].is_dir():
        pytest.skip(f"{VERSIONS[version]} is made by make test")
    paths = [str(VERSIONS[version]), str(ROOT / "src"), str(ROOT / "test")]
    code = (
        "import sys; from models import matrix, tiny;"
        "matrix.main([t for t in sys.argv[1:] if t in {*tiny.causal_types(), *tiny.multimodal_types()}])"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *SAMPLE], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    entries = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    ran = [matrix.Entry(**e) for e in entries if not e["error"]]
    assert len(ran) >= 25
    assert not [e for e in ran if not e.equal or not bits_hold(e)]
    assert all(e.norms[0] for e in ran) and not any(e.head.startswith("left") for e in ran)
    if version == "457":
        assert all(not done for e in ran for done in e.experts[:1])
