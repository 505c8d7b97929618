"""GGUF metadata that decides the output is applied and part of the fingerprint, or refused by name."""

import logging

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from pipeline.backbone.files import find_model, read_config, read_tokenizer
from pipeline.backbone.fingerprint import identify
from pipeline.backbone.gguf_metadata import quick_gguf_reader
from pipeline.backbone.host import host_backbone
from pipeline.backbone.loading import build_skeleton
from pipeline.backbone.packaged import PACKAGED
from pipeline.backbone.weights import open_weights
from pipeline.errors import BackboneError
from tests.gguf_files import open_model, write_gguf
from tests.tiny import VOCAB, make_model

CPU = torch.device("cpu")
IDS = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def logits_of(path):
    files = find_model(str(path))
    config = read_config(files)
    backbone = host_backbone(files, config, int8=False, dtype=torch.float32, device=CPU, sharded=False)
    return logits(backbone.hosted.model)


def logits(model):
    if model.config.is_encoder_decoder:
        return model(input_ids=IDS, decoder_input_ids=IDS[:, :7]).logits
    return model(input_ids=IDS).logits


def identity_of(path):
    files = find_model(str(path))
    config = read_config(files)
    return identify("m", config, read_tokenizer(files), open_weights(files, build_skeleton(config, False)), "int8")


def llama3_factors(model):
    """What each frequency is divided by, from transformers' own frequencies."""
    size = model.config.head_dim
    plain = 1.0 / 10_000.0 ** (torch.arange(0, size, 2).float() / size)
    return (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)


def randomise_biases(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


@pytest.mark.parametrize("family", ["llama", "llama_untied", "mistral", "qwen2", "qwen3", "gpt2", "t5", "t5_tied"])
def test_a_model_and_its_gguf_give_the_same_logits(family, tmp_path):
    model = randomise_biases(open_model(make_model(tmp_path / "m", family, scale=1.0)))
    arch = {"mistral": "llama", "llama_untied": "llama", "t5_tied": "t5"}.get(family, family)
    path = write_gguf(tmp_path / "m.gguf", model, arch)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(path), logits(model), rtol=0, atol=1e-4)


def test_the_quick_reader_gives_what_the_gguf_librarys_own_gives(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", open_model(make_model(tmp_path / "m")), "llama")
    usual = gguf.GGUFReader(path)
    with quick_gguf_reader():
        quick = gguf.GGUFReader(path)
    assert type(quick) is not type(usual) and gguf.GGUFReader is type(usual)
    assert list(quick.fields) == list(usual.fields)
    for key, field in usual.fields.items():
        assert quick.fields[key].contents() == field.contents() and quick.fields[key].types == field.types
    for mine, theirs in zip(quick.tensors, usual.tensors, strict=True):
        assert (mine.name, list(mine.shape), mine.tensor_type) == (theirs.name, list(theirs.shape), theirs.tensor_type)
        assert mine.data.dtype == theirs.data.dtype and mine.data.tobytes() == theirs.data.tobytes()


def test_t5_with_plain_relu_is_not_taken_for_a_gated_one(tmp_path):
    model = open_model(make_model(tmp_path / "m", "t5", feed_forward_proj="relu"))
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(write_gguf(tmp_path / "m.gguf", model, "t5")), logits(model), rtol=0, atol=1e-4
        )


def test_rope_factors_rope_scaling_and_biases_are_applied_and_in_the_fingerprint(tmp_path):
    prints = set()

    def check(name, model, family="llama", plain=None, **more):
        path = write_gguf(tmp_path / f"{name}.gguf", model, family, **more)
        with torch.no_grad():
            expected = logits(model)
            torch.testing.assert_close(logits_of(path), expected, rtol=0, atol=1e-4, msg=lambda text: f"{name}: {text}")
        if plain is not None:
            assert (expected - plain).abs().max() > 0.01, "it decides the output"
        prints.add(identity_of(path).fingerprint)
        return expected

    plain = check("plain", open_model(make_model(tmp_path / "plain")))
    model = open_model(make_model(tmp_path / "llama3", rope_parameters=LLAMA3))
    check("llama3", model, plain=plain, tensors={"rope_freqs.weight": llama3_factors(model)})
    model = open_model(make_model(tmp_path / "linear", rope_parameters=LINEAR))
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    check("linear", model, plain=plain, keys=scaling)
    model = open_model(make_model(tmp_path / "yarn", rope_parameters=YARN))
    scaling = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
    check("yarn", model, plain=plain, keys=scaling)
    model = randomise_biases(open_model(make_model(tmp_path / "biased", attention_bias=True, mlp_bias=True)))
    check("biased", model, plain=plain)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias.zero_()
            layer.mlp.down_proj.bias.zero_()
    check("some biases", model, plain=plain, leave_out=("attn_output.bias", "ffn_down.bias"))
    assert len(prints) == 6, "files that differ in this alone are other backbones"

    model = open_model(make_model(tmp_path / "qwen2", "qwen2", rope_parameters=YARN))
    check("qwen2", randomise_biases(model), "qwen2", keys=scaling)


def gemma3(**changes):
    """A tiny Gemma 3 with a window that is shorter than the rows here, and norms whose weights matter."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
    torch.manual_seed(0)
    config = Gemma3TextConfig(**{**sizes, **ids, **heads, **changes}, max_position_embeddings=256)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(0, 0.3)
            elif "embed" not in name:
                parameter.mul_(4)
    return model


@pytest.mark.slow
def test_gemma_3_has_the_windows_frequencies_and_scale_of_its_gguf(tmp_path):
    def check(name, model, keys=None, **more):
        path = write_gguf(tmp_path / f"{name}.gguf", model, "gemma3", keys, **more)
        with torch.no_grad():
            expected = logits(model)
            torch.testing.assert_close(logits_of(path), expected, rtol=0, atol=1e-4, msg=lambda text: f"{name}: {text}")
        return expected

    def rope(near=10_000.0, far=1e6, **scaling):
        return {
            "sliding_attention": {"rope_type": "default", "rope_theta": near},
            "full_attention": {"rope_type": "default", "rope_theta": far, **scaling},
        }

    found = [
        check("plain", gemma3()),
        check("a shorter window", gemma3(sliding_window=4)),
        check(
            "every second layer is global", gemma3(sliding_window_pattern=2), {"attention.sliding_window_pattern": 2}
        ),
        check(
            "no window",
            gemma3(layer_types=["full_attention"] * 4),
            without=("attention.sliding_window",),
        ),
        check("near", gemma3(rope_parameters=rope(near=500.0)), {"rope.freq_base_swa": 500.0}),
        check(
            "far alone is scaled",
            gemma3(sliding_window_pattern=2, rope_parameters=rope(rope_type="linear", factor=8.0)),
            {"attention.sliding_window_pattern": 2, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        ),
        check("the size of 27B", gemma3(num_hidden_layers=62, query_pre_attn_scalar=16, hidden_size=64)),
        check("scores of another width", gemma3(head_dim=16, query_pre_attn_scalar=16)),
    ]
    for number, one in enumerate(found):
        for other in found[:number]:
            assert (one - other).abs().max() > 0.01, "each of these decides the output"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gemma3.attention.scale", 0.1),
        ("gemma3.final_logit_softcapping", 30.0),
        ("gemma3.rope.scaling.type", "yarn"),
        ("gemma3.rope.dimension_count_swa", 4),
        ("gemma3.attention.sliding_window_pattern", [True, False, True, True]),
        ("tokenizer.ggml.add_space_prefix", True),
    ],
)
def test_what_is_not_applied_to_gemma_3_is_refused(key, value, tmp_path):
    path = write_gguf(tmp_path / "odd.gguf", gemma3(), "gemma3", {f".{key}": value})
    with pytest.raises(BackboneError, match=key.replace(".", r"\.")):
        read_config(find_model(str(path)))


def test_a_gguf_of_another_architecture_is_refused_by_its_name(tmp_path):
    model = open_model(make_model(tmp_path / "m", "qwen2"))
    path = write_gguf(tmp_path / "m.gguf", model, "gemma2")
    with pytest.raises(BackboneError, match=r"general\.architecture is 'gemma2'; give the model's safetensors"):
        read_config(find_model(str(path)))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_a_file_leaves_out_is_what_llama_cpp_takes_it_for(family, tmp_path):
    model = open_model(make_model(tmp_path / "m", family, num_key_value_heads=4, scale=1.0))
    arch = "llama" if family == "mistral" else family
    path = write_gguf(tmp_path / "m.gguf", model, arch, without=("rope.freq_base", "attention.head_count_kv"))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(path), logits(model), rtol=0, atol=1e-4)


def test_linear_scaling_and_rope_factors_of_one_file_multiply(tmp_path):
    model = open_model(make_model(tmp_path / "m", rope_parameters=LLAMA3))
    factors = llama3_factors(model)
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    path = write_gguf(tmp_path / "m.gguf", model, "llama", scaling, {"rope_freqs.weight": factors})
    model.model.rotary_emb.inv_freq /= 2
    with torch.no_grad():
        torch.testing.assert_close(logits_of(path), logits(model), rtol=0, atol=1e-4)


def test_keys_that_change_nothing_change_no_fingerprint(tmp_path):
    model = open_model(make_model(tmp_path / "m"))
    plain = identity_of(write_gguf(tmp_path / "plain.gguf", model, "llama"))
    harmless = {
        "rope.scaling.type": "none",
        "rope.scaling.finetuned": True,
        "expert_count": 0,
        "logit_scale": 0.0,
        "attention.key_length": model.config.head_dim,
        "attention.value_length": model.config.head_dim,
        ".general.license": "mit",
        ".quantize.imatrix.file": "x",
    }
    ones = {"rope_freqs.weight": np.ones(model.config.head_dim // 2, dtype=np.float32)}
    assert identity_of(write_gguf(tmp_path / "more.gguf", model, "llama", harmless, ones)) == plain


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.expert_count", 8),
        ("llama.logit_scale", 0.5),
        ("llama.attention.scale", 0.1),
        ("llama.attention.sliding_window", 16),
        ("llama.attention.causal", False),
        ("llama.final_logit_softcapping", 30.0),
        ("llama.rope.scaling.type", "longrope"),
        ("llama.rope.scaling.attn_factor", 1.2),
        ("llama.rope.dimension_count", 4),
        ("llama.attention.value_length", 4),
        ("llama.feed_forward_length", [64, 32]),
        ("llama.a_key_of_next_year", 1),
        ("split.count", 2),
        ("general.type", "adapter"),
    ],
)
def test_a_key_that_is_not_applied_is_refused_by_its_name_and_file(key, value, tmp_path):
    model = open_model(make_model(tmp_path / "m"))
    keys = {"attention.key_length": 8, f".{key}": value}
    if key in ("llama.rope.dimension_count", "llama.feed_forward_length"):
        keys = {"attention.key_length": 8, key.removeprefix("llama."): value}
    path = write_gguf(tmp_path / "odd.gguf", model, "llama", keys)
    with pytest.raises(BackboneError, match=key.replace(".", r"\.")) as caught:
        read_config(find_model(str(path)))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "t5"])
def test_every_tensor_that_nothing_reads_is_named(family, tmp_path):
    model = open_model(make_model(tmp_path / "m", family))
    arch = "llama" if family == "mistral" else family
    rotary = [] if arch in ("llama", "qwen2", "qwen3") else ["rope_freqs.weight"]
    for name in (
        *rotary,
        "blk.0.attn_q.scale",
        "rope_factors_long.weight",
        "blk.1.attn_sinks.weight",
        "blk.0.ffn_up_exps.weight",
    ):
        odd = {name: np.ones(4, dtype=np.float32)}
        files = find_model(str(write_gguf(tmp_path / f"{name}.gguf", model, arch, tensors=odd)))
        with pytest.raises(BackboneError, match=name.replace(".", r"\.")) as caught:
            open_weights(files, build_skeleton(read_config(files), int8=False))
        assert files.gguf in str(caught.value)


def test_rope_factors_of_another_size_are_refused(tmp_path):
    model = open_model(make_model(tmp_path / "m"))
    odd = {"rope_freqs.weight": np.full(3, 2.0, dtype=np.float32)}
    path = write_gguf(tmp_path / "m.gguf", model, "llama", tensors=odd)
    with pytest.raises(BackboneError, match=r"rope_freqs\.weight has 3 numbers where 4"):
        read_config(find_model(str(path)))


@pytest.mark.parametrize(("pre", "told"), [("gpt-2", False), ("llama-bpe", False), ("smollm", True), (None, True)])
def test_a_split_of_text_that_is_not_known_is_told_by_its_name(pre, told, tmp_path, caplog):
    model = open_model(make_model(tmp_path / "m"))
    files = find_model(str(write_gguf(tmp_path / "m.gguf", model, "llama", pre=pre)))
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        read_tokenizer(files)
    remarks = [record.getMessage() for record in caplog.records if record.name.startswith("pipeline")]
    assert len(remarks) == told
    assert all(files.gguf in remark and (pre or "does not name") in remark for remark in remarks)


@pytest.mark.processes
def test_the_packaged_model_is_the_backbone_that_it_was():
    try:
        files = find_model("smollm2-135m")
    except BackboneError:
        pytest.skip(f"the package {PACKAGED['smollm2-135m'].install} is not installed")
    assert identity_of(files.name).fingerprint == "1c5068bc55bda517a2c95b67b94bcc2f015b19b3e6a63a776f3de841b95c3b8a"
