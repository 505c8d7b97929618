#!/usr/bin/env bash
# peft 0.21.2 (with transformers 5.23.0, torch 2.13.0), prompt tuning of Pegasus, which scales words by the root of H.
# One would expect a prompt of words' own embeddings to give the loss that those words give as tokens.
# Pegasus scales only what it is given as ids; PEFT gives it embeddings, so all words of the text stand there unscaled.
# It hurts whoever tunes or loads prompts for such a model (Marian, too): the text is another one. BART is right.
# Our product finds the factor by comparing both ways into the first layer, and scales words in the model's stead.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q transformers==5.23.0 peft==0.21.2

HF_HUB_OFFLINE=1 timeout 120 venv/bin/python - <<'EOF'
import sys

import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import BartConfig, BartForConditionalGeneration, PegasusConfig, PegasusForConditionalGeneration

sizes = {
    "vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "scale_embedding": True, "init_std": 0.2, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2,
}
prompt, text, target = torch.tensor([10, 11, 12, 13]), torch.tensor([[20, 21, 22]]), torch.tensor([[30, 31, 1]])
apart = {}
for make, config in (
    (PegasusForConditionalGeneration, PegasusConfig(**sizes)), (BartForConditionalGeneration, BartConfig(**sizes)),
):
    torch.manual_seed(0)
    model = make(config).eval()
    with torch.no_grad():
        of_ids = float(model(input_ids=torch.cat([prompt[None], text], 1), labels=target).loss)
        table = model.get_input_embeddings()
        # The vectors that the model itself makes of the prompt's words.
        scale = 32**0.5 if make is PegasusForConditionalGeneration else 1.0
        vectors = table(prompt) * scale
        settings = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, num_transformer_submodules=1)
        tuned = get_peft_model(model, settings).eval()
        tuned.prompt_encoder["default"].embedding.weight.copy_(vectors)
        mask = torch.ones_like(text)
        of_peft = float(tuned(input_ids=text, attention_mask=mask, labels=target).loss)
    apart[make.__name__] = abs(of_ids - of_peft)
    print(f"{make.__name__}: loss {of_ids:.4f} from ids, {of_peft:.4f} through PEFT")
if apart["PegasusForConditionalGeneration"] < 1e-3:
    sys.exit("Changed: PEFT scales the words of Pegasus.")
if apart["BartForConditionalGeneration"] > 1e-4:
    sys.exit("Changed: PEFT's loss of BART is no longer that of ids.")
EOF
